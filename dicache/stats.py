"""What a run did: one `StepRecord` a step and context, gathered in `RunStats`.

Plain numbers only: statistics hold no tensor, so they outlive the cache's state and cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_RECORDS = 10_000  # a context; a run of which nobody says where it ends must not grow for ever


@dataclass(frozen=True)
class StepRecord:
    """One denoising step of one context.

    Attributes:
        step: Index of the step, from 0, per context and run.
        action: `"compute"`: all blocks ran without asking the gate. `"resume"`: the gate asked for
            the remaining blocks, which continued from the probe. `"reuse"`: they were skipped.
        error: The step's error as `DiCacheConfig.error` defines it; `None` for `"compute"`.
        accumulated_error: The sum that was compared with the threshold, before any reset; `None`
            for `"compute"`.
        gamma: Weight of the newest residual that was used; `None` unless the action is `"reuse"`.
        sample: Row of the batch that this decision was for; `None` for the whole batch.
        weights: (w1, w2, w3) of the last computed residuals, where a profile gave them; gamma is
            `None` then.
    """

    step: int
    action: str
    error: float | None = None
    accumulated_error: float | None = None
    gamma: float | None = None
    sample: int | None = None
    weights: tuple[float, ...] | None = None


@dataclass
class RunStats:
    """Statistics of one run, which is one pass of a denoising loop over its timesteps.

    Attributes:
        contexts: The records of every context (`"cond"`, `"uncond"`, ...), in order of steps: the
            last 5,000 at least.
        block_calls: Transformer blocks that ran, probes included; 0 where a loop drives the session
            by itself.
        block_samples: The same, each call counted once for every sample that went through it.
        cache_tensors: Largest number of hidden-state sized tensors held at once, all contexts
            together.
        cache_bytes: Largest number of bytes held at once, all contexts together.
    """

    contexts: dict[str, list[StepRecord]] = field(default_factory=dict)
    block_calls: int = 0
    block_samples: int = 0
    cache_tensors: int = 0
    cache_bytes: int = 0

    @property
    def num_computed(self) -> int:
        """Steps that ran all blocks without asking the gate, over all contexts and samples."""
        return self._count("compute")

    @property
    def num_resumed(self) -> int:
        """Steps on which the gate asked for the remaining blocks, over all contexts."""
        return self._count("resume")

    @property
    def num_reused(self) -> int:
        """Steps that skipped the blocks behind the probe, over all contexts."""
        return self._count("reuse")

    def records(self) -> Iterator[StepRecord]:
        """All records, context by context."""
        for records in self.contexts.values():
            yield from records

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dictionaries, ready for JSON."""
        counts = {
            name: getattr(self, name) for name in ("num_computed", "num_resumed", "num_reused")
        }
        return {**counts, **asdict(self)}

    def _count(self, action: str) -> int:
        return sum(record.action == action for record in self.records())
