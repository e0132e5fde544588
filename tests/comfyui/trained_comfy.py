"""The trained demo model `flux` in ComfyUI: weights under ComfyUI's names, prompts, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.supported_models as supported
import comfy.utils
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dicache.demo import shapes

FOLDER = Path(shapes.__file__).parent / "models" / "flux"
FOLD = 2
SIDE = shapes.IMAGE_SIZE // FOLD  # of its latents, which are the pictures themselves, folded


def trained_flux() -> Any:
    """A `ModelPatcher`."""
    sizes = json.loads((FOLDER / "config.json").read_text())
    config = {
        "image_model": "flux",
        "patch_size": 2,
        "in_channels": 3 * FOLD**2,
        "out_channels": 3 * FOLD**2,
        "vec_in_dim": sizes["pooled_projection_dim"],
        "context_in_dim": sizes["joint_attention_dim"],
        "hidden_size": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "mlp_ratio": 4.0,
        "num_heads": sizes["num_attention_heads"],
        "depth": sizes["num_layers"],
        "depth_single_blocks": sizes["num_single_layers"],
        "axes_dim": sizes["axes_dims_rope"],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": sizes["guidance_embeds"],
    }
    names = comfy.utils.flux_to_diffusers(config)
    weights: dict[str, Tensor] = {}
    model = supported.Flux(dict(config)).get_model({}, device="cpu")
    expected = model.diffusion_model.state_dict()
    for name, weight in load_file(FOLDER / "diffusion_pytorch_model.safetensors").items():
        place = names[name]
        if isinstance(place, str):
            weights[place] = weight
            continue
        key, part, *change = place  # of a larger one, or in another order
        if part is not None:
            weights.setdefault(key, torch.zeros_like(expected[key])).narrow(*part).copy_(weight)
        else:
            weights[key] = change[0](weight)
    model.diffusion_model.load_state_dict(weights)
    model.diffusion_model.to(torch.float32).dtype = torch.float32
    model.diffusion_model.requires_grad_(False)
    model.model_sampling.set_parameters(shift=0.0)  # as it was trained
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def trained_prompt(text: str) -> list[Any]:
    """A text's conditioning."""
    encoded = shapes.encode_prompts([text])
    return [[encoded.embeds, {"pooled_output": encoded.pooled}]]


def picture(model: Any, latent: Tensor) -> Tensor:
    """[3, H, W] in [0, 1], of what a sampler returns."""
    folded = model.get_model_object("latent_format").process_in(latent)
    return ((F.pixel_shuffle(folded, FOLD)[0] + 1) / 2).clamp(0, 1)
