"""One decision for a batch, or one a sample: how many blocks does an equally good batch take?

    python benchmarks/granularity.py                the three shipped models, 8 prompts in one batch

Both ways run at thresholds from low to high. Work is block evaluations, a block counted once for
every sample that goes through it (`RunStats.block_samples`), as a share of the un-cached run's.
Quality is the PSNR in dB of each sample's decoded pictures against the un-cached batch; a batch is
as good as its worst sample. Work at equal quality is linear between the two points around it.

Writes granularity.json and granularity.md into `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import RESULTS, STEPS, environment, prompt_of, psnr

from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache
from dicache.demo import pipelines
from dicache.demo.runner import count_blocks

FIRST_SEED, BATCH = 400, 8
FACTORS = (0.25, 0.4, 0.6, 0.85, 1.2, 1.7, 2.4, 3.4)  # of the model's own threshold
WORST_PSNR = (30.0, 35.0, 40.0, 45.0, 50.0)
GRANULARITIES = ("batch", "sample")


def run_batch(pipe: Any, model: str, steps: int, seeds: Sequence[int]) -> list[np.ndarray]:
    """The decoded pictures of every seed's prompt, generated together."""
    prompts = [prompt_of(model, seed) for seed in seeds]
    output = pipe(**pipelines.pipeline_inputs(model, prompts, list(seeds), steps))
    return list(pipelines.decode(model, output).numpy())


def measure(model: str, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Work and every sample's PSNR, both ways, at every threshold."""
    pipe = pipelines.load_pipeline(model)
    reference = run_batch(pipe, model, steps, seeds)
    own = pipe.transformer.config["_dicache_threshold"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for granularity in GRANULARITIES:
        for factor in FACTORS:
            apply_dicache(pipe, DiCacheConfig(threshold=own * factor, granularity=granularity))
            pictures = run_batch(pipe, model, steps, seeds)
            stats = get_stats(pipe)["transformer"]
            remove_dicache(pipe)
            uncached = count_blocks(pipe.transformer) * len(seeds) * steps * len(stats.contexts)
            point = {
                "threshold": own * factor,
                "work": stats.block_samples / uncached,
                "psnr": [psnr(a, b) for a, b in zip(pictures, reference, strict=True)],
            }
            curves.setdefault(granularity, []).append(point)
            print(f"{model} {granularity} {own * factor:.3g}: {point['work']:.3f}", flush=True)
    return {"curves": curves, "steps": steps, "seeds": list(seeds)}


def work_at(points: list[dict[str, Any]], worst: float) -> float | None:
    """Work of a batch whose worst sample has this PSNR; `None` where no point is."""
    curve = sorted((min(point["psnr"]), point["work"]) for point in points)
    for (low, low_work), (high, high_work) in pairwise(curve):
        if low <= worst <= high and high > low:
            return low_work + (worst - low) / (high - low) * (high_work - low_work)
    return None


def table(results: dict[str, Any]) -> str:
    """Markdown: work at equal quality of the worst sample."""
    head = "| model | " + " | ".join(f"{worst:.0f} dB" for worst in WORST_PSNR) + " |"
    lines = [head, "|---|" + "--:|" * len(WORST_PSNR)]
    for model, result in results.items():
        cells = []
        for worst in WORST_PSNR:
            batch, sample = (work_at(result["curves"][g], worst) for g in GRANULARITIES)
            cells.append("-" if None in (batch, sample) else f"{batch:.3f} / {sample:.3f}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(results: dict[str, Any], out: Path) -> None:
    """granularity.json and granularity.md."""
    (out / "granularity.json").write_text(json.dumps(results, indent=1) + "\n")
    first = next(iter(results.values()))
    facts, batch = first["environment"], len(first["seeds"])
    steps = ", ".join(f"{model} {result['steps']}" for model, result in results.items())
    (out / "granularity.md").write_text(
        f"# One decision for a batch, or one a sample\n\n"
        f"Block evaluations as a share of the un-cached run's, one decision for the batch / one a\n"
        f"sample, where the batch's worst sample has the PSNR above. {batch} prompts in one batch, "
        f"steps: {steps}.\n\n{table(results)}\n\n"
        + "\n".join(f"- {name}: {value}" for name, value in facts.items())
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the models and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=pipelines.DEMO_MODELS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, help="denoising steps (default: 30, video 50)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    results = {}
    seeds = range(FIRST_SEED, FIRST_SEED + args.batch)
    for model in args.model or pipelines.DEMO_MODELS:
        results[model] = measure(model, args.steps or STEPS[model], seeds)
        command = f"python benchmarks/granularity.py {given}".strip()
        results[model]["environment"] = environment(command)
        write(results, args.out)
    print(table(results))


if __name__ == "__main__":
    main()
