"""One sampling run: its session, its calls, and what is told of it when it is over."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.rules import Rules
from ...core.session import DiCacheSession
from ...core.step import Step
from ...core.where import Where
from ...stats import RunStats
from .call import Call
from .locate import Locator
from .table import Block
from .target import Lesson

LOG = logging.getLogger(__name__)


class Run:
    """One run of a sampler over a model.

    Args:
        rules: What is decided by.
        model: ComfyUI's model, which the calls of this run are of.
        blocks: Its blocks.
        sigmas: Of the run.
        window: Largest and smallest sigma of steps that may be reused.
        sampler: ComfyUI's sampler.
        told: See `Timeline.told`; every run has a timeline of its own.
        lesson: What it has of earlier runs, where a target is to be met; its rules then count.

    Attributes:
        is_off: Whether all further calls are left alone.
        stats: What was done; another one for each time that the sampler went back.
    """

    def __init__(
        self,
        rules: Rules,
        model: Any,
        blocks: list[Block],
        sigmas: Sequence[float],
        window: tuple[float, float] = (math.inf, 0.0),
        sampler: Any = None,
        told: set[str] | None = None,
        lesson: Lesson | None = None,
    ) -> None:
        self.model, self.is_off = model, False
        self._blocks, self._window = blocks, window
        self._rules, self._told, self._lesson = rules, told, lesson
        self._session: DiCacheSession | None = None  # until a call could be told
        self._locator = Locator(sigmas, sampler)
        self.stats: list[RunStats] = []
        self._num_calls = self._num_run = 0

    def call(self, options: Mapping[str, Any], control: Any) -> Call:
        """What patches the blocks of one call."""
        sigma = self._locator.sigma(options)
        hooks = getattr(getattr(self.model, "current_patcher", None), "current_hooks", None)

        def open_step(x: Tensor) -> Step | None:
            where = self._locator.where(options, x, sigma, control, hooks)
            return None if where is None else self._open(where)

        most, least = self._window
        may_reuse = sigma is not None and least <= sigma <= most
        return Call(self._blocks, self._rules.config.probe_depth, open_step, may_reuse)

    def count(self, call: Call) -> None:
        """A call is over."""
        if call.num_run:
            self._num_calls += 1
            self._num_run += call.num_run

    def learn(self) -> None:
        """The run came to its end by itself; others may have the same."""
        if self._lesson is not None and self._session is not None:
            self._lesson.end(self.stats)

    def end(self) -> None:
        """Free all state."""
        self._lesson = None
        if self._session is not None:
            self._session.reset()
            if self._session.recorder is not None:
                self._session.recorder.clear()

    def report(self) -> str:
        """What was done, in a line."""
        if not self._num_calls:
            return "DiCache saw no call of the model's blocks."
        share = self._num_run / (self._num_calls * len(self._blocks))
        parts = [f"{name}: {_counts(records)}" for name, records in self._records().items()]
        return (
            f"DiCache ({self._what_decides()}): "
            f"{'; '.join(parts) or 'no step could be told'}. {share:.0%} of the blocks ran."
        )

    def _records(self) -> dict[str, list[str]]:
        """The actions of every branch."""
        actions: dict[str, list[str]] = {}
        for stats in self.stats:
            for name, records in stats.contexts.items():
                actions.setdefault(name, []).extend(each.action for each in records)
        return actions

    def _what_decides(self) -> str:
        if self._session is None:
            return f"threshold {self._rules.threshold:g}"
        rules = self._session.rules
        if self._session.recorder is not None:
            return "calibrating"
        target = rules.config.target_speedup
        return f"threshold {rules.threshold:g}" if target is None else f"target {target:g}x"

    def _open(self, where: Where) -> Step:
        if self._session is None:
            self._session = self._begin(where.context or "")
        step = self._session.step(where)
        if not any(stats is step.stats for stats in self.stats):
            self.stats.append(step.stats)
        return step

    def _begin(self, branch: str) -> DiCacheSession:
        """The session, now that the first call of the run is known."""
        lesson = self._lesson
        session = DiCacheSession(self._rules if lesson is None else lesson.begin(branch))
        if lesson is not None:
            session.recorder = lesson.recorder
        if self._told is not None:
            session.timeline.told = self._told
        return session


def _counts(actions: list[str]) -> str:
    computed, resumed, reused = (actions.count(each) for each in ("compute", "resume", "reuse"))
    return f"{computed} computed, {resumed} resumed, {reused} reused"
