"""What many tests need to look at: masks of what was done, and the few insides that they watch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dicache import DiCacheSession, StepRecord, get_stats
from dicache.adapters.diffusers.attach import cache_on
from dicache.adapters.diffusers.site import find_feature
from dicache.core.trajectory import Trajectory
from dicache.driver.model import CachedModel


def mask(records: Iterable[StepRecord], resumed: str = "c") -> str:
    """A letter a step: C computed, c resumed (or as `resumed` says), R reused."""
    letters = {"compute": "C", "resume": resumed, "reuse": "R"}
    return "".join(letters[record.action] for record in records)


def masks(model: Any, resumed: str = "c") -> dict[str, str]:
    """Those of a transformer, or of a pipeline's only one, by context."""
    stats = get_stats(model)
    stats = stats["transformer"] if isinstance(stats, dict) else stats
    return {name: mask(records, resumed) for name, records in stats.contexts.items()}


def trajectory_of(session: DiCacheSession, name: str = "cond") -> Trajectory:
    """Of the branch that the statistics call so."""
    for branch in session.timeline.run.branches:
        if branch.name == name and branch.state.trajectory is not None:
            return branch.state.trajectory
    raise LookupError(f"{name!r} has no trajectory")


def small_bytes(batch: int, count: int) -> int:
    """What a context keeps beside its `count` large tensors [B, ...], in bytes: fp32 and int32.

    Of a sample: newest, the entries' 4 sums, and 6, 5 or 7 of the step; and (error, gamma), of the
    batch too.
    """
    return 4 * (batch * (1 + 4 + {4: 6, 5: 5, 6: 7}[count]) + 2 * (batch + 1))


def cached_model(model: nn.Module) -> CachedModel:
    """What `apply_dicache` put on a transformer."""
    cache = cache_on(model)
    assert cache is not None
    return cache.model


def sparse_part(model: nn.Module) -> Any:
    """What `apply_sparse_videogen` put on a transformer."""
    return find_feature(model, "sparse_videogen")
