"""Make the profiles that ship with the demo models: `dicache.calibrate` on two batches of pictures.

    python benchmarks/train/profiles.py                  all three, into the package's folder
    python benchmarks/train/profiles.py --model wan --out profiles

Seeds from 1000 on, which neither the demo nor `dicache bench` draws with. A new training
of a model needs a new profile.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dicache
from dicache.demo import pipelines
from dicache.demo.profiles import PROFILE_DIR, PROFILE_STEPS

FIRST_SEED = 1000
SAMPLES = 2  # batches of the model's eight prompts


def make_profile(model: str, samples: int = SAMPLES, gains: int = 24) -> dicache.Profile:
    """The profile of a shipped model at its usual number of steps."""
    pipe, prompts = pipelines.load_pipeline(model), pipelines.default_prompts(model)
    steps = PROFILE_STEPS[model]

    def run(index: int) -> torch.Tensor:
        seed = FIRST_SEED + len(prompts) * index
        inputs = pipelines.pipeline_inputs(model, prompts, seed, steps)
        return pipelines.decode(model, pipe(**inputs))

    row = pipelines.demo_model(model)
    about = {
        "made_by": "benchmarks/train/profiles.py",
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": row.guidance_scale,
        "seeds": [FIRST_SEED, FIRST_SEED + samples * len(prompts) - 1],
    }
    return dicache.calibrate(
        pipe, run, samples, gains=gains, about=about, progress=lambda done, of: print(done, of)
    )


def main() -> None:
    """Make those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(PROFILE_STEPS), nargs="*", default=PROFILE_STEPS)
    parser.add_argument("--out", type=Path, default=PROFILE_DIR)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.model:
        with torch.inference_mode():
            make_profile(model).save(args.out / f"{model}.json")


if __name__ == "__main__":
    main()
