"""Run a pipeline with and without DiCache and Sparse VideoGen, timed, and gather what it did.

Knows no particular model: `dicache demo` calls it on the shipped ones, `dicache generate` on any
pipeline. All runs of a sample get the same arguments and the same seed, so that every difference
between their pictures comes from what was applied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dicache import (
    DiCacheConfig,
    RunStats,
    SparseVideoGenConfig,
    SparseVideoGenStats,
    apply_dicache,
    apply_sparse_videogen,
    get_sparse_videogen_stats,
    remove_dicache,
    remove_sparse_videogen,
)
from dicache.adapters.diffusers.attach import sessions
from dicache.driver.families import find_family
from dicache.error_rules import ERROR_RULES
from dicache.likeness import Quality, quality
from dicache.schedule_plot import PlotRow

Inputs = Callable[[], dict[str, Any]]
Decode = Callable[[Any], Tensor]


@dataclass(frozen=True)
class CacheReport:
    """What the cache of one transformer did in one run.

    Attributes:
        config: The rules, with the threshold that was really used.
        stats: The run's statistics.
        num_blocks: Number of the transformer's blocks.
    """

    config: DiCacheConfig
    stats: RunStats
    num_blocks: int

    @property
    def block_calls_uncached(self) -> int:
        """Block evaluations of the same run without a cache: blocks x steps of every context."""
        calls = sum(len({record.step for record in c}) for c in self.stats.contexts.values())
        return self.num_blocks * calls


@dataclass(frozen=True)
class Run:
    """One call of a pipeline.

    Attributes:
        pictures: [3, H, W] image or [F, 3, H, W] video in [0, 1], float32 on the CPU.
        seconds: Wall-clock time of the whole call, text encoder and VAE included.
        caches: Per transformer of the pipeline; empty without a cache.
        sparse: What the attention did, the same; empty without Sparse VideoGen.
    """

    pictures: Tensor
    seconds: float
    caches: dict[str, CacheReport] = field(default_factory=dict)
    sparse: dict[str, SparseVideoGenStats] = field(default_factory=dict)

    def plot_rows(self) -> list[PlotRow]:
        """Its contexts, for the schedule plot."""
        rows = []
        for transformer, report in self.caches.items():
            config = report.config
            threshold = config.threshold if config.schedule is None else None
            text = ERROR_RULES[config.error].text
            for context, records in report.stats.contexts.items():
                name = context if len(self.caches) == 1 else f"{transformer}, {context}"
                rows.append(PlotRow(name, records, threshold, text))
        return rows


@dataclass(frozen=True)
class Sample:
    """One prompt and seed, drawn with the cache and, where compared, also without it."""

    prompt: str
    seed: int
    cached: Run
    uncached: Run | None = None

    @property
    def quality(self) -> Quality | None:
        """Likeness of the two pictures; None without an un-cached run."""
        if self.uncached is None:
            return None
        return quality(self.cached.pictures, self.uncached.pictures)


def run_uncached(pipe: Any, inputs: Inputs, decode: Decode) -> Run:
    """Call a pipeline that has no cache.

    Args:
        pipe: A diffusers pipeline.
        inputs: Makes the call's arguments, anew for every call: a generator is used up by one.
        decode: Turns the pipeline's result for one sample into `Run.pictures`; not timed.
    """
    output, seconds = _timed_call(pipe, inputs())
    return Run(decode(output), seconds)


def run_cached(
    pipe: Any, inputs: Inputs, decode: Decode, config: DiCacheConfig | None = None
) -> Run:
    """Apply DiCache to a pipeline, call it, and take the cache off again, come what may.

    Raises:
        ValueError: DiCache cannot be applied to this pipeline with this configuration.
    """
    apply_dicache(pipe, config)
    try:
        output, seconds = _timed_call(pipe, inputs())
        return Run(decode(output), seconds, _cache_reports(pipe))
    finally:
        remove_dicache(pipe)


def run_sparse(pipe: Any, config: SparseVideoGenConfig, run: Callable[[], Run]) -> Run:
    """Apply Sparse VideoGen to a pipeline, do a run of it, and take it off again, come what may.

    Raises:
        ValueError: Sparse VideoGen cannot be applied to this pipeline with this configuration.
    """
    apply_sparse_videogen(pipe, replace(config, stats=True))
    try:
        done = run()
        stats = get_sparse_videogen_stats(pipe)
        assert isinstance(stats, dict)  # a pipeline's
        return replace(done, sparse=stats)
    finally:
        remove_sparse_videogen(pipe)


def _timed_call(pipe: Any, arguments: dict[str, Any]) -> tuple[Any, float]:
    device = getattr(pipe, "device", torch.device("cpu"))
    start = time.perf_counter()
    output = pipe(**arguments)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return output, time.perf_counter() - start


def _cache_reports(pipe: Any) -> dict[str, CacheReport]:
    reports = {}
    for name, session in sessions(pipe).items():
        blocks = count_blocks(pipe.components[name])
        reports[name] = CacheReport(session.config, session.stats, blocks)
    return reports


def count_blocks(transformer: Any) -> int:
    """Number of blocks of a supported transformer, compiled or not."""
    from diffusers.utils.torch_utils import unwrap_module

    module = unwrap_module(transformer)
    family = find_family(module)
    assert family is not None  # it carries a cache
    return len(family.blocks(module))
