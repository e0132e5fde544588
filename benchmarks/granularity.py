"""One decision for a batch, or one a sample: how many blocks does an equally good batch take?

    python benchmarks/granularity.py         the three shipped models, batches of 8 prompts

Both ways run at thresholds from low to high. Work is block evaluations, a block counted once for
every sample that goes through it (`RunStats.block_samples`), as a share of the un-cached run's.
Quality is the PSNR in dB of the decoded pictures against the un-cached batch's, of the worst sample
of each batch, averaged over the batches, and of all.

Writes granularity.json and granularity.md into `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
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


def table(model: str, curves: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: work and quality at every threshold."""
    lines = [
        f"| {model}: threshold | one for the batch: work, worst, mean | one a sample |",
        "|---|---|---|",
    ]
    for points in zip(*(curves[granularity] for granularity in GRANULARITIES), strict=True):
        cells = []
        for point in points:
            worst, average = mean(map(min, point["psnr"])), mean(map(mean, point["psnr"]))
            cells.append(f"{mean(point['work']):.3f}, {worst:.1f} dB, {average:.1f} dB")
        lines.append(f"| {points[0]['threshold']:.3g} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def write(results: dict[str, Any], out: Path) -> None:
    """granularity.json and granularity.md."""
    (out / "granularity.json").write_text(json.dumps(results, indent=1) + "\n")
    first = next(iter(results.values()))
    facts, batches = first["environment"], len(first["seeds"])
    prompts, steps = len(first["seeds"][0]), first["steps"]
    tables = "\n\n".join(table(model, result["curves"]) for model, result in results.items())
    (out / "granularity.md").write_text(
        f"# One decision for a batch, or one a sample\n\n"
        f"Work: block evaluations as a share of the un-cached run's. PSNR against the un-cached\n"
        f"pictures: the worst sample of a batch, averaged over {batches} batches of "
        f"{prompts} prompts,\n"
        f"and the mean of all. {steps} steps.\n\n{tables}\n\n"
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


if __name__ == "__main__":
    main()
