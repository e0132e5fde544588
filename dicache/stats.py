"""What a run did: one `StepRecord` a step and context, gathered in `RunStats`.

Plain numbers only: statistics hold no tensor, so they outlive the cache's state and cost nothing.
"""

from __future__ import annotations

import os
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
        num_blocks: Number of the model's blocks; 0 where a loop drives the session by itself.
        planned: Of contexts that follow a plan, the number of steps that it computes, a sample.
        num_vetoes: Steps that a plan reuses and that were computed all the same, over all contexts
            and samples.
        notes: What the cache had to say of this run: the texts of its warnings, and why it may have
            computed everything.
    """

    contexts: dict[str, list[StepRecord]] = field(default_factory=dict)
    block_calls: int = 0
    block_samples: int = 0
    cache_tensors: int = 0
    cache_bytes: int = 0
    num_blocks: int = 0
    planned: dict[str, int] = field(default_factory=dict)
    num_vetoes: int = 0
    notes: list[str] = field(default_factory=list)

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

    def mask(self, context: str, sample: int | None = None) -> str:
        """What was done in every step of a context, a letter each, as `DiCacheConfig.schedule`.

        C: computed, whether or not the gate was asked; R: reused.

        Args:
            context: Its name.
            sample: Row of the batch; needed where every sample has its own decisions.

        Raises:
            ValueError: There is no such context or sample, or the sample has to be said.
        """
        if context not in self.contexts:
            known = ", ".join(map(repr, self.contexts)) or "none"
            raise ValueError(f"There is no context {context!r}. Expected one of {known}.")
        records = self.contexts[context]
        samples = sorted({record.sample for record in records if record.sample is not None})
        if samples and sample not in samples:
            raise ValueError(
                f"sample is {sample} and every sample of {context!r} has its own decisions. "
                f"Expected one of {', '.join(map(str, samples))}."
            )
        mine = [record for record in records if record.sample in (None, sample)]
        return "".join("R" if record.action == "reuse" else "C" for record in mine)

    @property
    def block_speedup(self) -> float | None:
        """Block work of the un-cached run over that of this one; `None` where nobody counted."""
        calls = self.num_blocks * sum(
            len({record.step for record in records}) for records in self.contexts.values()
        )
        samples = {record.sample for record in self.records() if record.sample is not None}
        if samples:  # blocks may have run for a part of the batch
            return calls * len(samples) / self.block_samples if self.block_samples else None
        return calls / self.block_calls if calls and self.block_calls else None

    def summary(self) -> str:
        """All of it as a table for people, in plain ASCII."""
        header = ("context", "steps", "computed", "resumed", "reused", "planned")
        rows: list[tuple[str, ...]] = [header]
        for name, records in self.contexts.items():
            steps = len({record.step for record in records})
            counts = [
                sum(record.action == action for record in records)
                for action in ("compute", "resume", "reuse")
            ]
            planned = str(self.planned[name]) if name in self.planned else "-"
            rows.append((ascii(name)[1:-1], str(steps), *map(str, counts), planned))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        if self.block_speedup is not None:
            lines.append(f"block calls {self.block_calls}: {self.block_speedup:.2f}x less work")
        if self.planned:
            lines.append(
                f"vetoes {self.num_vetoes}: steps that the plan reused and a probe did not"
            )
        lines.append(f"cache {self.cache_bytes / 1e6:.1f} MB in {self.cache_tensors} tensors")
        if not self.num_reused:
            lines.append(f"Nothing was reused: {self._why_nothing()}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str], title: str = "DiCache") -> None:
        """Draw errors, actions and weights of every step, and write the picture to `path`.

        Raises:
            ValueError: There is no step to plot.
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from .schedule_plot import PlotRow, save_schedule_plot
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"RunStats.plot needs {error.name}, which is not installed: pip install matplotlib",
                name=error.name,
            ) from error
        rows = [PlotRow(name, records) for name, records in self.contexts.items()]
        save_schedule_plot(path, title, rows)

    def _why_nothing(self) -> str:
        """One sentence, where no step was reused."""
        asked = [record for record in self.records() if record.action == "resume"]
        if self.notes:
            return ascii(self.notes[0])[1:-1]
        if asked:
            least = min(record.accumulated_error or 0.0 for record in asked)
            return (
                f"the gate asked for all {len(asked)} steps that were probed, whose accumulated "
                f"error was {least:.3g} or more; a larger threshold reuses more."
            )
        if not any(self.contexts.values()):
            return "no step was seen."
        return (
            "no step was probed, for the rules compute the first steps and the last, and a step "
            "is probed only behind others of the same run."
        )

    def _count(self, action: str) -> int:
        return sum(record.action == action for record in self.records())
