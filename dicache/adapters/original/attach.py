"""The verbs for original code: put the cache on models, take it off, ask it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import DiCacheConfig
from ...driver.model import CachedModel, refuse_to_learn_of_several, rules_for
from ..holders import refuse_cached
from .holder import HOLDERS, pipeline_of
from .locate import Experts, OriginalLocator

__all__ = ["apply", "is_holder", "models_of", "remove", "sessions"]

models_of, is_holder = HOLDERS.models_of, HOLDERS.is_holder
remove, sessions = HOLDERS.remove, HOLDERS.sessions


def apply(thing: Any, config: DiCacheConfig) -> None:
    """See `dicache.apply_dicache`."""
    models = models_of(thing)
    refuse_to_learn_of_several(config, models)
    pipeline = pipeline_of(thing)
    experts = Experts(config.num_inference_steps) if len(models) > 1 else None
    # All are made before the first one is put on, so that an error leaves every model as it was.
    HOLDERS.attach([_make(*each, config, pipeline, experts) for each in models.items()])


def _make(
    name: str, model: nn.Module, config: DiCacheConfig, pipeline: Any, experts: Experts | None
) -> CachedModel:
    family = HOLDERS.family_of(model)
    assert family is not None  # models_of finds no other
    refuse_cached(model)
    rules = rules_for(config, family, model, name)
    locator = OriginalLocator(model, family, pipeline, experts)
    package = str(family.module)
    made = CachedModel(model, family, rules, locator, package, frees_last_steps=True)
    if experts is not None:
        experts.join(locator, made.session)
    return made
