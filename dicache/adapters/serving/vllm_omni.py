"""The entry point for vLLM-Omni: `cache_backend="dicache"` is a cache backend.

vLLM-Omni has no table of backends: a function chooses one by its name. `register` puts another one
around it, where it is defined and where the model runner has it from. vLLM-Omni calls `register` in
each of its processes, also where nobody wants a cache, and an error here would end it; so whatever
is not as expected is a line in the log, and everything else stays as it was.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

NAME = "dicache"
_CHOICE = "get_cache_backend"
_SELECTOR = "vllm_omni.diffusion.cache.selector"
_RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"

_log = logging.getLogger(__name__)


def register() -> None:
    """Make the name known; once, however often it is called. Never raises."""
    try:
        modules = [import_module(_SELECTOR)]
        if _RUNNER in sys.modules:  # else it is going to take the selector's
            modules.append(sys.modules[_RUNNER])
        choices = [getattr(module, _CHOICE) for module in modules]
        for choose in choices:
            _check(choose)
        for module, choose in zip(modules, choices, strict=True):
            if not hasattr(choose, "_with_dicache"):
                setattr(module, _CHOICE, _with_dicache(choose))
    except Exception as error:
        _log.warning(
            "DiCache %s is not available as a cache backend of vLLM-Omni %s. Expected vLLM-Omni "
            "0.30, with %s(cache_backend, cache_config) in %s and an abstract CacheBackend of "
            "enable(pipeline) and refresh(pipeline, num_inference_steps, verbose). %s: %s",
            _version("dicache"),
            _version("vllm-omni"),
            _CHOICE,
            _SELECTOR,
            type(error).__name__,
            error,
        )


def _check(choose: Callable[..., Any]) -> None:
    """See that these are the parts that we were written for.

    Raises:
        TypeError, ImportError: They are not.
    """
    from .vllm_omni_backend import DiCacheBackend

    names = [*inspect.signature(choose).parameters]
    if names[:2] != ["cache_backend", "cache_config"]:
        raise TypeError(f"{_CHOICE} takes ({', '.join(names)})")
    missing = ", ".join(sorted(DiCacheBackend.__abstractmethods__))
    if missing:
        raise TypeError(f"CacheBackend asks for {missing}, too")


def _with_dicache(choose: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(choose)
    def get_cache_backend(cache_backend: str | None, cache_config: Any, *more: Any) -> Any:
        if cache_backend != NAME:
            return choose(cache_backend, cache_config, *more)
        from .vllm_omni_backend import DiCacheBackend

        return DiCacheBackend(cache_config)

    get_cache_backend._with_dicache = True  # type: ignore[attr-defined]
    return get_cache_backend


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of no known version)"
