"""A ControlNet that ends in the middle of the run, with the cache and without.

    python docs/examples/controlnet.py

It draws with the small Flux that ships with the package and an untrained ControlNet, which bends
the picture but means nothing. Real ones, on a GPU:

    python docs/examples/controlnet.py --model black-forest-labs/FLUX.1-dev \
        --controlnet InstantX/FLUX.1-dev-Controlnet-Canny --control-image edges.png

Nothing has to be set: where the ControlNet ends, the trajectory begins anew, two steps long.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from diffusers.utils import load_image

from dicache import apply_dicache, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import to_image

DEMO = "flux"


class Folded(torch.nn.Module):
    """What stands for a VAE in the demo models: a picture's latents are its folded pixels."""

    config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, block_out_channels=(1,) * 4)
    dtype, device = torch.float32, torch.device("cpu")

    def encode(self, pictures: torch.Tensor) -> Any:
        latents = F.pixel_unshuffle(F.avg_pool2d(pictures, 4), 2)  # [B, 3, 8 h, 8 w] -> 12, h, w
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda _: latents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="a Flux pipeline's folder or Hub name")
    parser.add_argument("--controlnet", help="a ControlNet's, for a --model")
    parser.add_argument("--control-image", help="a picture's path or address, for a --model")
    parser.add_argument("--prompt", default=pipelines.default_prompts(DEMO)[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--end", type=float, default=0.6, help="share of the run with control")
    parser.add_argument("--out", type=Path, default=Path("dicache-output/controlnet"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    pipe, inputs = demo(given) if given.model == DEMO else load(given)
    inputs |= {"num_inference_steps": given.steps, "control_guidance_end": given.end}
    without = draw(pipe, given, inputs)
    apply_dicache(pipe)
    cached = draw(pipe, given, inputs)

    to_image(without).save(given.out / "without.png")
    to_image(cached).save(given.out / "cached.png")
    psnr = -10 * (without - cached).square().mean().log10()
    stats = get_stats(pipe)["transformer"]
    (branch,) = stats.contexts
    print(f"{psnr:.1f} dB, {stats.mask(branch)} (C computed, R reused)")
    print(stats.summary())


def demo(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The shipped Flux, a ControlNet that begins as its first blocks, and what a call needs."""
    flux = pipelines.load_pipeline(DEMO)
    heads = {
        key: flux.transformer.config[key] for key in ("attention_head_dim", "num_attention_heads")
    }
    controlnet = FluxControlNetModel.from_transformer(flux.transformer, 1, 1, **heads)
    ends = (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks)
    torch.manual_seed(0)
    for layer in (controlnet.controlnet_x_embedder, *ends):
        torch.nn.init.normal_(layer.weight, std=0.02)  # they begin at 0, where it does nothing
    parts = flux.components | {"vae": Folded(), "controlnet": controlnet.eval()}
    pipe = FluxControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    inputs = pipelines.pipeline_inputs(DEMO, given.prompt, 0, given.steps)
    return pipe, inputs | {"control_image": torch.ones(1, 3, 128, 128).triu()}


def load(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Published ones, on the GPU if there is one."""
    dtype, device = torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu"
    controlnet = FluxControlNetModel.from_pretrained(given.controlnet, dtype=dtype)
    pipe = FluxControlNetPipeline.from_pretrained(given.model, controlnet=controlnet, dtype=dtype)
    inputs = {"prompt": given.prompt, "control_image": load_image(given.control_image)}
    return pipe.to(device), inputs | {"output_type": "pt"}


def draw(pipe: Any, given: argparse.Namespace, inputs: dict[str, Any]) -> torch.Tensor:
    """A picture [3, H, W] in [0, 1], from the same noise in every call."""
    made = pipe(**inputs, generator=torch.Generator().manual_seed(0))
    if given.model == DEMO:
        return pipelines.decode(DEMO, made)[0]
    return made.images[0].float().cpu()


if __name__ == "__main__":
    main()
