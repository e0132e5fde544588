"""Text to image with the cache, beside the same run without it.

    python docs/examples/text_to_image.py

It draws with the small Flux that ships with the package. The real one, on a GPU:

    python docs/examples/text_to_image.py --model black-forest-labs/FLUX.1-dev \
        --prompts "a lighthouse in a storm" "a red fox in deep snow"

All prompts are one batch, and with `--by-sample` each has its own decisions. `--compile` compiles
the blocks: the first run of a shape takes longer, the ones behind it less.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import to_image

DEMO = "flux"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="a pipeline's folder or Hub name")
    parser.add_argument("--prompts", nargs="+", default=pipelines.default_prompts(DEMO)[:2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--by-sample", action="store_true", help="a decision a picture")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--out", type=Path, default=Path("dicache-output/text-to-image"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    pipe = load(given.model)
    if given.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    without = draw(pipe, given)

    granularity = "sample" if given.by_sample else "batch"
    apply_dicache(pipe, DiCacheConfig(granularity=granularity))
    cached = draw(pipe, given)

    for index, (before, after) in enumerate(zip(without, cached, strict=True)):
        to_image(before).save(given.out / f"{index}-without.png")
        to_image(after).save(given.out / f"{index}-cached.png")
        psnr = -10 * (before - after).square().mean().log10()
        print(f"{given.prompts[index]}: {psnr:.1f} dB")
    print(get_stats(pipe)["transformer"].summary())


def load(model: str) -> Any:
    """A pipeline, on the GPU if there is one."""
    if model == DEMO:
        return pipelines.load_pipeline(DEMO)
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def draw(pipe: Any, given: argparse.Namespace) -> torch.Tensor:
    """A picture a prompt, from the same noise in every call: [B, 3, H, W] in [0, 1]."""
    if given.model == DEMO:
        inputs = pipelines.pipeline_inputs(DEMO, given.prompts, 0, given.steps)
        return pipelines.decode(DEMO, pipe(**inputs))
    generators = [torch.Generator().manual_seed(seed) for seed, _ in enumerate(given.prompts)]
    options = {"num_inference_steps": given.steps, "output_type": "pt"}
    return pipe(given.prompts, generator=generators, **options).images.float().cpu()


if __name__ == "__main__":
    main()
