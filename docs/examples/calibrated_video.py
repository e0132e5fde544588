"""Video from a profile: calibrate once, save, and draw as fast or as exactly as you ask.

    python docs/examples/calibrated_video.py --target-speedup 2.5

It draws with the small Wan that ships with the package. The real one, on a GPU; calibrating takes
`--samples` + `--gains` runs, once a model, number of steps and size:

    python docs/examples/calibrated_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --prompts "a red fox in deep snow" "a lighthouse in a storm" --steps 50

The profile stays in `--out`, and is read from there the next time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dicache import DiCacheConfig, apply_dicache, calibrate, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import save_animation, to_image

DEMO = "wan"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="a pipeline's folder or Hub name")
    parser.add_argument("--prompts", nargs="+", default=pipelines.default_prompts(DEMO))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=2, help="un-cached runs to learn from")
    parser.add_argument("--gains", type=int, default=0, help="runs that see how far errors go")
    parser.add_argument("--target-speedup", type=float, default=2.5)
    parser.add_argument("--out", type=Path, default=Path("dicache-output/calibrated-video"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    pipe = load(given.model)
    pipe.set_progress_bar_config(disable=True)
    path = given.out / f"{given.steps}-steps.json"
    if not path.exists():
        profile = calibrate(
            pipe,
            lambda index: draw(pipe, given, 1000 + index),  # seeds that are not drawn below
            given.samples,
            gains=given.gains,
        )
        profile.save(path)
        print(f"wrote {path}")

    apply_dicache(pipe, DiCacheConfig(profile=path, target_speedup=given.target_speedup))
    video = draw(pipe, given, seed=0)
    save_animation(given.out / "video.gif", [to_image(frame) for frame in video], 1000 // 16)
    print(get_stats(pipe)["transformer"].summary())


def load(model: str) -> Any:
    """A pipeline, on the GPU if there is one."""
    if model == DEMO:
        return pipelines.load_pipeline(DEMO)
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def draw(pipe: Any, given: argparse.Namespace, seed: int) -> torch.Tensor:
    """The video of a seed, whose prompt is one of those given: [F, 3, H, W] in [0, 1]."""
    prompt = given.prompts[seed % len(given.prompts)]
    if given.model == DEMO:
        inputs = pipelines.pipeline_inputs(DEMO, prompt, seed, given.steps)
        return pipelines.decode(DEMO, pipe(**inputs))[0]
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": given.steps, "output_type": "pt"}
    return pipe(prompt, generator=generator, **options).frames[0].float().cpu()


if __name__ == "__main__":
    main()
