"""Operator microbenchmarks: every backend that runs here, against three baselines and a copy.

    make bench                       or: pytest benchmarks/bench_ops.py --benchmark-only
    DICACHE_BENCH=all make bench     the slow cases of a CPU too

The baselines are the reference, the reference under torch.compile, and the published scripts'
sequence of eager operations for a whole skipped step. Every case is first compared with the
reference, and a wrong one gets no time. Runs on the GPU if there is one. On a CPU the default run
leaves out what takes minutes: torch.compile at the Wan size, and everything but `cpp` at the
HunyuanVideo size; a line says so after the run.

Tables go to the end of the output and to `.benchmarks/bench_ops.md` and `.json` (conftest.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import agreement
import pytest
import rows
import timing
import torch
import workloads
from workloads import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERYTHING = os.environ.get("DICACHE_BENCH") == "all" or DEVICE.type == "cuda"
SLOW_ON_CPU = {
    "wan": ("torch.compile",),
    "hunyuan-video": ("reference", "published", "torch.compile"),
}


class Clock:
    """A clock that stands still but for the samples that are fed to it.

    pytest-benchmark reads it as its timer, so that its statistics are those of our samples, which
    on a GPU come from events around a graph replay.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """Seconds."""
        return self.now

    def advance(self, sampler: Callable[[], float]) -> None:
        """Take one sample."""
        self.now += sampler()


CLOCK = Clock()


def all_cases() -> list[Case]:
    """What this run measures, size by size."""
    return [
        case
        for case in workloads.cases(DEVICE, list(workloads.SIZES.values()))
        if EVERYTHING or case.implementation not in SLOW_ON_CPU.get(case.size.name, ())
    ]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """No autograd; memory goes back before the next case takes its own."""
    with torch.no_grad():
        yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def copy_rate() -> Callable[[workloads.Size], float]:
    """GB/s of torch's `copy_` at a tensor size, read plus written; measured once per size."""
    rates: dict[str, float] = {}

    def rate(size: workloads.Size) -> float:
        if size.name not in rates:
            rates[size.name] = timing.copy_rate(size, DEVICE)
        return rates[size.name]

    return rate


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_time(case: Case, benchmark: Any, copy_rate: Callable[[workloads.Size], float]) -> None:
    """Time of one call, in device time on a GPU."""
    reached = copy_rate(case.size)
    calls = timing.rotating_calls(case, DEVICE, agreement.check_case(case, DEVICE))
    sampler = timing.Sampler(calls, DEVICE)
    benchmark.group = f"{case.size.name}: {case.operation.name}"
    benchmark.pedantic(CLOCK.advance, args=(sampler,), rounds=sampler.num_samples)
    if benchmark.stats is None:  # --benchmark-disable
        return
    launches = timing.case_launches(case, DEVICE, calls[0])
    seconds = timing.settle(benchmark.stats.stats.data, DEVICE)
    row = rows.make_row(case, seconds, reached, launches, len(calls), rows.device_name(DEVICE))
    benchmark.extra_info.update(row, kind="time", versions=rows.versions())


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.skipif(DEVICE.type != "cuda", reason="a call on a CPU returns when its work is done")
@pytest.mark.parametrize(
    "case",
    [case for case in all_cases() if case.size is workloads.SMALL],
    ids=lambda case: case.name,
)
def test_host_time(case: Case, benchmark: Any) -> None:
    """Time until a launch returns, at the small size."""
    calls = timing.rotating_calls(case, DEVICE)
    calls[0]()
    benchmark.group = f"host: {case.operation.name}"
    benchmark.pedantic(CLOCK.advance, args=(lambda: timing.host_seconds(calls, DEVICE),), rounds=3)
    if benchmark.stats is None:
        return
    benchmark.extra_info.update(
        kind="host",
        operation=case.operation.name,
        implementation=case.implementation,
        microseconds=benchmark.stats.stats.median * 1e6,
        device=rows.device_name(DEVICE),
        versions=rows.versions(),
    )
