"""Trained demo models inside real diffusers pipelines: load, prepare a call, decode its result.

The weights under ``models/`` were trained by ``benchmarks/train/train.py`` on the pictures of
``shapes.py``. There is no VAE: a latent is the picture itself, folded 2x2 (pixel-unshuffle) to 12
channels and scaled to [-1, 1], so every pipeline runs with ``output_type="latent"`` and ``decode``
unfolds the result. Usage: ``pipe(**pipeline_inputs(name, prompt, seed, steps))``.

The video models come in two lengths: of 8 frames, 200 tokens, and of 24 frames, 600 tokens, where
sparse attention can leave something out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from dicache.demo import shapes

DEMO_MODELS: tuple[str, ...] = ("flux", "hunyuan-video", "wan")
LONG_MODELS = {"hunyuan-video": "hunyuan-video-long", "wan": "wan-long"}
MODEL_DIR = Path(__file__).parent / "models"
FOLD = 2
NOISE_MEAN_SCALE = 1.4

DemoTransformer: TypeAlias = (
    FluxTransformer2DModel | HunyuanVideoTransformer3DModel | WanTransformer3DModel
)
DemoPipeline: TypeAlias = FluxPipeline | HunyuanVideoPipeline | WanPipeline


@dataclass(frozen=True)
class DemoModel:
    """A shipped model: whose pipeline it runs in, and with what settings.

    Attributes:
        family: `"flux"`, `"hunyuan-video"` or `"wan"`.
        transformer: Its class in diffusers.
        guidance_scale: As the pipeline has it.
        flow_shift: Of the scheduler, and of the times that it was trained on.
        frames: Of its videos; `None` for images.
    """

    family: str
    transformer: type[DemoTransformer]
    guidance_scale: float
    flow_shift: float
    frames: int | None = None

    @property
    def kind(self) -> shapes.Kind:
        """What its prompts describe."""
        return "image" if self.frames is None else "video"


_HUNYUAN = DemoModel("hunyuan-video", HunyuanVideoTransformer3DModel, 6.0, 3.0, shapes.VIDEO_FRAMES)
_WAN = DemoModel("wan", WanTransformer3DModel, 2.0, 3.0, shapes.VIDEO_FRAMES)
_MODELS = {
    "flux": DemoModel("flux", FluxTransformer2DModel, 3.5, 1.0),
    "hunyuan-video": _HUNYUAN,
    "hunyuan-video-long": replace(_HUNYUAN, frames=shapes.LONG_VIDEO_FRAMES),
    "wan": _WAN,
    "wan-long": replace(_WAN, frames=shapes.LONG_VIDEO_FRAMES),
}
_PROMPTS: dict[str, list[str]] = {
    "image": [
        "red circle left, blue square right on white",
        "yellow triangle top, purple ring bottom on black",
        "green cross center on gray",
        "pink circle left, cyan triangle right on black",
        "orange ring center on white",
        "blue cross top, red square bottom on gray",
        "cyan square left, pink ring right on white",
        "yellow circle center on black",
    ],
    "video": [
        "red circle moves right on white",
        "yellow triangle bounces on black",
        "blue square moves down on gray",
        "green ring grows on white",
        "pink cross moves left on black",
        "cyan circle bounces on gray",
        "orange square shrinks on black",
        "purple triangle moves up on white",
    ],
}


def demo_model(name: str) -> DemoModel:
    """The shipped model of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown demo model {name!r}; expected one of {', '.join(_MODELS)}")
    return _MODELS[name]


def load_transformer(name: str, dtype: torch.dtype = torch.float32) -> DemoTransformer:
    """Load a shipped model from the package, in evaluation mode, in the given dtype."""
    model: DemoTransformer = demo_model(name).transformer.from_pretrained(
        MODEL_DIR / name, dtype=dtype, local_files_only=True
    )
    return model.eval()


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> DemoPipeline:
    """Put a demo model into its real diffusers pipeline; VAE and text encoders are None."""
    return wrap_transformer(name, load_transformer(name, dtype))


