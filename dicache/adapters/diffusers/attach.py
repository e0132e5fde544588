"""The verbs for diffusers: put the cache on pipelines and transformers, take it off, ask it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import DiCacheConfig
from ...core.session import DiCacheSession
from ...core.warning import warn_user
from ...driver.families import ModelFamily, find_family, supported_families
from ...driver.model import CachedModel, refuse_to_learn_of_several, rules_for
from .components import class_names, components_of, is_pipeline
from .other_caches import begin_refusing, refuse_others_before, stop_refusing
from .site import Site, find_feature, find_site
from .unsupported import refuse_unsupported

_CACHE = "cache"


class Cache:
    """The cache on one transformer.

    Raises:
        ValueError: The transformer cannot take it; nothing was changed.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: ModelFamily,
        config: DiCacheConfig,
        name: str | None = None,
    ) -> None:
        refuse_others_before(transformer)
        self.transformer, self.config = transformer, config
        self.site = find_site(transformer) or Site(transformer, family)
        rules = rules_for(config, family, transformer, name)
        self.model = CachedModel(transformer, family, rules, self.site, package="diffusers")

    @property
    def session(self) -> DiCacheSession:
        """The transformer's."""
        return self.model.session

    def attach(self, pipeline: Any) -> None:
        """Put it on; diffusers sees it from here on."""
        self.site.add(_CACHE, self, self.session.reset, pipeline)
        self.model.attach()
        self.transformer._cache_config = self.config  # type: ignore[assignment]
        begin_refusing(self.transformer)

    def detach(self) -> None:
        """Leave the transformer as it was."""
        stop_refusing(self.transformer)
        self.model.detach()
        self.site.remove(_CACHE)
        vars(self.transformer).pop("_cache_config", None)


is_holder = is_pipeline


def apply(model: Any, config: DiCacheConfig) -> None:
    """See `dicache.apply_dicache`."""
    caches, found = [], _transformers(model)
    refuse_to_learn_of_several(config, found)
    for name, (transformer, family) in found.items():
        known_as = name if is_pipeline(model) else None
        caches.append(Cache(transformer, family, config, known_as))
    first, *others = (cache.session.timeline for cache in caches)
    for timeline in others:  # experts of one run
        timeline.join(first)
    for cache in caches:  # only now, so that an error above leaves every transformer as it was
        cache.attach(model if is_pipeline(model) else None)


def remove(model: Any) -> None:
    """See `dicache.remove_dicache`."""
    found = _caches(model)
    if not found:
        warn_user(f"There is no DiCache on this {type(model).__name__}, so nothing was removed.")
    for cache in found.values():
        cache.detach()


def sessions(model: Any) -> dict[str, DiCacheSession]:
    """The sessions of a pipeline's transformers by component name, or of one transformer."""
    found = _caches(model)
    if not found:
        raise ValueError(
            f"There is no DiCache on this {type(model).__name__}. Call apply_dicache first."
        )
    return {name: cache.session for name, cache in found.items()}


def cache_on(transformer: Any) -> Cache | None:
    """The cache on a transformer, if there is one."""
    cache: Cache | None = find_feature(transformer, _CACHE)
    return cache


def _transformers(model: Any) -> dict[str, tuple[nn.Module, ModelFamily]]:
    """The supported transformers among a model's components, by name."""
    found = {}
    for name, part in components_of(model).items():
        family = find_family(part)
        if family is not None:
            found[name] = part, family
    if not found:
        for part in components_of(model).values():
            refuse_unsupported(part)
        known = ", ".join(dict.fromkeys(family.model_class for family in supported_families()))
        raise ValueError(
            f"DiCache does not support {type(model).__name__} ({class_names(model)}). Supported "
            f"transformers: {known}. dicache.register_family adds one."
        )
    return found


def _caches(model: Any) -> dict[str, Cache]:
    """The caches on a model's components, whether or not their family is still registered."""
    found = {name: cache_on(part) for name, part in components_of(model).items()}
    return {name: cache for name, cache in found.items() if cache is not None}
