"""Keeps what a run's attention did, for `SparseVideoGenConfig(stats=True)`.

While a run goes on, the small tensors that the processors left behind are kept where they are, so
that nothing waits for the device. Numbers are made of them when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attention import Plan
from .masks import kept_elements
from .stats import AttentionRecord, SparseVideoGenStats


@dataclass
class _Call:
    """One call of a transformer, as it was left on the device.

    Attributes:
        valid: int32 [B], the valid tokens of every sample.
        heads: What every block's processor left; `None` for a block that did not run.
    """

    context: str
    step: int
    valid: Tensor
    plan: Plan | None
    heads: list[Tensor | None] = field(default_factory=list)


class Recorder:
    """Gathers the calls of a run; one that is begun and not ended, as it raised, has no heads."""

    def __init__(self) -> None:
        self._run: object = None
        self._calls: list[_Call] = []

    def begin(self, run: object, context: str, step: int, valid: Tensor, plan: Plan | None) -> None:
        """Note a call before its blocks run; one of another `run` than the last begins anew."""
        if run is not self._run:
            self._run, self._calls = run, []
        self._calls.append(_Call(context, step, valid, plan))

    def end(self, heads: Iterable[Tensor | None]) -> None:
        """Keep what the processors left in the call that was begun last."""
        self._calls[-1].heads = list(heads)

    def stats(self) -> SparseVideoGenStats:
        """What was gathered, as plain numbers; reads the device."""
        stats = SparseVideoGenStats()
        for call in self._calls:
            stats.contexts.setdefault(call.context, []).extend(_records(call))
        return stats


def _records(call: _Call) -> Iterator[AttentionRecord]:
    full = sum(valid**2 for valid in call.valid.tolist())
    kept = full if call.plan is None else _kept(call.plan)
    for block, heads in enumerate(call.heads):
        if heads is None:
            continue
        if heads.shape[1]:
            kinds = tuple(tuple(map(bool, sample)) for sample in heads.tolist())
            yield AttentionRecord(call.step, block, kept, full, kinds)
        else:
            # Of a part of the batch it is not known which: they count as its mean sample.
            elements = full * heads.shape[0] // len(call.valid)
            yield AttentionRecord(call.step, block, elements, elements)


def _kept(plan: Plan) -> int:
    bounds = plan.bounds.cpu().long()
    samples = [
        kept_elements(sink, video_end, torch.tensor(valid_end), torch.tensor(window))
        for sink, video_end, valid_end, window in bounds.tolist()
    ]
    return int(sum(samples))
