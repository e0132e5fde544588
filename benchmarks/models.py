"""The models that gpu.py times: diffusers pipelines around transformers with random weights, at the
real sizes for a GPU and tiny for a CPU.

Weights are made where they are used, so twelve billion of them never pass through the CPU. What a
step costs does not depend on their values, as long as the hidden states stay finite.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """A pipeline, its transformer, and one call of it.

    Attributes:
        name: Key.
        title: Model and size, for the report.
        pipeline: Name of the class in diffusers.
        transformer: Name of the class in diffusers.
        config: The transformer's arguments.
        scheduler: Makes the scheduler as the pipeline's documentation does.
        latents: Shape of the noise that a call starts from.
        text: Tokens and width of a prompt's embedding.
        call: Size of the picture or video, and guidance.
        steps: Of a run, if there is time for it.
        contexts: Calls of the transformer in a step.
    """

    name: str
    title: str
    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    scheduler: Callable[[], Any]
    latents: tuple[int, ...]
    text: tuple[int, int]
    call: Mapping[str, Any]
    steps: int = 50
    contexts: int = 1


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline, without text encoders and VAE."""
    diffusers.utils.logging.set_verbosity_error()
    pipeline_class = getattr(diffusers, model.pipeline)
    required = [
        name
        for name, parameter in inspect.signature(pipeline_class).parameters.items()
        if parameter.default is parameter.empty
    ]
    parts = {"transformer": build_transformer(model, device, dtype), "scheduler": model.scheduler()}
    pipe = pipeline_class(**{**dict.fromkeys(required), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_transformer(model: Model, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with normal weights of variance 1 / fan-in, made on the device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            transformer = getattr(diffusers, model.transformer)(**model.config)
    finally:
        torch.set_default_dtype(default)
    # Modules that from_pretrained(dtype=...) leaves in fp32 are in fp32 here, too.
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(parameter.shape[0] / parameter.numel()) ** 0.5)
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
    return transformer.eval().requires_grad_(False)


def arguments(model: Model, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call but for the number of steps: random embeddings and noise."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    found: dict[str, Any] = {
        "prompt_embeds": normal(1, *model.text).to(dtype),
        "latents": normal(*model.latents),
        "output_type": "latent",
        **model.call,
    }
    if model.contexts == 2:
        found["negative_prompt_embeds"] = normal(1, *model.text).to(dtype)
    if "pooled_projection_dim" in model.config:
        pooled = normal(1, model.config["pooled_projection_dim"])
        found["pooled_prompt_embeds"] = pooled.to(dtype)
    if model.pipeline == "HunyuanVideoPipeline":
        found["prompt_attention_mask"] = torch.ones(1, model.text[0], device=device)
    return found


def _flow_match(**config: Any) -> Callable[[], Any]:
    return functools.partial(FlowMatchEulerDiscreteScheduler, **config)


FLUX = Model(
    name="flux",
    title="FLUX.1-dev, 1024x1024",
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    config={
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    scheduler=_flow_match(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    ),
    latents=(1, 4096, 64),
    text=(512, 4096),
    call={"height": 1024, "width": 1024, "guidance_scale": 3.5},
)
WAN = Model(
    name="wan",
    title="Wan 2.1-1.3B, 480x832, 81 frames, with guidance",
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    config={
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 8960,
        "num_layers": 30,
    },
    scheduler=functools.partial(
        UniPCMultistepScheduler,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    ),
    latents=(1, 16, 21, 60, 104),
    text=(512, 4096),
    call={"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 5.0},
    contexts=2,
)
HUNYUAN_VIDEO = Model(
    name="hunyuan-video",
    title="HunyuanVideo, 544x960, 129 frames",
    pipeline="HunyuanVideoPipeline",
    transformer="HunyuanVideoTransformer3DModel",
    config={
        "num_layers": 20,
        "num_single_layers": 40,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    scheduler=_flow_match(shift=7.0),
    latents=(1, 16, 33, 68, 120),
    text=(256, 4096),
    call={"height": 544, "width": 960, "num_frames": 129, "guidance_scale": 6.0},
)

# Sparse VideoGen's size: 33 frames of 45 x 80 tokens.
HUNYUAN_VIDEO_720P = dataclasses.replace(
    HUNYUAN_VIDEO,
    name="hunyuan-video-720p",
    title="HunyuanVideo, 720x1280, 129 frames",
    latents=(1, 16, 33, 90, 160),
    call={**HUNYUAN_VIDEO.call, "height": 720, "width": 1280},
)
MODELS = {model.name: model for model in (FLUX, WAN, HUNYUAN_VIDEO, HUNYUAN_VIDEO_720P)}

_TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "in_channels": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    **dict.fromkeys(("joint_attention_dim", "text_dim", "text_embed_dim"), 16),
    "pooled_projection_dim": 16,
}
_TINY_ROPE: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"axes_dims_rope": (4, 4, 4)},
    "WanTransformer3DModel": {"rope_max_seq_len": 32},
    "HunyuanVideoTransformer3DModel": {"rope_axes_dim": (4, 4, 4), "num_refiner_layers": 1},
}


def find_model(name: str, dry: bool) -> Model:
    """By its key: at full size, or tiny."""
    model = MODELS[name]
    if not dry:
        return model
    config = {key: _TINY.get(key, value) for key, value in model.config.items()}
    # With fewer tokens than this the text alone were a density of 0.25 in sparse attention.
    frames, side = (5, 16) if name == "hunyuan-video-720p" else (3, 8)
    size = {"height": 8 * side, "width": 8 * side, "num_frames": 4 * frames - 3}
    latents: tuple[int, ...] = (1, 16, frames, side, side)
    if name == "flux":
        latents, size = (1, 64, 16), {"height": 128, "width": 128}
    return dataclasses.replace(
        model,
        title=f"{name}, tiny",
        config=config | _TINY_ROPE[model.transformer],
        latents=latents,
        text=(8, 16),
        call={**model.call, **size},
        steps=10,
    )
