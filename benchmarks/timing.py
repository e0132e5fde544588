"""How the operator benchmarks measure: device time, host time, and the number of launches.

Calls rotate over several sets of tensors, so that no call finds its data in a cache. On a GPU a
sample is one replay of a CUDA graph that holds many calls, between two events: neither Python nor
the launch queue is in it. On a CPU a sample is a loop of calls. Host time is that of plain launches
which nothing waits for.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import workloads
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Case, Size

Call = Callable[[], Any]

_SAMPLE_SECONDS = {"cuda": 4e-3, "cpu": 2e-2}
_MAX_CALLS = 512  # in one graph
_HOST_CALLS = 200
_QUEUE = 600  # fewer than the launches that a GPU's queue takes before it blocks the host
# Waits, which the profiler may put beside the device's own work.
_HOST_ACTIVITIES = {"Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event"}
_FEWEST_SAMPLES, _MOST_SAMPLES = 3, 25


def seconds_per_call(calls: Sequence[Call], device: torch.device, seconds: float) -> float:
    """What the samples that fit into `seconds` say.

    The median on a GPU; on a CPU, whose cores other programs take away, the fastest sample.
    """
    turns = itertools.cycle(calls)
    # Compiles, loads modules, takes memory; a graph must find all of that done.
    _loop(turns, len(calls), device)
    each = _loop(turns, min(len(calls), 2), device)
    count = max(1, min(_MAX_CALLS, math.ceil(_SAMPLE_SECONDS[device.type] / each)))
    fitting = int(seconds / (each * count))
    num_samples = max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, fitting))
    if device.type != "cuda":
        return min(_loop(turns, count, device) for _ in range(num_samples))
    count = len(calls) * math.ceil(count / len(calls))
    replay = _capture(itertools.islice(turns, count)).replay
    replay()  # the first one uploads the graph
    samples = [call_seconds(replay, device, 1)[0] / count for _ in range(num_samples)]
    return statistics.median(samples)


def _loop(turns: Iterator[Call], count: int, device: torch.device) -> float:
    """Seconds a call."""
    chosen = list(itertools.islice(turns, count))
    synchronize(device)
    start = time.perf_counter()
    for call in chosen:
        call()
    synchronize(device)
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


def call_seconds(call: Call, device: torch.device, count: int) -> list[float]:
    """Each of `count` calls that queue up behind one another: for calls of milliseconds and more.

    Between events on a GPU, by the clock on a CPU. Whoever calls warms up.
    """
    synchronize(device)
    marks = [mark(device)]
    for _ in range(count):
        call()
        marks.append(mark(device))
    synchronize(device)
    return [seconds_between(begin, end) for begin, end in itertools.pairwise(marks)]


def mark(device: torch.device) -> Any:
    """A point in the device's work: an event in its queue, or a CPU's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """From one mark to another; the device has to be through with both."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


class PeakBytes:
    """Most memory that is allocated at once from now on, above what is there; none on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def read(self) -> int | None:
        """Bytes, after the device has finished."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def host_seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Time until a call on a GPU returns to Python, its work still ahead; median of ten loops."""
    calls[0]()
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


def rotating_copies(size: Size, device: torch.device) -> list[Call]:
    """`copy_` on as many pairs of tensors as it takes to leave the cache."""
    sets = range(workloads.num_sets(2 * size.tensor_bytes(), device))
    calls = [workloads.bind_copy(workloads.make_copy_tensors(size, device, i)) for i in sets]
    for call in calls:
        call()  # every page of the targets exists
    return calls


def copy_rate(size: Size, device: torch.device, seconds: float = 0.5) -> float:
    """GB/s of torch's `copy_` at a tensor size, bytes read plus bytes written."""
    num_bytes = 2 * size.tensor_bytes()
    return num_bytes / seconds_per_call(rotating_copies(size, device), device, seconds) / 1e9


# --- Launches ------------------------------------------------------------------------------------


def count_launches(call: Call, device: torch.device) -> int:
    """Kernels, copies and fills that one call runs on a GPU; operators dispatched on a CPU.

    Whoever calls warms up.
    """
    return len(device_events(call) if device.type == "cuda" else dispatched(call))


def device_events(call: Call) -> list[str]:
    """Names of what one call runs on the GPU, as torch.profiler sees it. Whoever calls warms up."""
    _warm_profiler()
    return [
        event.name
        for event in _profiled(call).events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and event.name not in _HOST_ACTIVITIES
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
