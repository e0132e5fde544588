"""The verbs for original code: put the cache on models, take it off, ask it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import DiCacheConfig
from ...core.session import DiCacheSession
from ...core.warning import warn_user
from ...driver.model import CachedModel, rules_for
from .holder import family_of, is_holder, models_of, pipeline_of
from .locate import Experts, OriginalLocator, refuse_split_sequences

_CACHE = "_dicache"  # where a cached model has its cache

__all__ = ["apply", "is_holder", "models_of", "remove", "sessions"]


def apply(thing: Any, config: DiCacheConfig) -> None:
    """See `dicache.apply_dicache`."""
    models = models_of(thing)
    pipeline = pipeline_of(thing)
    experts = Experts(config.num_inference_steps) if len(models) > 1 else None
    cached = [_make(*each, config, pipeline, experts) for each in models.items()]
    for each in cached:  # only now, so that an error above leaves every model as it was
        each.attach()
        vars(each.model)[_CACHE] = each


def remove(thing: Any) -> None:
    """See `dicache.remove_dicache`."""
    found = _cached(thing)
    if not found:
        warn_user(f"There is no DiCache on this {type(thing).__name__}, so nothing was removed.")
    for each in found.values():
        del vars(each.model)[_CACHE]
        each.detach()


def sessions(thing: Any) -> dict[str, DiCacheSession]:
    """The sessions of a thing's models, by name."""
    found = _cached(thing)
    if not found:
        raise ValueError(
            f"There is no DiCache on this {type(thing).__name__}. Call apply_dicache first."
        )
    return {name: each.session for name, each in found.items()}


def _make(
    name: str, model: nn.Module, config: DiCacheConfig, pipeline: Any, experts: Experts | None
) -> CachedModel:
    family = family_of(model)
    assert family is not None  # models_of finds no other
    if _CACHE in vars(model):
        raise ValueError(
            f"Caching has already been enabled on this {type(model).__name__}, with DiCache. Call "
            f"remove_dicache(...) first."
        )
    refuse_split_sequences(model)
    rules = rules_for(config, family, model, name)
    locator = OriginalLocator(model, family, pipeline, experts)
    package = str(family.module)
    made = CachedModel(model, family, rules, locator, package, frees_last_steps=True)
    if experts is not None:
        experts.join(locator, made.session)
    return made


def _cached(thing: Any) -> dict[str, CachedModel]:
    found = {name: vars(model).get(_CACHE) for name, model in models_of(thing).items()}
    return {name: each for name, each in found.items() if each is not None}
