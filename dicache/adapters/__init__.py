"""What puts the cache into frameworks, a folder each, and the verbs.

The functions here import a framework when they are called, not before.
"""

from __future__ import annotations

from typing import Any

from ..config import DiCacheConfig
from ..stats import RunStats
from .diffusers import table as table  # registers its families
from .diffusers.autoload import teach_diffusers

__all__ = ["apply_dicache", "get_stats", "remove_dicache", "reset_dicache"]


def apply_dicache(pipe_or_transformer: Any, config: DiCacheConfig | None = None) -> None:
    """Cache a pipeline's or a transformer's denoising steps with DiCache.

    Args:
        pipe_or_transformer: A diffusers pipeline, modular ones included (every supported
            transformer of it is cached, and the number of steps is read from its scheduler), or a
            diffusers transformer.
        config: The rules; `None` is `DiCacheConfig()`, this project's default.

    Raises:
        ValueError: The model is of no supported family, is cached already, or the configuration
            does not fit it. The model is then unchanged.
        TypeError: `config` is not a `DiCacheConfig`.
    """
    from .diffusers.attach import apply

    apply(pipe_or_transformer, config)


def remove_dicache(pipe_or_transformer: Any) -> None:
    """Take the cache off again. Warns where there is none."""
    from .diffusers.attach import remove

    remove(pipe_or_transformer)


def reset_dicache(pipe_or_transformer: Any) -> None:
    """Free all cache state now; statistics stay.

    Raises:
        ValueError: There is no cache on the model.
    """
    from .diffusers.attach import sessions

    for session in sessions(pipe_or_transformer).values():
        session.reset()


def get_stats(pipe_or_transformer: Any) -> RunStats | dict[str, RunStats]:
    """Statistics of the last run: of one transformer, or of a pipeline's by component name.

    Each transformer's are of its own last run: one that a pipeline's call did not use keeps the
    statistics of an earlier call.

    Raises:
        ValueError: There is no cache on the model.
    """
    from .diffusers.attach import sessions
    from .diffusers.components import is_pipeline

    stats = {name: session.stats for name, session in sessions(pipe_or_transformer).items()}
    return stats if is_pipeline(pipe_or_transformer) else next(iter(stats.values()))


teach_diffusers()
