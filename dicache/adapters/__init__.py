"""What puts the cache into frameworks, a folder each, and the verbs.

The functions here import a framework when they are called, not before, and only the one that what
they are given is of.
"""

from __future__ import annotations

from typing import Any, overload

from torch import nn

from ..config import DiCacheConfig
from ..core.session import DiCacheSession
from ..stats import RunStats
from .diffusers import table as table  # registers its families
from .diffusers.autoload import teach_diffusers
from .original import holder as holder  # whose table registers those of original code
from .serving import attach as for_engines  # those of serving engines

__all__ = [
    "apply_dicache",
    "context_parallel_plan",
    "get_stats",
    "remove_dicache",
    "reset_dicache",
]


def apply_dicache(model_or_holder: Any, config: DiCacheConfig | None = None) -> None:
    """Cache a pipeline's or a transformer's denoising steps with DiCache.

    Args:
        model_or_holder: A diffusers pipeline, modular ones included (every supported transformer of
            it is cached, and the number of steps is read from its scheduler), or a diffusers
            transformer. Or a model of the original HunyuanVideo or Wan code, or an object that
            holds some (`WanT2V`, Tencent's sampler). Or a pipeline of a serving engine.
        config: The rules; `None` is `DiCacheConfig()`, this project's default.

    Raises:
        ValueError: The model is of no supported family, is cached already, or the configuration
            does not fit it. The model is then unchanged.
        TypeError: `config` is not a `DiCacheConfig`.
    """
    config = DiCacheConfig() if config is None else config
    if not isinstance(config, DiCacheConfig):
        raise TypeError(f"config is a {type(config).__name__}. Expected a DiCacheConfig.")
    _adapter_of(model_or_holder).apply(model_or_holder, config)


def remove_dicache(model_or_holder: Any) -> None:
    """Take the cache off again. Warns where there is none."""
    _adapter_of(model_or_holder).remove(model_or_holder)


def reset_dicache(model_or_holder: Any) -> None:
    """Free all cache state now; statistics stay.

    Raises:
        ValueError: There is no cache on the model.
    """
    for session in _adapter_of(model_or_holder).sessions(model_or_holder).values():
        session.reset()


def context_parallel_plan(transformer: nn.Module) -> dict[str, Any]:
    """How `transformer.enable_parallelism(config=..., cp_plan=...)` splits a diffusers model.

    diffusers' own plan where it has one, ours for HunyuanVideo, which also gets hooks that rebuild
    its mask; see `dicache.adapters.diffusers.context_parallel`.

    Raises:
        ValueError: Nobody has a plan for this class, or for its kind of conditioning.
    """
    from .diffusers.context_parallel import context_parallel_plan as plan

    return plan(transformer)


def sessions_of(model_or_holder: Any) -> dict[str, DiCacheSession]:
    """The sessions of a model, or of a pipeline's or holder's, by their names.

    Raises:
        ValueError: There is no cache on the model.
    """
    return _adapter_of(model_or_holder).sessions(model_or_holder)


@overload
def get_stats(model_or_holder: nn.Module) -> RunStats: ...


@overload
def get_stats(model_or_holder: Any) -> dict[str, RunStats]: ...


def get_stats(model_or_holder: Any) -> RunStats | dict[str, RunStats]:
    """Statistics of the last run: of one model, or of a pipeline's or holder's by their names.

    Each model's are of its own last run: one that a pipeline's call did not use keeps the
    statistics of an earlier call.

    Raises:
        ValueError: There is no cache on the model.
    """
    adapter = _adapter_of(model_or_holder)
    sessions = adapter.sessions(model_or_holder)
    stats = {name: session.stats for name, session in sessions.items()}
    return stats if adapter.is_holder(model_or_holder) else next(iter(stats.values()))


def _adapter_of(thing: Any) -> Any:
    """The module with the verbs for what a thing is of.

    Raises:
        ValueError: It is of no original code and no engine, and there is no diffusers that knows
            caches.
    """
    from .original import attach as for_original

    for adapter in (for_original, for_engines):
        if adapter.models_of(thing):
            return adapter
    try:
        from .diffusers import attach as for_diffusers
    except ImportError as error:
        raise ValueError(
            f"DiCache finds no model of the original HunyuanVideo or Wan code, or of a serving "
            f"engine, in this {type(thing).__name__}, and for diffusers' own it needs diffusers "
            f"0.42 or newer ({error}): pip install 'diffusers>=0.42' transformers accelerate"
        ) from error
    return for_diffusers


teach_diffusers()
