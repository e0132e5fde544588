"""How well are targets met? Shipped models on their shipped profiles, against un-cached pictures.

    python benchmarks/targets.py --model flux --samples 16 --out benchmarks/results

One sample at a time, random prompts and seeds from 7000, which no profile was made with. A row a
target: expected and found block work and PSNR; the latter of the mean squared error, which is what
is expected, and of single samples. Prints them and, with --out, writes targets_MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tasks
import torch

from dicache import DiCacheConfig, RunStats, apply_dicache, get_stats, remove_dicache
from dicache.demo import pipelines, shapes
from dicache.demo.profiles import PROFILE_STEPS, shipped_profile
from dicache.profiling import expect

FIRST_SEED = 7000
TARGETS = [{"target_psnr": dB} for dB in (35, 40, 45, 50, 55)]
TARGETS += [{"target_speedup": times} for times in (1.5, 2, 2.5, 3, 4)]


def measure(model: str, samples: int, targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a target."""
    pipe, profile = pipelines.load_pipeline(model), shipped_profile(model)
    kind = pipelines.demo_model(model).kind

    def draw(seed: int) -> torch.Tensor:
        prompt = shapes.random_prompts(kind, 1, torch.Generator().manual_seed(seed))[0]
        inputs = pipelines.pipeline_inputs(model, prompt, seed, PROFILE_STEPS[model])
        return pipelines.decode(model, pipe(**inputs))

    seeds = range(FIRST_SEED, FIRST_SEED + samples)
    plain = [draw(seed) for seed in seeds]
    rows = []
    for target in targets:
        config = DiCacheConfig(profile=profile, **target)
        expected = expect(profile, config)
        apply_dicache(pipe, config)
        squares, stats = [], []
        for seed, picture in zip(seeds, plain, strict=True):
            squares.append(float((draw(seed) - picture).square().mean()))
            stats.append(get_stats(pipe)["transformer"])
        remove_dicache(pipe)
        each = [_psnr(square) for square in squares]
        rows.append(
            {
                "target": target,
                "computed": expected.computed,
                "speedup": (expected.speedup, _mean_speedup(stats)),
                "expected_psnr": expected.psnr,
                "psnr_of_mean_error": _psnr(sum(squares) / samples),
                "mean_psnr": sum(each) / samples,
                "worst_psnr": min(each),
                "reached": sum(psnr >= expected.psnr for psnr in each),
                "vetoes": sum(each.num_vetoes for each in stats),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _psnr(square: float) -> float:
    """Of pictures in [0, 1], in dB, capped at 100."""
    return 10 * math.log10(1 / max(square, 1e-10))


def _mean_speedup(stats: Sequence[RunStats]) -> float:
    return sum(each.block_speedup or math.nan for each in stats) / len(stats)


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(PROFILE_STEPS), default="flux")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = measure(args.model, args.samples, TARGETS)
    if args.out is not None:
        about = tasks.known_facts(torch.device("cpu"))
        about |= {"steps": PROFILE_STEPS[args.model], "samples": args.samples}
        stored = json.dumps({"about": about, "rows": rows}, indent=1)
        (args.out / f"targets_{args.model}.json").write_text(stored + "\n")


if __name__ == "__main__":
    main()