def wrap_transformer(name: str, transformer: DemoTransformer) -> DemoPipeline:
    """Put a given transformer into the pipeline (and beside the scheduler) of model ``name``."""
    row = demo_model(name)
    parts: dict[str, Any] = {"transformer": transformer, "vae": None}
    parts |= {"text_encoder": None, "tokenizer": None}
    shift = row.flow_shift
    if row.family == "wan":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        pipe = WanPipeline(**parts, scheduler=scheduler)
    else:
        cls = FluxPipeline if row.family == "flux" else HunyuanVideoPipeline
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe = cls(**parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_inputs(
    name: str,
    prompt: str | list[str],
    seed: int | list[int],
    num_inference_steps: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Everything a call of the pipeline needs, as keyword arguments.

    A list of prompts makes a batch. A list of seeds has one per prompt; a single seed s stands
    for s, s+1, ... over the batch. Noise always comes from the CPU, so that a sample depends on
    its own seed alone. ``device`` and ``dtype`` are those of the pipeline's transformer.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    row = demo_model(name)
    for each in prompts:
        shapes.parse_prompt(each, row.kind)
    text = shapes.encode_prompts(prompts)
    inputs: dict[str, Any] = {
        "prompt_embeds": text.embeds.to(device, dtype),
        "latents": starting_noise(name, _seeds(seed, len(prompts))).to(device, dtype),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": row.guidance_scale,
        "output_type": "latent",
        **_geometry(name),
    }
    if row.family == "wan":
        empty = shapes.encode_prompts([""] * len(prompts))
        return inputs | {"negative_prompt_embeds": empty.embeds.to(device, dtype)}
    inputs["pooled_prompt_embeds"] = text.pooled.to(device, dtype)
    if row.family == "hunyuan-video":
        inputs["prompt_attention_mask"] = text.mask.to(device)
    return inputs


def noise_mean(name: str) -> torch.Tensor:
    """Mean of the noise that a generation starts from, in the shape of one sample's latents.

    Zero, but for Wan: its attention knows relative places only, and a model this small does not
    find out where in the video a token is. Rectified flow may start from any distribution, so the
    noise carries a code of frame, row and column: cos(k pi u) in one channel each, u in (0, 1) the
    place along an axis, k = 1 to 4.
    """
    if demo_model(name).family != "wan":
        return torch.zeros(()).expand(_latent_shape(name))
    sizes = _latent_shape(name)[1:]  # [F, h, w]
    waves = []
    for axis, size in enumerate(sizes):
        u = ((torch.arange(size) + 0.5) / size).view(-1, *[1] * (len(sizes) - 1 - axis))
        waves += [torch.cos(k * math.pi * u).expand(sizes) for k in (1, 2, 3, 4)]
    return NOISE_MEAN_SCALE * torch.stack(waves)  # [12, F, h, w]


def starting_noise(name: str, seeds: list[int]) -> torch.Tensor:
    """Latents to start from, one sample a seed: standard normal noise around `noise_mean`."""
    mean = noise_mean(name)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([mean + torch.randn(mean.shape, generator=g) for g in generators])


def decode(name: str, output: Any) -> torch.Tensor:
    """Turn a pipeline's result, or its latents, into pictures in [0, 1] (float32).

    Flux: [B, 3, H, W]. HunyuanVideo and Wan: [B, F, 3, H, W].
    """
    kind = demo_model(name).kind
    latents = _latents_of(output).float()
    if kind == "image":
        side = shapes.IMAGE_SIZE // FOLD
        tokens = latents.unflatten(1, (side // 2, side // 2)).unflatten(-1, (-1, 2, 2))
        latents = tokens.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, 12, h, w]
    else:
        latents = latents.transpose(1, 2)  # [B, F, 12, h, w]
    return ((F.pixel_shuffle(latents, FOLD) + 1) / 2).clamp(0.0, 1.0)


def encode_pictures(name: str, pictures: torch.Tensor) -> torch.Tensor:
    """Inverse of ``decode``: pictures in [0, 1] to the latents that the transformer reads.

    Flux: [B, 3, H, W] -> packed [B, 64, 48]. Video: [B, F, 3, H, W] -> [B, 12, F, H/2, W/2].
    """
    latents = F.pixel_unshuffle(2 * pictures - 1, FOLD)
    return _pack(latents) if demo_model(name).kind == "image" else latents.transpose(1, 2)


def _pack(latents: torch.Tensor) -> torch.Tensor:
    """Flux's order of latents: [B, 12, h, w] -> [B, h/2 w/2, 48]."""
    blocks = latents.unflatten(-1, (-1, 2)).unflatten(2, (-1, 2))  # [B, 12, h/2, 2, w/2, 2]
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def default_prompts(name: str) -> list[str]:
    """Eight prompts that show what model ``name`` can draw."""
    return list(_PROMPTS[demo_model(name).kind])


def _seeds(seed: int | list[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"got {len(seed)} seeds for {count} prompts; expected one seed per prompt")
    return list(seed)


def _latent_shape(name: str) -> tuple[int, ...]:
    """Of one sample: [64, 48] packed tokens for Flux, [12, F, h, w] for video."""
    channels, frames = 3 * FOLD**2, demo_model(name).frames
    if frames is None:
        return (shapes.IMAGE_SIZE // FOLD // 2) ** 2, 4 * channels
    side = shapes.VIDEO_SIZE // FOLD
    return channels, frames, side, side


def _geometry(name: str) -> dict[str, int]:
    """Sizes as the pipelines count them without a VAE: 8 per latent pixel, 4 per latent frame."""
    frames = demo_model(name).frames
    if frames is None:
        side = 8 * (shapes.IMAGE_SIZE // FOLD)
        return {"height": side, "width": side}
    side = 8 * (shapes.VIDEO_SIZE // FOLD)
    return {"height": side, "width": side, "num_frames": 4 * (frames - 1) + 1}


def _latents_of(output: Any) -> torch.Tensor:
    for field in ("images", "frames"):
        output = getattr(output, field, output)
    latents = output[0] if isinstance(output, tuple) else output
    if not isinstance(latents, torch.Tensor):
        raise ValueError(
            f"expected latents or a pipeline result made with output_type='latent', "
            f"got {type(latents).__name__}"
        )
    return latents
