"""Other caches on the same transformer: two do not stack, so whichever comes second is refused.

diffusers' own come by `enable_cache`, which leaves their configuration on the model, or by a
function (`apply_first_block_cache(model, ...)`), which puts hooks on its blocks and leaves nothing
else. Those are refused where a hook is registered. Caches of other packages (cache-dit,
ParaAttention) replace the model's `forward` and mark it; what comes after ours is noticed in the
next call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

from diffusers.hooks import HookRegistry
from torch import nn

_cached: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # transformers that have ours


def refuse_others_before(transformer: nn.Module) -> None:
    """See that a transformer has no cache yet.

    Raises:
        ValueError: It has one; the message names it.
    """
    config = getattr(transformer, "_cache_config", None)
    if config is not None and transformer not in _cached:
        _refuse(transformer, type(config).__name__, "disable_cache()")
    if transformer in _cached:
        _refuse(transformer, "DiCache", "remove_dicache(...)")
    for name in _caches_in_hooks(transformer):
        _refuse(transformer, name, "disable_cache(), or take its hooks off,")
    refuse_others_after(transformer)


def refuse_others_after(transformer: nn.Module) -> None:
    """See that no cache of another package is on a transformer; looked at in every call.

    Raises:
        ValueError: There is one; the message names it.
    """
    attributes = vars(transformer)
    if "_is_cached" in attributes and attributes["_is_cached"]:
        forward = attributes.get("forward")
        function: Any = getattr(forward, "__func__", forward)
        package = getattr(function, "__module__", None) or "another package"
        _refuse(transformer, f"a cache of {package.partition('.')[0]}", "its own switch")


def begin_refusing(transformer: nn.Module) -> None:
    """Ours is on this transformer now."""
    _cached.add(transformer)


def stop_refusing(transformer: nn.Module) -> None:
    """It is not any more."""
    _cached.discard(transformer)


def _caches_in_hooks(transformer: nn.Module) -> Iterator[str]:
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if isinstance(registry, HookRegistry) else ():
            name = _cache_of(hook)
            if name is not None:
                yield name


def _cache_of(hook: Any) -> str | None:
    """The cache of diffusers' that a hook belongs to; `None` if to none."""
    package, _, module = type(hook).__module__.rpartition(".")
    is_one = "cache" in module or module == "pyramid_attention_broadcast"
    return module if package == "diffusers.hooks" and is_one else None


def _refuse(transformer: nn.Module, what: str, remedy: str) -> None:
    raise ValueError(  # diffusers' own begins alike
        f"Caching has already been enabled on this {type(transformer).__name__}, with {what}, and "
        f"two caches do not stack. Call {remedy} first."
    )


def _refusing(register: Any) -> Any:
    @functools.wraps(register)
    def register_hook(self: HookRegistry, hook: Any, name: str) -> None:
        if _cached and _cache_of(hook) is not None:
            for transformer in _cached:
                if any(self._module_ref is module for module in transformer.modules()):
                    what = f"DiCache, so {_cache_of(hook)} is refused"
                    _refuse(transformer, what, "remove_dicache(...)")
        register(self, hook, name)

    return register_hook


HookRegistry.register_hook = _refusing(HookRegistry.register_hook)
