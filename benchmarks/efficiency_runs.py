"""One pipeline call, timed step by step from outside of every cache, and what a step launches.

On a GPU the times are CUDA events, recorded around each call of the transformer and at the end of
each step, and read after the run: nothing waits during it. On a CPU they are the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import efficiency_models
import timing
import torch
from efficiency_caches import Applied, Cache, family_of, uncached
from efficiency_models import Model

from dicache.bench.counter import BlockCounter

# The first steps of a run allocate the cache and find the device cold; medians leave them out.
WARM_UP_STEPS = 2
SHORT_MASK = "CCCRRCRRCRRCRC"  # behind the warm-up five computed steps and seven skipped ones
COST_MASK = "CCRRR"
_HOST_ACTIVITIES = {"Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event"}

Interval = tuple[float, float]


def make_mask(steps: int, share: float = 0.6, head: int | None = None) -> str:
    """A mask that skips this share of the steps.

    The first `head` steps and the last one are computed; the skipped ones are spread evenly over
    what is between. A `head` of `None` is the first tenth, two at least.
    """
    head = max(2, steps // 10) if head is None else head
    middle = steps - head - 1
    skipped = min(round(share * steps), middle)
    marks = [(index + 1) * skipped // middle - index * skipped // middle for index in range(middle)]
    return "C" * head + "".join("CR"[mark] for mark in marks) + "C"


@dataclass(frozen=True)
class Run:
    """What one call of the pipeline showed.

    Attributes:
        mask: One letter a step, C or R.
        step_ms: From the end of a step to the end of the next one: transformer, guidance, scheduler
            and the pipeline's own work. The first step begins with its transformer call.
        call_ms: Of every step, the calls of the transformer alone.
        loop_ms: Wall time from the first transformer call until the device has finished the last
            step.
        blocks: Of every step, the blocks that each call of the transformer ran.
        peak_bytes: Most memory allocated at once, above what was there before; `None` on a CPU.
        held: `Applied.held` after the run.
    """

    mask: str
    step_ms: list[float]
    call_ms: list[float]
    loop_ms: float
    blocks: list[list[int]]
    peak_bytes: int | None
    held: Mapping[str, Any]

    def median_ms(self, letter: str) -> float:
        """Of the steps with this letter, the warm-up left out."""
        return statistics.median(self.of_kind(letter, self.step_ms))

    def median_call_ms(self, letter: str) -> float:
        """The same for the calls of the transformer alone."""
        return statistics.median(self.of_kind(letter, self.call_ms))

    def of_kind(self, letter: str, values: Sequence[float]) -> list[float]:
        """The values of the steps with this letter, the warm-up left out."""
        pairs = list(zip(self.mask, values, strict=True))[WARM_UP_STEPS:]
        return [value for kind, value in pairs if kind == letter]

    def deviation(self, num_blocks: int, num_lists: int) -> str | None:
        """How the run deviates from its mask, or `None` if it does not.

        A computed step runs all blocks, a skipped one at most one of each list of blocks.
        """
        for step, (letter, counts) in enumerate(zip(self.mask, self.blocks, strict=True)):
            for count in counts:
                if letter == "C" and count != num_blocks:
                    return f"step {step} should compute, and ran {count} of {num_blocks} blocks"
                if letter == "R" and count > num_lists:
                    return f"step {step} should be skipped, and ran {count} of {num_blocks} blocks"
        return None


class Bench:
    """A model on a device, ready to run with any cache and mask."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device = model, device
        self.pipe = efficiency_models.build(model, device, dtype)
        self.arguments = efficiency_models.arguments(model, device, dtype)
        self.transformer = self.pipe.transformer
        self.family = family_of(self.transformer)
        self.counter: BlockCounter | None = BlockCounter(self.transformer)

    @property
    def num_blocks(self) -> int:
        """Of the transformer as it is now; see `efficiency_caches.shortened`."""
        return len(self.family.blocks(self.transformer))

    def deviation(self, run: Run) -> str | None:
        """How a run of the transformer as it is now deviates from its mask, if it does."""
        return run.deviation(self.num_blocks, len(self.family.stacks))

    def stop_counting(self) -> None:
        """Leave the blocks as they are made, for torch.compile."""
        if self.counter is not None:
            self.counter.remove()
        self.counter = None

    def run(
        self, mask: str, cache: Cache = uncached, boundary: Callable[[], None] = lambda: None
    ) -> Run:
        """One call of the pipeline; `boundary` is called before the first step and after each."""
        with cache(self.pipe, mask) as applied:
            recorder = _Recorder(self, mask, applied, boundary)
            before = self._reset_peak()
            with recorder.listening():
                self.pipe(
                    **self.arguments,
                    num_inference_steps=len(mask),
                    callback_on_step_end=recorder.end_step,
                )
            return recorder.result(self._peak_above(before))

    def _reset_peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak_above(self, before: int) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - before


