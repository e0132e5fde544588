"""Sparse VideoGen (arXiv 2502.01776): video models whose attention skips most of its blocks.

    from dicache import apply_sparse_videogen
    apply_sparse_videogen(pipe)          # one line, then use the pipeline as before

For HunyuanVideo and Wan. Most heads of a video model look either at their own and neighbouring
frames (spatial heads), or at their own and neighbouring places in all frames (temporal heads). In
every sparse layer and step `profiling` tells them apart by a few rows of their attention, `layout`
brings the temporal heads' tokens into token-major order, in which what they look at lies in the
same band around the diagonal (`masks`), `attention` computes that band's blocks, and `layout`
brings the tokens back. `processors` are a model's projections around that, and `hooks` finds out
which step and geometry a call has.

It is independent of the cache, and the two may be on one model, applied in any order. The leading
steps and blocks keep full attention; so does whatever does not fit, with one warning. Importing
this package imports neither diffusers nor Triton.
"""

from __future__ import annotations

from typing import Any

from .config import SparseVideoGenConfig
from .stats import AttentionRecord, SparseVideoGenStats

__all__ = [
    "AttentionRecord",
    "SparseVideoGenConfig",
    "SparseVideoGenStats",
    "apply_sparse_videogen",
    "get_sparse_videogen_stats",
    "remove_sparse_videogen",
]


def apply_sparse_videogen(
    pipe_or_transformer: Any, config: SparseVideoGenConfig | None = None
) -> None:
    """Make the attention of a pipeline's or a transformer's blocks over the video sparse.

    Args:
        pipe_or_transformer: A diffusers pipeline (every supported transformer of it, and the number
            of steps is read from its scheduler) or a diffusers transformer.
        config: The rules; `None` is `SparseVideoGenConfig()`, the family's own values.

    Raises:
        ValueError: The model is of no supported family, is sparse already, has attention processors
            that are not its family's, or the configuration does not fit it. The model is then
            unchanged.
        TypeError: `config` is not a `SparseVideoGenConfig`.
    """
    from .hooks import apply

    apply(pipe_or_transformer, config)


def remove_sparse_videogen(pipe_or_transformer: Any) -> None:
    """Give the model its full attention back. Warns where there is nothing to remove."""
    from .hooks import remove

    remove(pipe_or_transformer)


def get_sparse_videogen_stats(
    pipe_or_transformer: Any,
) -> SparseVideoGenStats | dict[str, SparseVideoGenStats]:
    """What the attention of the last run did: of one transformer, or of a pipeline's by name.

    Raises:
        ValueError: There is no Sparse VideoGen on the model, or not with
            `SparseVideoGenConfig(stats=True)`.
    """
    from ..adapters.diffusers.components import is_pipeline
    from .hooks import get_stats

    stats = get_stats(pipe_or_transformer)
    return stats if is_pipeline(pipe_or_transformer) else next(iter(stats.values()))
