"""A cache session: what any denoising loop, and any adapter of one, drives.

It knows no model and no framework. It guarantees that a step is reused only on valid history of
the same run, branch and layout: a new run, a new shape, dtype or device, an abandoned step, a
missing or non-finite value all lead to a computed step.

    session = DiCacheSession(DiCacheConfig(threshold=0.1))
    for t in timesteps:
        with session.step("cond", timestep=t, num_inference_steps=len(timesteps)) as step:
            p = probe_blocks(x)
            if step.needs_probe:
                step.probe(x, p)
            if step.action == "reuse":
                y = step.reuse(x)
            else:
                y = remaining_blocks(p)
                step.record(x, p, y)
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable

from torch import Tensor

from ..config import DiCacheConfig
from ..ops import resolve_backend
from ..profile import Identity
from ..stats import RunStats
from .calibration import Calibration
from .context import Context
from .host_memory import give_back
from .learner import Learner
from .ranks import Ranks
from .readback import as_number
from .recorder import Recorder
from .rules import Rules, resolve
from .run import Timeline
from .step import PAUSED, Step
from .where import Where


class DiCacheSession:
    """State and statistics of one model's cache over its runs.

    Args:
        rules: A configuration, whose `threshold` must be a number unless `schedule` is given; or
            what `core.rules.resolve` made of one.
        ascending_timesteps: Whether timesteps rise during a run. A timestep that moves the other
            way starts a new run; twice in a row, it is the direction.

    Raises:
        ValueError: No threshold is given, or the backend is not there.

    Attributes:
        rules: What it decides by.
        rules_of: Rules of single branches, by name, where they are other ones; empty at first.
        recorder: Notes the steps of runs that begin from now on, for a profile.
        identity: Which model it is of, where somebody said it.
        timeline: Finds out which step of which run a call is.
        ranks: Those that decide with it: `DiCacheConfig(process_group=...)`, or what an adapter
            found.
    """

    def __init__(self, rules: DiCacheConfig | Rules, *, ascending_timesteps: bool = False) -> None:
        self.rules = rules if isinstance(rules, Rules) else resolve(rules)
        resolve_backend(self.rules.backend)  # an absent one is refused here, not in the first run
        self.rules_of: dict[str, Rules] = {}
        self.recorder: Recorder | None = None
        self.ranks = Ranks(self.rules.config.process_group)
        self.identity: Identity | None = None
        make_context = weakref.WeakMethod(self._make_context)  # no cycle: memory goes with it
        self.timeline: Timeline[Context] = Timeline(
            lambda name: make_context()(name),  # type: ignore[misc]  # steps hold the session
            self.rules.config.num_inference_steps,
            ascending_timesteps=ascending_timesteps,
        )
        self._learner: Learner | None = None
        if self.rules.learns:
            self._learner = Learner(
                self.rules.config, self.rules.threshold, self.timeline, self.ranks
            )

    def step(
        self,
        where: Where | str,
        *,
        timestep: Tensor | float | None = None,
        num_inference_steps: int | None = None,
        is_last: bool | None = None,
    ) -> Step:
        """Open the next step, as a context manager.

        Args:
            where: Where the call stands. Or the name of its branch, each call of which is a step:
                every branch has its own history and schedule.
            timestep: With a name, the step's timestep. One that moves against the run's direction
                starts a new run; equal timesteps do not. A tensor is read on the host.
            num_inference_steps: With a name, the number N of steps of the run; `None` takes the
                configuration's. Another N than before starts a new run.
            is_last: With a name, whether this is the run's last step; `None` counts.

        Raises:
            ValueError: The number of steps is smaller than 1.
        """
        if isinstance(where, str):
            where = Where(
                where,
                timestep=as_number(timestep),
                num_steps=num_inference_steps,
                is_last=is_last,
            )
        return Step(self, where)

    @property
    def config(self) -> DiCacheConfig:
        """The configuration, with its threshold filled in."""
        return self.rules.config

    @property
    def stats(self) -> RunStats:
        """Of the current or last run. It outlives the state."""
        return self.timeline.run.stats

    @property
    def num_inference_steps(self) -> int | None:
        """Number N of steps of that run; `None` where nobody said it."""
        return self.timeline.run.num_steps

    def forget(self, context: str) -> None:
        """Free the state of one context; its next step computes."""
        self.timeline.forget(context)

    def end(self, run: Hashable) -> None:
        """Free the state of the run with this key (`Where.run`)."""
        self.timeline.end(run)
        give_back()
        self._settle()

    def reset(self) -> None:
        """Free all state now. Statistics stay until the first step of the next run."""
        self.timeline.reset()
        give_back()
        self._settle()

    def _settle(self) -> None:
        """Learn now; ranks with their next run, which all of them begin: one may have failed."""
        if self._learner is not None and not self.ranks.are_several:
            self._learner.settle()

    def warn(self, cause: str, message: str) -> None:
        """Warn with `DiCacheWarning`, once per run and cause."""
        self.timeline.run.warn(cause, message)

    def _make_context(self, name: str) -> Context:
        rules, run = self.rules_of.get(name, self.rules), self.timeline.run
        if self._learner is not None:
            calibration, recorder = self._learner.prepare(run, self.identity)
            context = self._new_context(name, rules, calibration)
            context.recorder = recorder
            return context
        context = self._new_context(name, rules, self._fitting(rules.calibration))
        context.recorder = self.recorder
        return context

    def _fitting(self, calibration: Calibration | None) -> Calibration | None:
        """What a calibration says of the present run."""
        run = self.timeline.run
        if calibration is None:
            return None
        if run.num_steps is None:
            run.warn("profile", _UNKNOWN_STEPS.format(calibration.num_steps))
            return None
        fitting = calibration.for_run(run.num_steps, run.timesteps)
        if fitting is None:
            run.warn("profile", _OTHER_STEPS.format(calibration.num_steps, run.num_steps))
        elif fitting is not calibration:
            run.warn("profile", _RESAMPLED.format(calibration.num_steps, run.num_steps))
        return fitting

    def _new_context(self, name: str, rules: Rules, calibration: Calibration | None) -> Context:
        if calibration is None:
            return Context(rules, self.ranks)
        run, extrapolation = self.timeline.run, calibration.extrapolation(name)
        if extrapolation is None and self._learner is not None:
            self._learner.forget()
            run.stats.notes.append(_NEW_CONTEXT)
        elif extrapolation is None:
            known = ", ".join(map(repr, calibration.contexts))
            run.warn("profile", _OTHER_CONTEXT.format(name, known))
        elif run.moments - run.missed > 1:  # its first step is not the run's
            run.warn("profile", PAUSED.format(name))
            return Context(rules, self.ranks)
        plan = calibration.plan(name)
        if plan is not None:
            run.stats.planned[name] = plan.computed
        return Context(rules, self.ranks, extrapolation, plan)


_UNKNOWN_STEPS = (
    "The profile was calibrated in runs of {} steps and nobody says how many this one has, so the "
    "rules without a profile decide. Set DiCacheConfig(num_inference_steps=...), or use "
    "apply_dicache(pipe) instead of applying it to the transformer."
)
_OTHER_STEPS = (
    "The profile was calibrated in runs of {} steps and this one has {}, or other timesteps, from "
    "which nothing can be told of it, so the rules without a profile decide. Calibrate in a run "
    "like this one."
)
_RESAMPLED = (
    "The profile was calibrated in runs of {} steps and this one has {}, or other timesteps, so "
    "what it says is interpolated. A profile of a run like this one would be better."
)
_NEW_CONTEXT = (
    "a branch of guidance is new to profile='auto', so the next run is computed and recorded."
)
_OTHER_CONTEXT = (
    "The profile does not know the branch {!r} of guidance, only {}, so the rules without a "
    "profile decide there. Calibrate with the guidance that is used."
)
