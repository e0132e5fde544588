"""When to cache: the gate turns a step's error and the run's rules into an action.

A gate belongs to one context of one run. It holds three numbers and knows neither tensors nor
models. Whatever it cannot judge it answers with "compute" or "resume", never with "reuse".
"""

from __future__ import annotations

import math

from .config import DiCacheConfig


class Gate:
    """Online Probe Profiling (arXiv 2508.17356): accumulate the error, reuse while it is small."""

    def __init__(self, config: DiCacheConfig) -> None:
        if config.threshold is None and config.schedule is None:
            raise ValueError(
                "threshold is None, which stands for a model family's own value, and no model is "
                "known here. Give DiCacheConfig(threshold=...) a number."
            )
        self.config = config
        self.accumulated_error = 0.0
        self.consecutive_reuse = 0

    def wants_probe(self, step: int, num_inference_steps: int | None, is_last: bool) -> bool:
        """Whether the step is judged at all; otherwise it runs all blocks."""
        config = self.config
        if config.schedule is not None:
            return step < len(config.schedule) and config.schedule[step] == "R"
        if num_inference_steps is None and config.needs_num_inference_steps:
            return False
        if config.compute_last_step and is_last:
            return False
        return num_inference_steps is None or step >= config.retained_steps(num_inference_steps)

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
        config = self.config
        if config.schedule is not None:
            return True
        if self._is_at_limit:
            return False
        assert config.threshold is not None  # __init__ refuses it
        equal = config.reuse_at_threshold and self.accumulated_error == config.threshold
        return equal or self.accumulated_error < config.threshold

    @property
    def _is_at_limit(self) -> bool:
        """Whether so many steps in a row were reused that the next one has to be computed."""
        limit = self.config.max_consecutive_reuse
        return limit is not None and self.consecutive_reuse >= limit

    def finish(self, reused: bool) -> None:
        """Count a reused step, or start anew after a computed one."""
        self.consecutive_reuse = self.consecutive_reuse + 1 if reused else 0
        if not reused:
            self.accumulated_error = 0.0