class _Recorder:
    """Listens to one run: `cache_context`, which a pipeline opens around calls, and step ends."""

    def __init__(
        self, bench: Bench, mask: str, applied: Applied, boundary: Callable[[], None]
    ) -> None:
        self._bench, self._mask, self._applied, self._boundary = bench, mask, applied, boundary
        self._open = bench.transformer.cache_context
        self._calls: list[list[tuple[Any, Any]]] = [[]]  # of every step (begin, end)
        self._ends: list[Any] = []
        self._blocks: list[list[int]] = [[]]
        self._began = self._ended = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the pipeline runs."""
        self._bench.transformer.cache_context = self._cache_context
        try:
            yield
        finally:
            del self._bench.transformer.cache_context

    @contextmanager
    def _cache_context(self, name: str, **given: Any) -> Iterator[None]:
        step = len(self._ends)
        position = self._applied.force(step, name)
        if step == 0 and not self._calls[0]:
            timing.synchronize(self._bench.device)
            self._boundary()
            self._began = time.perf_counter()
        if self._bench.counter is not None:
            self._bench.counter.take()
        begin = self._mark()
        with self._open(name, **position | given):
            yield
        self._calls[-1].append((begin, self._mark()))
        if self._bench.counter is not None:
            self._blocks[-1].append(sum(self._bench.counter.take()))

    def end_step(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        """The pipeline's callback."""
        self._ends.append(self._mark())
        self._boundary()
        if len(self._ends) == len(self._mask):
            timing.synchronize(self._bench.device)
            self._ended = time.perf_counter()
        else:
            self._calls.append([])
            self._blocks.append([])
        return {}

    def _mark(self) -> Any:
        if self._bench.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def result(self, peak_bytes: int | None) -> Run:
        """What was heard."""
        begins = [self._calls[0][0][0], *self._ends[:-1]]
        return Run(
            self._mask,
            [_ms(begin, end) for begin, end in zip(begins, self._ends, strict=True)],
            [sum(_ms(begin, end) for begin, end in calls) for calls in self._calls],
            (self._ended - self._began) * 1e3,
            self._blocks,
            peak_bytes,
            self._applied.held(),
        )


def _ms(begin: Any, end: Any) -> float:
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)


# --- What a skipped step launches ----------------------------------------------------------------


def step_costs(bench: Bench, cache: Cache, mask: str = COST_MASK) -> dict[str, float]:
    """Launches and idle time of a skipped step on a GPU, dispatched operators on a CPU.

    Raises:
        RuntimeError: The run did not follow the mask, or the profiler missed launches.
    """
    if bench.device.type == "cuda":
        return _device_costs(bench, cache, mask)
    _operators(bench, cache, mask)  # what is made once for all runs
    # A run that skips one step more dispatches one step's operators more.
    counts = [_operators(bench, cache, given) for given in (mask, mask + mask[-1])]
    return {"operators": counts[1] - counts[0]}


def _operators(bench: Bench, cache: Cache, mask: str) -> int:
    return len(timing.dispatched(lambda: _run_as_told(bench, cache, mask)))


def _run_as_told(
    bench: Bench, cache: Cache, mask: str, boundary: Callable[[], None] = lambda: None
) -> None:
    deviation = bench.deviation(bench.run(mask, cache, boundary))
    if deviation is not None and cache is not uncached:
        raise RuntimeError(deviation)


def _device_costs(bench: Bench, cache: Cache, mask: str) -> dict[str, float]:
    numbers = torch.ones(2, device=bench.device)

    def marker() -> None:
        torch.hypot(numbers[0], numbers[1], out=numbers[0])

    # The kernel of an operator that no model here uses stands between the steps. Its name is
    # looked up, for it differs between versions.
    names = set(timing.device_events(marker))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _run_as_told(bench, cache, mask, marker)
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and event.name not in _HOST_ACTIVITIES
    )
    steps = split_steps(kernels, names, len(mask))
    skipped = [step for step, letter in zip(steps, mask, strict=True) if letter == "R"][1:]
    return {
        "launches": statistics.median(len(step) for step in skipped),
        "idle_ms": statistics.median(idle(step) for step in skipped) / 1e3,
    }


def split_steps(
    kernels: Sequence[tuple[float, float, str]], markers: set[str], num_steps: int
) -> list[list[Interval]]:
    """What ran between one marker and the next one, from all kernels in order of their start.

    Raises:
        RuntimeError: The profiler did not see as many markers as there are boundaries.
    """
    steps: list[list[Interval]] = []
    seen = 0
    for begin, end, name in kernels:
        if name in markers:
            seen += 1
            steps.append([])
        elif steps:
            steps[-1].append((begin, end))
    if seen != num_steps + 1:
        raise RuntimeError(f"the profiler saw {seen} markers, {num_steps + 1} were launched")
    return steps[:-1]


def idle(kernels: Sequence[Interval]) -> float:
    """Time between the first and the last kernel in which none ran."""
    ordered = sorted(kernels)
    if not ordered:
        return 0.0
    gaps, busy_until = 0.0, ordered[0][1]
    for begin, end in ordered[1:]:
        gaps += max(0.0, begin - busy_until)
        busy_until = max(busy_until, end)
    return gaps
