"""When to cache: the gate turns a step's error and the run's rules into an action.

A gate belongs to one context of one run. It holds two numbers and knows neither tensors nor
models. Whatever it cannot judge it answers with "compute" or "resume", never with "reuse".
"""

from __future__ import annotations

import math

from .rules import Rules


class Gate:
    """Online Probe Profiling (arXiv 2508.17356): accumulate the error, reuse while it is small."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.accumulated_error = 0.0
        self.consecutive_reuse = 0

    def wants_probe(
        self, step: int, num_steps: int | None, is_last: bool, follows: bool = False
    ) -> bool:
        """Whether the step is judged at all; otherwise it runs all blocks.

        Args:
            step: Its index.
            num_steps: Number N of steps of the run; `None` if nobody said it.
            is_last: Whether it is the run's last one.
            follows: Whether its branch is called after another one in every step.
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
        return step >= rules.config.retained_steps(num_steps, follows)

    def decide(self, error: float, gamma: float, leader_reuses: bool | None = None) -> str:
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
        if rules.max_consecutive_reuse is not None and self._is_at_limit:
            return False
        equal = rules.reuse_at_threshold and self.accumulated_error == rules.threshold
        return equal or self.accumulated_error < rules.threshold

    @property
    def _is_at_limit(self) -> bool:
        """Whether so many steps in a row were reused that the next one has to be computed."""
        limit = self.rules.max_consecutive_reuse
        return limit is not None and self.consecutive_reuse >= limit

    def finish(self, reused: bool) -> None:
        """Count a reused step, or start anew after a computed one."""
        self.consecutive_reuse = self.consecutive_reuse + 1 if reused else 0
        if not reused:
            self.accumulated_error = 0.0
