"""The one hook in diffusers' `HookRegistry` that a part of ours puts on a transformer, and its end.

It lets diffusers find us: a pipeline's `cache_context(...)` reaches the tracker of calls through
it, and the pipeline's clean-up frees our state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from .calls import CallTracker


class RootHook(ModelHook):
    """What diffusers finds on a transformer: the pipeline's context, and the reset at its end.

    Args:
        owner: The part of ours that stands behind it.
        calls: Whose context the pipeline sets.
        reset: Frees the owner's state; called by the pipeline when it ends.
    """

    _is_stateful = True

    def __init__(self, owner: Any, calls: CallTracker, reset: Callable[[], None]) -> None:
        super().__init__()
        self.owner = owner
        self.context = calls.context
        self._reset = reset
        self._forward: Callable[..., Any] | None = None  # the transformer's, with this hook on it

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by the pipeline when it ends."""
        self._reset()
        self.context.reset()
        return module

    def put_on(self, transformer: nn.Module, name: str) -> None:
        """Register it under this name; pipelines that ran before look again."""
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        registry.register_hook(self, name)
        self._forward = transformer.forward
        registry.invalidate_child_registries_cache()

    def take_off(self, transformer: nn.Module, name: str) -> None:
        """Leave nothing that was not there before, unless somebody else uses it by now."""
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        forward = transformer.forward
        registry.remove_hook(name, recurse=False)
        if forward is not self._forward:  # put on after ours: the registry does not know it
            transformer.forward = forward
        registry.invalidate_child_registries_cache()
        attributes = vars(transformer)
        if getattr(attributes.get("forward"), "__func__", None) is type(transformer).forward:
            del attributes["forward"]
        if not registry.hooks:
            del attributes["_diffusers_hook"]


def find_root_hook(module: Any, name: str) -> RootHook | None:
    """The hook of this name on a module, if there is one."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)
