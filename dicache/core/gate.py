"""When to cache: the gate turns a step's error and the run's rules into an action.

A gate belongs to one context of one run. It holds two numbers and knows neither tensors nor
models. Whatever it cannot judge it answers with "compute" or "resume", never with "reuse".
"""

from __future__ import annotations

import math

from .calibration import Plan
from .extrapolation import Entries
from .rules import Rules


class Gate:
    """Online Probe Profiling (arXiv 2508.17356): accumulate the error, reuse while it is small.

    Attributes:
        rules: What it decides by.
        accumulated_error: What was compared with the threshold last.
        consecutive_reuse: Reused steps in a row, up to now.
        entries: The last computed steps that can be used, newest first.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.accumulated_error = 0.0
        self.consecutive_reuse = 0
        self.entries: Entries = ()

    def wants_probe(
        self,
        step: int,
        num_steps: int | None,
        is_last: bool,
        follows: bool = False,
        index: int | None = None,
    ) -> bool:
        """Whether the step is judged at all; otherwise it runs all blocks.

        Args:
            step: Its place in the run.
            num_steps: Number N of steps of the run; `None` if nobody said it.
            is_last: Whether it is the run's last one.
            follows: Whether its branch is called after another one in every step.
            index: Its place among the branch's own steps, if that is another one.
        """
        rules = self.rules
        if rules.schedule is not None:
            return step < len(rules.schedule) and rules.schedule[step] == "R"
        if num_steps is None and rules.needs_num_steps:
            return False
        if rules.compute_last_step and is_last:
            return False
        if num_steps is None:
            return True
        own = step if index is None else index
        return own >= rules.config.retained_steps(num_steps, follows)

    def decide(
        self, step: int, error: float, gamma: float, leader_reuses: bool | None = None
    ) -> str:
        """ "reuse" or "resume" for a probed step; `accumulated_error` then holds what was compared.

        A non-finite error or gamma resumes. Else, where another gate leads, its answer is taken,
        but `max_consecutive_reuse` holds. Call `finish` when the step is done.
        """
        self.accumulated_error += error
        if not (math.isfinite(error) and math.isfinite(gamma)):
            return "resume"
        if leader_reuses is None:
            reuses = self.may_reuse()
        else:
            reuses = leader_reuses and not self._is_at_limit
        return "reuse" if reuses else "resume"

    def may_reuse(self) -> bool:
        """Whether the error accumulated so far, and the rules, leave room for a reused step."""
        rules = self.rules
        if rules.schedule is not None:
            return True
        if self._is_at_limit:
            return False
        equal = rules.reuse_at_threshold and self.accumulated_error == rules.threshold
        return equal or self.accumulated_error < rules.threshold

    @property
    def counts_size(self) -> bool:
        """Whether errors are weighed by the size of the step."""
        return self.rules.error.weighted

    @property
    def _is_at_limit(self) -> bool:
        """Whether so many steps in a row were reused that the next one has to be computed."""
        limit = self.rules.max_consecutive_reuse
        return limit is not None and self.consecutive_reuse >= limit

    def finish(self, step: int, reused: bool) -> bool:
        """Count a reused step, or start anew after a computed one.

        Returns:
            Whether that was against a plan.
        """
        self.consecutive_reuse = self.consecutive_reuse + 1 if reused else 0
        if not reused:
            self.accumulated_error = 0.0
            self.entries = (step, *self.entries[:2])
        return False

    def forget_entries(self) -> None:
        """The entries cannot be used any more."""
        self.entries = ()


class PlannedGate(Gate):
    """Follows a plan; the probe may object.

    A step that the plan reuses is computed all the same where the trajectory's misfit on the probe
    is more than `veto` times what the calibration saw there. The rest is planned anew from where
    the run stands, with one computed step less to come, unless that would double its error.
    """

    def __init__(self, rules: Rules, plan: Plan) -> None:
        super().__init__(rules)
        self.plan = plan
        self._left = plan.computed

    def wants_probe(
        self,
        step: int,
        num_steps: int | None,
        is_last: bool,
        follows: bool = False,
        index: int | None = None,
    ) -> bool:
        if not self.entries or self._is_at_limit:
            return False
        return self.plan.reuses(step, self.entries, self._left)

    def decide(
        self, step: int, error: float, gamma: float, leader_reuses: bool | None = None
    ) -> str:
        self.accumulated_error = error
        if not (math.isfinite(error) and math.isfinite(gamma)):
            return "resume"
        if not self.wants_probe(step, None, False):  # another sample of the batch wants it
            return "resume"
        if leader_reuses is not None:
            return "reuse" if leader_reuses else "resume"
        limit = self.rules.veto
        expected = self.plan.misfit(step, self.entries)
        return "reuse" if limit is None or error <= limit * expected else "resume"

    def may_reuse(self) -> bool:
        return True

    @property
    def counts_size(self) -> bool:
        return False

    def finish(self, step: int, reused: bool) -> bool:
        is_veto = not reused and self.wants_probe(step, None, False)
        before = self.entries
        super().finish(step, reused)
        if is_veto and self.plan.is_too_dear(before, self._left, self.entries):
            return True
        if not reused:
            self._left = max(self._left - 1, 0)
        return is_veto
