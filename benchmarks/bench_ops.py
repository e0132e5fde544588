"""Operator microbenchmarks: every backend that runs here, the baselines, and a copy.

    make bench                      or: pytest benchmarks/bench_ops.py --benchmark-only
    pytest benchmarks/bench_ops.py --benchmark-only -k "flux and skipped_step"

pytest-benchmark times them, each call until the device is through with it: on a GPU the launch and
the wait are in it, and `gpu.py` tells the device's own time. Every case is first compared with the
reference, and a wrong one gets no time. A group of the table is an operation at one size; rates, by
the fastest round, are in the JSON. The baselines are the reference, the reference under
torch.compile, and the published scripts' sequence of eager operations for a whole skipped step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import agreement
import pytest
import timing
import torch
import workloads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parameters() -> list[tuple[str, str, str]]:
    """Size, operation and implementation of all cases that are timed on this device."""
    return [
        (case.size.name, case.operation.name, case.implementation)
        for case in workloads.cases(DEVICE, list(workloads.SIZES.values()))
        if DEVICE.type == "cuda" or not case.is_slow_on_cpu
    ]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """No autograd; memory goes back before the next case takes its own."""
    with torch.no_grad():
        yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("size", "operation", "implementation"), parameters())
def test_operator(size: str, operation: str, implementation: str, benchmark: Any) -> None:
    """One call, on sets of tensors that take turns so that none is found in a cache."""
    case = workloads.Case(workloads.OPERATIONS[operation], implementation, workloads.SIZES[size])
    calls = timing.rotating_calls(case, DEVICE, agreement.check_case(case, DEVICE))
    benchmark.group = f"{size}: {operation}"
    time_calls(benchmark, calls, case.num_bytes)


@pytest.mark.parametrize("size", workloads.SIZES)
def test_copy(size: str, benchmark: Any) -> None:
    """`torch.Tensor.copy_` of one tensor, whose rate is what an operator can reach."""
    num_bytes = 2 * workloads.SIZES[size].tensor_bytes()
    benchmark.group = f"{size}: copy"
    time_calls(benchmark, timing.rotating_copies(workloads.SIZES[size], DEVICE), num_bytes)


def time_calls(benchmark: Any, calls: Sequence[timing.Call], num_bytes: int) -> None:
    """Time them in turns; a call moves `num_bytes`. Rates are in GB/s, 1e9 bytes a second."""
    turns = itertools.cycle(calls)

    def call() -> None:
        next(turns)()
        timing.synchronize(DEVICE)

    benchmark(call)
    if benchmark.stats is not None:  # --benchmark-disable
        rate = num_bytes / benchmark.stats.stats.min / 1e9
        benchmark.extra_info.update(num_bytes=num_bytes, gb_per_s=rate, sets=len(calls))
