"""What is added to the tokens behind the probe, which does not see it: has it changed?

Residuals of a ControlNet begin, end, or change their scale in the middle of a run. An adapter takes
a sample of their elements in every call (`Where.behind`); whether it is like that of the steps that
a trajectory remembers is read along with the decision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_RATIO = 1.25  # of norms; between two steps a ControlNet's drift by a few per cent


def compare(now: Sequence[Tensor], entries: Sequence[Sequence[Tensor]]) -> Tensor:
    """Norms of every sample, now and in every entry, on the device.

    Args:
        now: Samples [n] of what is added in this step.
        entries: The same of the trajectory's entries.

    Returns:
        fp32 [samples, 1 + entries].
    """
    steps = (now, *entries)
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for step in steps for each in step]
    return torch.stack(norms).view(len(steps), len(now)).T


def has_changed(norms: Sequence[Sequence[float]], only_ends: bool = False) -> bool:
    """Whether something of an entry is unlike what is added now; `norms` are from `compare`.

    NaN is no change: what it spoils is noticed elsewhere.

    Args:
        norms: Those of every sample, now and in the entries.
        only_ends: Whether it matters only that something begins or ends.
    """
    largest = float("inf") if only_ends else _LARGEST_RATIO
    return any(_differ(now, entry, largest) for now, *entries in norms for entry in entries)


def _differ(a: float, b: float, largest_ratio: float) -> bool:
    small, large = sorted((a, b))
    if small == 0.0:
        return large > 0.0
    return large > small * largest_ratio
