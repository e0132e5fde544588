"""How close is a cached run to one whose cache costs nothing? Real pipelines, random weights.

Times are taken step by step from outside of every cache. On a GPU they are CUDA events, recorded
around each step and read after the run: nothing waits during it. On a CPU they are its clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import models
import timing
import torch
from caches import Applied, Cache, caches, family_of, ideal, shortened, uncached
from cases import Cases, emit
from models import Model
from stages import Finding

from dicache.bench.counter import BlockCounter

# The first steps of a run allocate the cache and find the device cold; medians leave them out.
WARM_UP_STEPS = 2
IDEAL_STEPS = 12
COST_MASK = "CCRRR"
STEPS = (50, 30, 20, 15, 10)  # of a run, where more take too long
SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the blocks, where all of them take too long
SECONDS_TO_SPARE = 10.0


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


def plan(
    wanted: int, left_s: float, full_s: float, ideal_s: float, num_caches: int
) -> tuple[float, int]:
    """The share of the blocks and the number of steps with which all runs fit into this time.

    Two runs are un-cached. Blocks are left out only where the fewest steps of the whole model do
    not fit.
    """
    for share in SHARES:
        step_s = ideal_s + share * (full_s - ideal_s)
        for steps in (each for each in STEPS if each <= wanted):
            mask = make_mask(steps)
            cached_s = mask.count("C") * step_s + mask.count("R") * ideal_s
            if 1.1 * (2 * steps * step_s + num_caches * cached_s) <= left_s:
                return share, steps
    return SHARES[-1], STEPS[-1]


# --- One run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one call of the pipeline showed.

    Attributes:
        mask: One letter a step, C or R.
        step_ms: From the end of a step to the end of the next one: transformer, guidance, scheduler
            and the pipeline's own work. The first step begins with its transformer call.
        loop_ms: Wall time from the first transformer call until the device has finished the last
            step.
        blocks: Of every step, the blocks that each call of the transformer ran.
        peak_bytes: Most memory allocated at once, above what was there before; `None` on a CPU.
        held: `Applied.held` after the run.
    """

    mask: str
    step_ms: list[float]
    loop_ms: float
    blocks: list[list[int]]
    peak_bytes: int | None
    held: Mapping[str, Any]

    def median_ms(self, letter: str, warm_up: int = WARM_UP_STEPS) -> float | None:
        """Of the steps with this letter behind the warm-up, if there are any."""
        steps = list(zip(self.mask, self.step_ms, strict=True))[warm_up:]
        chosen = [ms for kind, ms in steps if kind == letter]
        return statistics.median(chosen) if chosen else None


class Bench:
    """A model on a device, ready to run with any cache and mask: in bf16, tiny in fp32."""

    def __init__(self, model: Model, device: torch.device, dry: bool) -> None:
        self.model, self.device = model, device
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.pipe = models.build(model, device, self.dtype)
        self.arguments = models.arguments(model, device, self.dtype)
        self.transformer = self.pipe.transformer
        self.family = family_of(self.transformer)
        self.counter: BlockCounter | None = BlockCounter(self.transformer)

    @property
    def num_blocks(self) -> int:
        """Of the transformer as it is now; see `caches.shortened`."""
        return len(self.family.blocks(self.transformer))

    def compile_blocks(self) -> None:
        """Put the blocks under torch.compile, which a counter inside of them would change."""
        assert self.counter is not None
        self.counter.remove()
        self.counter = None
        # On a CPU tracing alone: its code would take longer to make than all the rest.
        backend = "inductor" if self.device.type == "cuda" else "eager"
        self.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)

    def deviation(self, run: Run) -> str | None:
        """How a run of the transformer as it is now deviates from its mask, if it does.

        A computed step runs all blocks, a skipped one at most one of each list of blocks. Where
        they are not counted the cache's own statistics have to do.
        """
        if self.counter is None:
            wanted = run.mask.count("R")
            reused = run.held.get("reused_steps", wanted)
            return None if reused == wanted else f"{reused} of {wanted} steps were reused"
        allowed = {"C": {self.num_blocks}, "R": set(range(len(self.family.stacks) + 1))}
        for step, (letter, counts) in enumerate(zip(run.mask, run.blocks, strict=True)):
            for count in set(counts) - allowed[letter]:
                wish = "compute" if letter == "C" else "be skipped"
                return f"step {step} should {wish}, and ran {count} of {self.num_blocks} blocks"
        return None

    def run(self, mask: str, cache: Cache = uncached) -> Run:
        """One call of the pipeline."""
        with cache(self.pipe, mask) as applied:
            recorder = _Recorder(self, mask, applied)
            peak = timing.PeakBytes(self.device)
            with recorder.listening():
                self.pipe(
                    **self.arguments,
                    num_inference_steps=len(mask),
                    callback_on_step_end=recorder.end_step,
                )
            return recorder.result(peak.read())


