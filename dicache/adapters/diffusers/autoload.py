"""`transformer.enable_cache(DiCacheConfig())`: extends diffusers' `CacheMixin` once it is imported.

Works whichever of the two packages is imported first, and imports neither by itself. Every other
configuration reaches diffusers' own methods untouched.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ...config import DiCacheConfig

_CACHE_MODULE = "diffusers.models.cache_utils"


def teach_diffusers() -> None:
    """Extend `CacheMixin` now, or as soon as diffusers defines it."""
    module = sys.modules.get(_CACHE_MODULE)
    if module is not None:
        _extend_cache_mixin(module)
    else:
        sys.meta_path.insert(0, _CacheModuleFinder())


class _CacheModuleFinder(importlib.abc.MetaPathFinder):
    """Lets the import system find diffusers' cache module as usual, and extends it once it ran."""

    def __init__(self) -> None:
        self._asking_others = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _CACHE_MODULE or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking_others = False
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._extending(spec.loader.exec_module)  # type: ignore
        return spec

    def _extending(self, run_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def exec_module(module: ModuleType) -> None:
            run_module(module)
            _extend_cache_mixin(module)
            sys.meta_path.remove(self)  # only now: an import that failed may be tried again

        return exec_module


def _extend_cache_mixin(module: ModuleType) -> None:
    mixin = module.CacheMixin
    enable_others, disable_others = mixin.enable_cache, mixin.disable_cache

    @functools.wraps(enable_others)
    def enable_cache(self: Any, config: Any) -> None:
        if not isinstance(config, DiCacheConfig):
            return enable_others(self, config)
        from .attach import apply

        apply(self, config)

    @functools.wraps(disable_others)
    def disable_cache(self: Any) -> None:
        if not isinstance(self._cache_config, DiCacheConfig):
            return disable_others(self)
        from .attach import remove

        remove(self)

    mixin.enable_cache, mixin.disable_cache = enable_cache, disable_cache
