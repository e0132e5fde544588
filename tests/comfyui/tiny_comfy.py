"""Tiny models with random weights, of ComfyUI's own classes, and runs of ComfyUI's own samplers.

A model comes as a node gets it: a `ModelPatcher`. Weights are drawn from a fixed seed, large enough
that blocks change the tokens and small enough that neighbouring steps are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models as supported
import torch
from torch import Tensor

TEXT = 48  # width of the text embeddings
_STREAMS = {
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": TEXT,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 4,
    "axes_dim": [8, 8, 8],
    "theta": 256,
    "qkv_bias": True,
}
_WAN = {
    "dim": 48,
    "ffn_dim": 96,
    "freq_dim": 32,
    "text_dim": TEXT,
    "num_heads": 2,
    "num_layers": 6,
    "text_len": 16,
}


def _chroma() -> dict[str, Any]:
    own = {"in_dim": 64, "hidden_dim": 48, "out_dim": 48, "n_layers": 2, "patch_size": 2}
    return {"image_model": "chroma", **_STREAMS, **own, "in_channels": 64, "out_channels": 64}


def _hunyuan_video() -> dict[str, Any]:
    off = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False}
    own = {"vec_in_dim": 32, "patch_size": [1, 2, 2], "guidance_embed": True, "vision_in_dim": None}
    return {"image_model": "hunyuan_video", **_STREAMS, **own, **off}


CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (
        supported.Flux,
        {"image_model": "flux", **_STREAMS, "vec_in_dim": 32, "patch_size": 2}
        | {"guidance_embed": True},
    ),
    "chroma": (supported.Chroma, _chroma()),
    "hunyuan_video": (supported.HunyuanVideo, _hunyuan_video()),
    "wan": (supported.WAN21_T2V, {"image_model": "wan2.1", "model_type": "t2v", **_WAN}),
    "wan_vace": (
        supported.WAN21_Vace,
        {"image_model": "wan2.1", "model_type": "vace", **_WAN}
        | {"vace_layers": 2, "vace_in_dim": 96},
    ),
    "wan_camera": (
        supported.WAN21_Camera,
        {"image_model": "wan2.1", "model_type": "camera_2.2", **_WAN},
    ),
    "qwen_image": (
        supported.QwenImage,
        {
            "image_model": "qwen_image",
            "num_layers": 5,
            "attention_head_dim": 24,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (8, 8, 8),
        },
    ),
    "ltx": (
        supported.LTXV,
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": 48,
            "attention_head_dim": 24,
            "num_attention_heads": 2,
            "caption_channels": TEXT,
            "num_layers": 5,
        },
    ),
    "sd3": (
        supported.SD3,
        {
            "in_channels": 16,
            "input_size": None,
            "patch_size": 2,
            "depth": 4,
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 16,
            "num_patches": 256,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": TEXT, "out_features": 256},
            },
        },
    ),
}
# What the table of families calls them; the other classes of Wan have its row, too.
ROWS = {
    "flux": "Flux",
    "chroma": "Chroma",
    "hunyuan_video": "HunyuanVideo",
    "wan": "Wan",
    "qwen_image": "Qwen-Image",
    "ltx": "LTX-Video",
    "sd3": "Stable Diffusion 3",
}
_VIDEO = ("hunyuan_video", "wan", "wan_vace", "wan_camera")


def make_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A `ModelPatcher` of a tiny model."""
    return random_model(*CONFIGS[name], seed, dtype)


def random_model(
    config: Any, unet: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A `ModelPatcher` of a model of any size: ComfyUI's class for it, and its sizes."""
    model = config(dict(unet)).get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.diffusion_model.named_parameters():
        weight.requires_grad_(False)
        width = weight.shape[-1] if weight.dim() > 1 else 1
        if weight.dim() == 1 and "norm" in key and key.endswith(("weight", "scale")):
            weight.fill_(1.0)
        else:
            size = 0.8 / width**0.5 if weight.dim() > 1 else 0.05
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
    model.diffusion_model.to(dtype).dtype = dtype
    if hasattr(model.diffusion_model, "patch_embedding"):  # Wan's is never of lower precision
        model.diffusion_model.patch_embedding.float()
    for _, buffer in model.diffusion_model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def latent(name: str, size: int = 8) -> Tensor:
    """An empty latent image, or a short video."""
    if name == "ltx":
        return torch.zeros(1, 128, 3, size // 2, size // 2)
    if name == "qwen_image":
        return torch.zeros(1, 16, 1, size, size)
    return torch.zeros(1, 16, 3, size, size) if name in _VIDEO else torch.zeros(1, 16, size, size)


def prompt(seed: int, name: str = "", width: int = TEXT, **extra: Any) -> list[Any]:
    """A text's conditioning, as a model's text encoder gives it to samplers."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 16, width, generator=generator)
    pooled = torch.randn(1, 32, generator=generator)
    own = {"pooled_output": pooled, **extra}
    if name == "ltx":
        own["attention_mask"] = torch.ones(1, 16, dtype=torch.long)
    return [[text, own]]


def sample(
    model: Any,
    name: str,
    sampler: str = "euler",
    steps: int = 12,
    cfg: float = 1.0,
    callback: Callable[..., None] | None = None,
    positive: list[Any] | None = None,
    negative: list[Any] | None = None,
    image: Tensor | None = None,
    noise_seed: int = 7,
    **kwargs: Any,
) -> Tensor:
    """What a KSampler node makes of a seed."""
    image = latent(name) if image is None else image
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(noise_seed))
    one = comfy.samplers.KSampler(model, steps, "cpu", sampler, "simple", 1.0, model.model_options)
    with torch.inference_mode():
        return one.sample(
            noise,
            prompt(1, name) if positive is None else positive,
            prompt(2, name) if negative is None else negative,
            cfg=cfg,
            latent_image=image,
            callback=callback,
            disable_pbar=True,
            seed=3,
            **kwargs,
        ).clone()
