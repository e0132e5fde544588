"""Host time of a skipped step, with dicache, with FirstBlockCache, and of its probe block alone.

    make bench                      or: pytest benchmarks/bench_host.py --benchmark-only

The models of `skipped_step.py`, which says where the time goes and lets the models take turns: to
compare caches, ask it. This one is quick, and `make bench` keeps its figures, to be set against
those of another revision with `pytest-benchmark compare`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import skipped_step
import torch

from dicache import get_stats

ROUNDS = 300


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(group="host time of a skipped step")
@pytest.mark.parametrize(
    "model", [skipped_step.PROBE_ALONE, skipped_step.FIRST_BLOCK, skipped_step.DICACHE]
)
def test_skipped_step(model: str, benchmark: Any) -> None:
    """The steps of one long run but for the first ones, of which one computes."""
    transformer = skipped_step.make_models(skipped_step.TimeStamps())[model]
    inputs, steps = skipped_step.make_inputs(), itertools.count()

    def next_timestep() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        return (torch.tensor([1.0 - next(steps) / 1000]),), {}

    def step(timestep: torch.Tensor) -> None:
        with transformer.cache_context("cond"):
            transformer(timestep=timestep, **inputs)

    benchmark.pedantic(step, setup=next_timestep, rounds=ROUNDS, warmup_rounds=skipped_step.WARM_UP)
    if model == skipped_step.DICACHE:
        assert get_stats(transformer).num_reused == next(steps) - 1
