"""How the operator benchmarks measure: device time, host time, and the number of launches.

Calls rotate over several sets of tensors, so that no call finds its data in a cache. On a GPU a
sample is one replay of a CUDA graph that holds many calls, between two events: neither Python nor
the launch queue is in it. On a CPU a sample is a loop of calls. Host time is that of plain launches
which nothing waits for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import workloads
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Case, Size

Call = Callable[[], Any]

_SAMPLE_SECONDS = {"cuda": 4e-3, "cpu": 2e-2}
_LONG_CALL_SECONDS = 1.0  # not called once more to know how long it takes
_MAX_CALLS = 512  # in one graph
_HOST_CALLS = 200
_QUEUE = 600  # fewer than the launches that a GPU's queue takes before it blocks the host
_FEWEST_SAMPLES, _MOST_SAMPLES = 3, 25


class Sampler:
    """Seconds per call, one sample at a time; `num_samples` of them fit into `seconds`."""

    def __init__(self, calls: Sequence[Call], device: torch.device, seconds: float = 1.0) -> None:
        self.device = device
        self._calls = itertools.cycle(calls)
        # Compiles, loads modules, takes memory; a graph must find all of that done.
        each = self._loop(len(calls) if device.type == "cuda" else 1)
        if each < _LONG_CALL_SECONDS:
            each = self._loop(min(len(calls), 2))
        target = _SAMPLE_SECONDS[device.type]
        self._count = max(1, min(_MAX_CALLS, math.ceil(target / each)))
        if device.type == "cuda":
            self._count = len(calls) * math.ceil(self._count / len(calls))
            self._graph = _capture(itertools.islice(self._calls, self._count))
            self()  # the first replay uploads the graph
        fitting = int(seconds / (each * self._count))
        self.num_samples = max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, fitting))

    def __call__(self) -> float:
        """One sample."""
        if self.device.type != "cuda":
            return self._loop(self._count)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._count

    def _loop(self, count: int) -> float:
        chosen = list(itertools.islice(self._calls, count))
        synchronize(self.device)
        start = time.perf_counter()
        for call in chosen:
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) / count


def _capture(calls: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is one to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(calls: Sequence[Call], device: torch.device, seconds: float) -> float:
    """What the samples that fit into `seconds` say."""
    sampler = Sampler(calls, device, seconds)
    return settle([sampler() for _ in range(sampler.num_samples)], device)


def settle(samples: Sequence[float], device: torch.device) -> float:
    """The median on a GPU; on a CPU, whose cores other programs take away, the fastest sample."""
    return statistics.median(samples) if device.type == "cuda" else min(samples)


def call_seconds(call: Call, device: torch.device, count: int) -> list[float]:
    """Each of `count` calls that queue up behind one another: for calls of milliseconds and more.

    Between events on a GPU, by the clock on a CPU. Whoever calls warms up.
    """
    synchronize(device)
    marks = [_mark(device)]
    for _ in range(count):
        call()
        marks.append(_mark(device))
    synchronize(device)
    if device.type == "cuda":
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    return [b - a for a, b in itertools.pairwise(marks)]


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most memory that a call allocates at once, above what was there; `None` on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def host_seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Time until a call on a GPU returns to Python, its work still ahead; median of ten loops."""
    launches = count_launches(calls[0], device)
    count = max(1, min(_HOST_CALLS, _QUEUE // max(launches, 1)))
    samples = []
    for _ in range(10):
        chosen = list(itertools.islice(itertools.cycle(calls), count))
        synchronize(device)
        start = time.perf_counter()
        for call in chosen:
            call()
        samples.append((time.perf_counter() - start) / count)
        synchronize(device)
    return statistics.median(samples)


def rotating_calls(
    case: Case, device: torch.device, made: Sequence[dict[str, torch.Tensor]] = ()
) -> list[Call]:
    """The case on as many sets of tensors as it takes to leave the cache; `made` are there."""
    missing = range(len(made), workloads.num_sets(case.num_bytes, device))
    sets = [*made, *(workloads.make_tensors(case, device, index) for index in missing)]
    return [workloads.bind(case, tensors) for tensors in sets]


def copy_rate(size: Size, device: torch.device, seconds: float = 0.5) -> float:
    """GB/s of torch's `copy_` at a tensor size, bytes read plus bytes written."""
    num_bytes = 2 * size.tensor_bytes()
    sets = range(workloads.num_sets(num_bytes, device))
    calls = [workloads.bind_copy(workloads.make_copy_tensors(size, device, i)) for i in sets]
    for call in calls:
        call()  # every page of the targets exists
    return num_bytes / seconds_per_call(calls, device, seconds) / 1e9


# --- Launches ------------------------------------------------------------------------------------


def case_launches(case: Case, device: torch.device, call: Call) -> int | None:
    """Launches of a call of this case.

    `None` where they cannot be counted: dispatch modes do not see into compiled code. On a CPU they
    are counted at the small size, which dispatches the same operators in less time.
    """
    if device.type == "cuda":
        return count_launches(call, device)
    if case.implementation == "torch.compile":
        return None
    small = dataclasses.replace(case, size=workloads.SMALL)
    return count_launches(workloads.bind(small, workloads.make_tensors(small, device)), device)


def count_launches(call: Call, device: torch.device) -> int:
    """Kernels, copies and fills that one call runs on a GPU; operators dispatched on a CPU."""
    return len(device_events(call) if device.type == "cuda" else dispatched(call))


def device_events(call: Call) -> list[str]:
    """Names of what one call runs on the GPU, as torch.profiler sees it."""
    call()
    _warm_profiler()
    profile = _profiled(call)
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]


@functools.cache
def _warm_profiler() -> None:
    _profiled(lambda: torch.ones(1, device="cuda"))  # a process's first profile may miss events


def _profiled(call: Call) -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return profile


def dispatched(call: Call) -> list[str]:
    """Operators that one call dispatches: neither views nor allocations, which do no work."""
    with _DispatchCounter() as counter:
        call()
    return counter.names


class _DispatchCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not func.is_view and "empty" not in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
