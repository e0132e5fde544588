"""Draws: all samples of a method at one setting, and a search for the settings of a cost.

One sample at a time, so that each has the schedule that it would have alone. Work is counted below
every cache's hooks. Workers are processes with one thread each; a GPU wants one of them.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor

from dicache.likeness import likeness

from .counter import BlockCounter, cost_of
from .methods import Method, Task, uncached
from .results import Point, Result
from .strip import difference, strip
from .subjects import Subject, loaded, transformers_of

SHOWN = 4  # samples whose pictures are kept
_LONGEST_WALK = 6
_NEAR = 0.05  # what is left is interpolated: linear over so little is exact to 0.2 dB

UNCACHED = Method("no cache", "", uncached)
Map = Callable[..., Iterator["list[Sample]"]]


@dataclass(frozen=True)
class Job:
    """Some samples of one method at one setting, as they travel to a worker."""

    task: Task
    method: Method
    setting: float
    seeds: Sequence[int]
    references: Sequence[Tensor | None]
    shown_below: int  # seeds


@dataclass(frozen=True)
class Sample:
    """What came of one: likeness to the reference, or the pictures where it is one itself.

    `shown` are a small picture and its difference from the reference, of the first samples.
    """

    pictures: Tensor | None
    shown: list[Image]
    likeness: dict[str, float]
    calls: list[int]
    seconds: float


def run_job(job: Job) -> list[Sample]:
    """Generate the samples, one after the other."""
    subject = job.task.subject
    pipe = loaded(subject)
    counters = [BlockCounter(model) for model in transformers_of(pipe)]
    samples = []
    try:
        with torch.no_grad(), job.method.apply(pipe, job.task, job.setting) as changes:
            for seed, reference in zip(job.seeds, job.references, strict=True):
                start = time.perf_counter()
                output = pipe(**{**subject.inputs(seed), **changes})
                pictures = subject.decode(output)
                seconds = time.perf_counter() - start
                calls = [count for counter in counters for count in counter.take()]
                found = {} if reference is None else likeness(pictures, reference)
                shown = [strip(pictures)] if seed < job.shown_below else []
                if shown and reference is not None:
                    shown.append(strip(difference(pictures, reference)))
                kept = pictures if reference is None else None
                samples.append(Sample(kept, shown, found, calls, seconds))
    finally:
        for counter in counters:
            counter.remove()
    return samples


@contextmanager
def workers(count: int) -> Iterator[Map]:
    """A `map` over worker processes, or the plain one for a single worker."""
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as pool:
        yield pool.map


@dataclass
class Bench:
    """A task's un-cached samples, and everything that is compared with them.

    Args:
        task: What is drawn.
        seeds: One a sample, rising.
        run: Of `workers`.
        jobs: Number of workers.
        targets: Costs at the sibling's depth to find settings for.
        scouts: Number of samples that look for them.
    """

    task: Task
    seeds: Sequence[int]
    run: Map
    jobs: int
    targets: Sequence[float]
    scouts: int = 2
    references: list[Sample] = field(default_factory=list)
    shown: dict[tuple[str, float], list[list[Image]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.references = self._samples(UNCACHED, 0.0, len(self.seeds))
        self.shown[UNCACHED.name, 0.0] = [each.shown for each in self.references[:SHOWN]]

    @property
    def depths(self) -> tuple[int, int]:
        """Blocks of the model and of its sibling."""
        own, sibling = self.task.num_blocks, self.task.subject.sibling
        return own, own if sibling is None else sibling[1]

    def measure(self, method: Method, setting: float, count: int | None = None) -> Point:
        """The first `count` samples, or all, of a method at a setting."""
        count = len(self.seeds) if count is None else min(count, len(self.seeds))
        samples = self._samples(method, setting, count)
        calls = [blocks for sample in samples for blocks in sample.calls]
        plain = sum(len(sample.calls) for sample in self.references[:count])
        own, sibling = (cost_of(calls, self.depths[0], depth, plain) for depth in self.depths)
        self.shown[method.name, setting] = [each.shown for each in samples[:SHOWN]]
        values = {key: [each.likeness[key] for each in samples] for key in samples[0].likeness}
        seconds = sum(sample.seconds for sample in samples) / count
        return Point(setting, (own, sibling), seconds, values)

    def sweep(self, method: Method) -> list[Point]:
        """Points around every target that the method reaches, from dear to cheap."""
        settings = method.settings(self.task)

        @functools.cache
        def scout(place: int) -> float:
            return self.measure(method, settings[place], self.scouts).cost[1]

        @functools.cache
        def whole(place: int) -> Point:
            return self.measure(method, settings[place])

        last = len(settings) - 1
        most, places = scout(last), set[int]()
        for target in self.targets:
            # Where everything that may be reused is reused, the first setting that does is enough.
            wanted = min(target, 0.995 * most)
            place = min(bisect_left(range(last + 1), wanted, key=scout), last)
            places |= _near(lambda at: whole(at).cost[1], place, wanted, last)
        # The outer targets want a point on their other side, too.
        for _ in range(_LONGEST_WALK):
            if min(places) > 0 and whole(min(places)).cost[1] > self.targets[0]:
                places.add(min(places) - 1)
        ceiling = min(self.targets[-1], 0.98 * most)  # of all samples it may be a little lower
        for _ in range(_LONGEST_WALK):
            if max(places) < last and whole(max(places)).cost[1] < ceiling:
                places.add(max(places) + 1)
        return [whole(place) for place in sorted(places)]

    def _samples(self, method: Method, setting: float, count: int) -> list[Sample]:
        """In the order of their seeds; every worker takes some that follow each other."""
        kept: list[Tensor | None] = [each.pictures for each in self.references[:count]]
        references = kept or [None] * count
        share = -(-count // self.jobs)
        jobs = [
            Job(
                self.task,
                method,
                setting,
                self.seeds[start : min(start + share, count)],
                references[start : min(start + share, count)],
                self.seeds[0] + SHOWN,
            )
            for start in range(0, count, share)
        ]
        return [sample for samples in self.run(run_job, jobs) for sample in samples]


def _near(cost: Callable[[int], float], place: int, target: float, last: int) -> set[int]:
    """Places up to one whose cost is near the target, or up to both neighbours around it.

    A few samples said where to begin; all of them may be a little further.
    """
    tried: set[int] = set()
    while place not in tried and len(tried) < _LONGEST_WALK:
        tried.add(place)
        if abs(cost(place) / target - 1) <= _NEAR:
            break
        place = min(max(place + (1 if cost(place) < target else -1), 0), last)
    return tried


def task_of(subject: Subject, calibration_seeds: Sequence[int]) -> Task:
    """A task that has learned nothing yet; of two experts, which take turns, one says the depth."""
    counter = BlockCounter(transformers_of(loaded(subject))[0])
    counter.remove()
    return Task(subject, counter.num_blocks, calibration_seeds)


def compare(bench: Bench, methods: Sequence[Method], result: Result) -> Iterator[str]:
    """Sweep every method into `result`; tells the name of each when it is through.

    One that fails says why, and the others go on.
    """
    for method in methods:
        result.curves.pop(method.name, None)  # of an earlier run
        result.failures.pop(method.name, None)
        try:
            if method.missing is not None:
                raise ValueError(method.missing)
            method.prepare(bench.task)
            result.curves[method.name] = bench.sweep(method)
        except Exception as error:  # other people's caches, on any model
            result.failures[method.name] = f"{type(error).__name__}: {error}"
        if method.is_speedup and method.name not in result.promises:
            result.promises.append(method.name)
        yield method.name