class _Recorder:
    """Listens to one run: `cache_context`, which a pipeline opens around calls, and step ends."""

    def __init__(self, bench: Bench, mask: str, applied: Applied) -> None:
        self._bench, self._mask, self._applied = bench, mask, applied
        self._open = bench.transformer.cache_context
        self._marks: list[Any] = []  # the begin, and the end of every step
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
        self._applied.force(max(len(self._marks) - 1, 0))
        if not self._marks:
            timing.synchronize(self._bench.device)
            self._began = time.perf_counter()
            self._mark()
        counter = self._bench.counter
        if counter is not None:
            counter.take()
        with self._open(name, **given):
            yield
        if counter is not None:
            self._blocks[-1].append(sum(counter.take()))

    def end_step(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        """The pipeline's callback."""
        self._mark()
        if len(self._marks) > len(self._mask):
            timing.synchronize(self._bench.device)
            self._ended = time.perf_counter()
        else:
            self._blocks.append([])
        return {}

    def _mark(self) -> None:
        self._marks.append(timing.mark(self._bench.device))

    def result(self, peak_bytes: int | None) -> Run:
        """What was heard."""
        steps = zip(self._marks, self._marks[1:], strict=False)
        step_ms = [timing.seconds_between(begin, end) * 1e3 for begin, end in steps]
        loop_ms = (self._ended - self._began) * 1e3
        return Run(self._mask, step_ms, loop_ms, self._blocks, peak_bytes, self._applied.held())


def launches_of_a_skipped_step(bench: Bench, cache: Cache) -> int:
    """Launches on a GPU, dispatched operators on a CPU, with the first two blocks of every list.

    A run that skips one step more has those of one step more. Blocks behind have none.

    Raises:
        RuntimeError: The run did not follow the mask.
    """

    def run(mask: str) -> None:
        deviation = bench.deviation(bench.run(mask, cache))
        if deviation is not None:
            raise RuntimeError(deviation)

    with shortened(bench.transformer, SHARES[-1]):
        run(COST_MASK)  # what is made once for all runs
        masks = (COST_MASK, COST_MASK + COST_MASK[-1])
        few, more = (timing.count_launches(lambda m=mask: run(m), bench.device) for mask in masks)
    return more - few


# --- All caches on one model ---------------------------------------------------------------------


def compare(device: torch.device, dry: bool, names: Sequence[str]) -> None:
    """All caches on a model, or the default backend on its blocks under torch.compile."""
    name, *variant = names
    Comparison(models.find_model(name, dry), device, dry, variant == ["compiled"]).run()


class Comparison:
    """One model's un-cached run, and everything that is compared with it, with one mask.

    The default backend, the ideal and another un-cached run come first: they are what the goal is
    about, and how much two equal runs differ.
    """

    def __init__(self, model: Model, device: torch.device, dry: bool, compiled: bool) -> None:
        self.cases = Cases(device)
        self.model, self.compiled = model, compiled
        self.name = f"{model.name}, compiled blocks" if compiled else model.name
        self.bench = Bench(model, device, dry)
        everything = caches(device)
        self.default = next(iter(everything))
        self.caches = {
            self.default: everything.pop(self.default),
            "ideal": ideal,
            "again": uncached,
        }
        self.caches |= {} if compiled else everything
        self.ideal_ms = 0.0

    def run(self) -> None:
        """Plan for the time that is left, then a run of each."""
        if self.compiled:
            self.bench.compile_blocks()
        share, steps = self._plan()
        mask = make_mask(steps)
        emit(
            "model",
            model=self.name,
            title=self.model.title,
            blocks=self.bench.num_blocks,
            wanted_steps=self.model.steps,
            contexts=self.model.contexts,
            mask=mask,
            default=self.default,
        )
        with shortened(self.bench.transformer, share), torch.no_grad():
            self.plain = self.bench.run("C" * steps)
            full_s = (self.plain.median_ms("C") or 0.0) / 1e3
            needed = 2 * (mask.count("C") * full_s + mask.count("R") * self.ideal_ms / 1e3)
            for key, cache in self.caches.items():
                chosen = "C" * steps if cache is uncached else mask
                case = f"{self.name}: {key}"
                self.cases.attempt(
                    case, lambda k=key, m=chosen, c=cache: [self._row(k, m, c)], needed
                )

    def _plan(self) -> tuple[float, int]:
        """From an ideal skipped step and a full one, whose first runs warm up."""
        bench = self.bench
        with shortened(bench.transformer, 0):
            bench.run("CC")
            self.ideal_ms = bench.run("C" * IDEAL_STEPS).median_ms("C") or 0.0
        bench.run("CC")
        full_ms = bench.run("CC").step_ms[-1]
        left = self.cases.left() - SECONDS_TO_SPARE
        return plan(self.model.steps, left, full_ms / 1e3, self.ideal_ms / 1e3, len(self.caches))

    def _row(self, key: str, mask: str, cache: Cache) -> Finding:
        launches = None  # of compiled code they cannot be counted on every device
        if key != "again" and not self.compiled:
            launches = launches_of_a_skipped_step(self.bench, cache)
        run = self.bench.run(mask, cache)
        plain, extra = self.plain, None
        if run.peak_bytes is not None and plain.peak_bytes is not None:
            extra = run.peak_bytes - plain.peak_bytes
        skipped = [c for kind, c in zip(run.mask, run.blocks, strict=False) if kind == "R"]
        return {
            "kind": "pipeline",
            "model": self.name,
            "implementation": "un-cached, again" if key == "again" else key,
            "mask": mask,
            "blocks": self.bench.num_blocks,
            "full_ms": plain.median_ms("C"),
            "ideal_ms": self.ideal_ms,
            "uncached_loop_ms": plain.loop_ms,
            "loop_ms": run.loop_ms,
            "computed_ms": run.median_ms("C"),
            "skipped_ms": run.median_ms("R"),
            "blocks_in_a_skipped_call": max((max(c, default=0) for c in skipped), default=0),
            "deviation": self.bench.deviation(run),
            "launches": launches,
            "extra_peak_bytes": extra,
            **run.held,
        }
