"""A loop that calls the transformer itself, as the models' original code does, without a pipeline.

    python docs/examples/loop_of_calls.py

Nobody tells the cache how long the run is, so `DiCacheConfig(num_inference_steps=...)` does. The
two branches of guidance are called in turns, and told apart by their text. It runs on the small Wan
that ships with the package. The real one, on a GPU:

    python docs/examples/loop_of_calls.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --prompt "a red fox in deep snow" --steps 50 --guidance-scale 5 --size 480 832 --frames 81

In the original repositories of HunyuanVideo and Wan, one line does it: docs/original.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import save_animation, to_image

DEMO = "wan"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="a Wan pipeline's folder or Hub name")
    parser.add_argument("--prompt", default=pipelines.default_prompts(DEMO)[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 832), help="of a --model's video"
    )
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="Wan's own is 5")
    parser.add_argument("--frames", type=int, default=81, help="of a --model's video")
    parser.add_argument("--out", type=Path, default=Path("dicache-output/loop-of-calls"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    pipe, text, no_text, latents = prepare(given)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    apply_dicache(transformer, DiCacheConfig(num_inference_steps=given.steps))

    scheduler.set_timesteps(given.steps, device=latents.device)
    for t in scheduler.timesteps:
        tokens = latents.to(text.dtype)
        with_text = transformer(tokens, t.expand(1), text, return_dict=False)[0]
        without = transformer(tokens, t.expand(1), no_text, return_dict=False)[0]
        guided = without + given.guidance_scale * (with_text - without)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]

    frames = [to_image(frame) for frame in decode(given.model, pipe, latents)]
    save_animation(given.out / "video.gif", frames, 1000 // 16)
    print(get_stats(transformer).summary())


def prepare(given: argparse.Namespace) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A pipeline for its parts, embeddings of a prompt and of none, and noise [1, C, F, h, w]."""
    if given.model == DEMO:
        inputs = pipelines.pipeline_inputs(DEMO, given.prompt, 0, given.steps)
        texts = inputs["prompt_embeds"], inputs["negative_prompt_embeds"]
        return pipelines.load_pipeline(DEMO), *texts, inputs["latents"]
    from diffusers import WanPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(given.model, dtype=torch.bfloat16).to(device)
    text, no_text = pipe.encode_prompt(given.prompt, "", device=device)
    folds = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    height, width = (side // folds[0] for side in given.size)
    shape = 1, pipe.transformer.config.in_channels, (given.frames - 1) // folds[1] + 1
    noise = torch.randn(*shape, height, width, generator=torch.Generator().manual_seed(0))
    return pipe, text, no_text, noise.to(device)


def decode(model: str, pipe: Any, latents: Tensor) -> Tensor:
    """The video [F, 3, H, W] in [0, 1]."""
    if model == DEMO:
        return pipelines.decode(DEMO, latents)[0]
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    video = pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype), return_dict=False)[0]
    return (video[0].transpose(0, 1).float().cpu() / 2 + 0.5).clamp(0, 1)


if __name__ == "__main__":
    main()
