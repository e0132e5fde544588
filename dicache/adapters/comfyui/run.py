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
from ...stats import RunStats
from .call import Call
from .locate import Locator
from .table import Block

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
    ) -> None:
        self.model, self.is_off = model, False
        self._blocks, self._window = blocks, window
        self._session = DiCacheSession(rules)
        if told is not None:
            self._session.timeline.told = told
        self._locator = Locator(sigmas, sampler)
        self.stats: list[RunStats] = []
        self._num_calls = self._num_run = 0

    def call(self, options: Mapping[str, Any], control: Any) -> Call:
        """What patches the blocks of one call."""
        sigma = self._locator.sigma(options)
        hooks = getattr(getattr(self.model, "current_patcher", None), "current_hooks", None)

        def open_step(x: Tensor) -> Step | None:
            where = self._locator.where(options, x, sigma, control, hooks)
            return None if where is None else self._open(self._session.step(where))

        most, least = self._window
        may_reuse = sigma is not None and least <= sigma <= most
        return Call(self._blocks, self._session.config.probe_depth, open_step, may_reuse)

    def count(self, call: Call) -> None:
        """A call is over."""
        if call.num_run:
            self._num_calls += 1
            self._num_run += call.num_run

    def end(self) -> None:
        """Free all state."""
        self._session.reset()

    def report(self) -> str:
        """What was done, in a line."""
        if not self._num_calls:
            return "DiCache saw no call of the model's blocks."
        share = self._num_run / (self._num_calls * len(self._blocks))
        parts = [f"{name}: {_counts(records)}" for name, records in self._records().items()]
        return (
            f"DiCache (threshold {self._session.rules.threshold:g}): "
            f"{'; '.join(parts) or 'no step could be told'}. {share:.0%} of the blocks ran."
        )

    def _records(self) -> dict[str, list[str]]:
        """The actions of every branch."""
        actions: dict[str, list[str]] = {}
        for stats in self.stats:
            for name, records in stats.contexts.items():
                actions.setdefault(name, []).extend(each.action for each in records)
        return actions

    def _open(self, step: Step) -> Step:
        if not any(stats is step.stats for stats in self.stats):
            self.stats.append(step.stats)
        return step


def _counts(actions: list[str]) -> str:
    computed, resumed, reused = (actions.count(each) for each in ("compute", "resume", "reuse"))
    return f"{computed} computed, {resumed} resumed, {reused} reused"
