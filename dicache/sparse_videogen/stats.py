"""What the attention of a run did: its density, and which heads were taken for temporal ones.

Plain numbers only, which `recorder` makes of what a run left on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AttentionRecord:
    """The attention of one block in one step of one context.

    Attributes:
        step: Index of the step, from 0.
        block: Index of the block, from 0.
        kept: Elements of the attention's maps that were kept: pairs of valid tokens, of one head,
            added up over the samples. Padding does not count.
        elements: The same of full attention.
        temporal: For every sample and head, whether it was taken for a temporal one; `None` where
            attention was full.
    """

    step: int
    block: int
    kept: int
    elements: int
    temporal: tuple[tuple[bool, ...], ...] | None = None


@dataclass
class SparseVideoGenStats:
    """The attention of one run.

    Attributes:
        contexts: The records of every context (`"cond"`, `"uncond"`, ...), in the order of calls.
            Blocks that a cache skipped have none.
    """

    contexts: dict[str, list[AttentionRecord]] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Kept elements over elements, of all attention that was computed; 1 if there was none."""
        records = list(self.records())
        elements = sum(record.elements for record in records)
        return sum(record.kept for record in records) / elements if elements else 1.0

    def temporal_shares(self) -> dict[int, list[float]]:
        """For every sparse block, how often each head was a temporal one, 0 to 1.

        The share is over the sparse steps, contexts and samples.
        """
        found: dict[int, list[tuple[bool, ...]]] = {}
        for record in self.records():
            if record.temporal is not None:
                found.setdefault(record.block, []).extend(record.temporal)
        return {
            block: [sum(head) / len(head) for head in zip(*found[block], strict=True)]
            for block in sorted(found)
        }

    def records(self) -> Iterator[AttentionRecord]:
        """All records, context by context."""
        for records in self.contexts.values():
            yield from records
