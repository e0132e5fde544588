"""One decision for a batch, or one a sample: how many blocks does an equally good batch take?

    python benchmarks/granularity.py         the three shipped models, batches of 8 prompts

Both ways run at thresholds from low to high. Work is block evaluations, a block counted once for
every sample that goes through it (`RunStats.block_samples`), as a share of the un-cached run's.
Quality is the PSNR in dB of the decoded pictures against the un-cached batch's, of the worst sample
of each batch, averaged over the batches. Work at equal quality is linear between two thresholds.

Writes granularity.json and granularity.md into `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from quality import RESULTS, environment, prompt_of, psnr

from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache
from dicache.demo import pipelines
from dicache.demo.runner import count_blocks

FIRST_SEED, BATCH, BATCHES, NUM_STEPS = 400, 8, 3, 30
FACTORS = (0.25, 0.4, 0.6, 0.85, 1.2, 1.7, 2.4, 3.4)  # of the model's own threshold
WORST_PSNR = (42.0, 45.0, 48.0, 51.0, 54.0, 57.0)
GRANULARITIES = ("batch", "sample")


def run_batch(pipe: Any, model: str, steps: int, seeds: Sequence[int]) -> list[np.ndarray]:
    """The decoded pictures of every seed's prompt, generated together."""
    prompts = [prompt_of(model, seed) for seed in seeds]
    output = pipe(**pipelines.pipeline_inputs(model, prompts, list(seeds), steps))
    return list(pipelines.decode(model, output).numpy())


def measure(model: str, steps: int, batches: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Work and every sample's PSNR, both ways, at every threshold; `batches` are of seeds."""
    pipe = pipelines.load_pipeline(model)
    references = [run_batch(pipe, model, steps, seeds) for seeds in batches]
    own = pipe.transformer.config["_dicache_threshold"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for granularity in GRANULARITIES:
        for factor in FACTORS:
            work, found = [], []
            for seeds, reference in zip(batches, references, strict=True):
                apply_dicache(pipe, DiCacheConfig(threshold=own * factor, granularity=granularity))
                pictures = run_batch(pipe, model, steps, seeds)
                stats = get_stats(pipe)["transformer"]
                remove_dicache(pipe)
                calls = count_blocks(pipe.transformer) * steps * len(stats.contexts)
                work.append(stats.block_samples / (calls * len(seeds)))
                found.append([psnr(a, b) for a, b in zip(pictures, reference, strict=True)])
            point = {"threshold": own * factor, "work": work, "psnr": found}
            curves.setdefault(granularity, []).append(point)
            print(f"{model} {granularity} {own * factor:.3g}: {mean(work):.3f}", flush=True)
    return {"curves": curves, "steps": steps, "seeds": [list(seeds) for seeds in batches]}


def work_at(points: list[dict[str, Any]], worst: float) -> float | None:
    """Work where the worst samples have this PSNR on average; `None` where no point is."""
    curve = [(mean(map(min, point["psnr"])), mean(point["work"])) for point in points]
    for (high, high_work), (low, low_work) in pairwise(curve):  # by rising threshold
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
    facts, batches = first["environment"], len(first["seeds"])
    steps = ", ".join(f"{model} {result['steps']}" for model, result in results.items())
    (out / "granularity.md").write_text(
        f"# One decision for a batch, or one a sample\n\n"
        f"Block evaluations as a share of the un-cached run's, one decision for the batch / one a\n"
        f"sample, where the worst sample of a batch has the PSNR above, on average over {batches}\n"
        f"batches of {len(first['seeds'][0])} prompts. Steps: {steps}.\n\n{table(results)}\n\n"
        + "\n".join(f"- {name}: {value}" for name, value in facts.items())
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the models and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=pipelines.DEMO_MODELS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    results = {}
    starts = range(FIRST_SEED, FIRST_SEED + args.batches * args.batch, args.batch)
    for model in args.model or pipelines.DEMO_MODELS:
        batches = [range(start, start + args.batch) for start in starts]
        results[model] = measure(model, args.steps, batches)
        command = f"python benchmarks/granularity.py {given}".strip()
        results[model]["environment"] = environment(command)
        write(results, args.out)
    print(table(results))


if __name__ == "__main__":
    main()
