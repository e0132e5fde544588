"""A `Site`: what all features on one transformer share.

One hook in diffusers' `HookRegistry`, by which a pipeline's `cache_context(...)` and its clean-up
at the end find them, and one locator, which is asked once a call however many features want to
know.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from torch import nn

from ...core.warning import warn_user
from ...core.where import Where
from ...driver.families import ModelFamily, unwrapped
from .components import components_of
from .locate import ContextReader, DiffusersLocator
from .other_caches import refuse_others_after

_HOOK = "dicache"
_CLEAN_UP = "_reset_stateful_cache"  # what pipelines call when they end; not every model has it


class _RootHook(ModelHook):
    """What diffusers finds on a transformer.

    It looks at every attribute in every `cache_context`, so there are few.
    """

    _is_stateful = True

    def __init__(self, site: Site, context: ContextReader) -> None:
        super().__init__()
        self.site, self.context = site, context

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by the pipeline when it ends."""
        self.site.reset()
        self.context.reset()
        return module


class Site:
    """What stands on a transformer; made with its first feature, gone with the last.

    Args:
        transformer: diffusers' model.
        family: Its row.

    Attributes:
        features: What stands on it, by name.
    """

    def __init__(self, transformer: nn.Module, family: ModelFamily) -> None:
        self._transformer = transformer
        parameters = inspect.signature(type(transformer).forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        names = None if takes_any else frozenset(parameters)
        self._locator = DiffusersLocator(transformer, family, names)
        self._hook = _RootHook(self, self._locator.context)
        self.features: dict[str, Any] = {}
        self._resets: dict[str, Callable[[], None]] = {}
        self._notes: dict[str, Hashable] = {}
        self._where: Where | None = None  # of the call that runs
        self._forward: Callable[..., Any] | None = None  # the transformer's, with this hook on it
        self._has_own_forward = False  # whether there was one on the instance before
        for name, what in ((family.timestep, "timestep"), (family.text, "text")):
            if names is not None and name is not None and name not in names:
                _warn_of_unknown_argument(transformer, family, name, what, [*parameters][1:])

    def where(self, arguments: Mapping[str, Any], layout: torch.Size | None = None) -> Where:
        """Where the call that runs stands; found out once, but for what depends on who asks.

        Args:
            arguments: Of the transformer's call, by name.
            layout: Shape [B, S, D] of its tokens, for those who know it.
        """
        if "_is_cached" in self._transformer.__dict__:  # not in that of an ordinary model
            refuse_others_after(self._transformer)
        where = self._where
        if where is None:
            self._where = where = self._locator.locate(arguments, layout)
        elif layout is not None:  # who asked before did not know it
            leaders = self._locator.leaders(where.context, layout)
            where = where._replace(layout=layout, leaders=leaders)
        if self._notes:
            where = where._replace(computes_in=(where.computes_in, *self._notes.values()))
        return where

    def groups(self) -> list[Any]:
        """See `driver.call.Locator`: the ranks of `enable_parallelism`, before or after us."""
        parallel = getattr(self._transformer, "_parallel_config", None)
        context = getattr(parallel, "context_parallel_config", None)
        return [] if context is None else [context._flattened_mesh.get_group()]

    def given(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """See `driver.call.Locator`. Some models' tokens are split by a hook on block 0."""
        registry = getattr(unwrapped(block), "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if isinstance(hook, ContextParallelSplitHook):
                args, kwargs = hook.pre_forward(block, *args, **kwargs)
        return args, kwargs

    def end_call(self) -> None:
        """The call is over, one way or another."""
        self._where = None

    def note(self, feature: str, state: Hashable) -> None:
        """Let a feature say what it makes of what lies behind a probe, in the call that runs."""
        self._notes[feature] = state

    def noted(self, feature: str) -> Hashable:
        """What a feature said last."""
        return self._notes.get(feature)

    def reset(self) -> None:
        """Free the state of all features."""
        for reset in self._resets.values():
            reset()

    def add(self, name: str, feature: Any, reset: Callable[[], None], pipeline: Any = None) -> None:
        """Put a feature on the transformer.

        Args:
            name: The feature's.
            feature: What `features` shall hold.
            reset: Frees its state.
            pipeline: That it was applied to, if it was a pipeline.
        """
        if pipeline is not None:
            self._locator.follow(pipeline)
        registry = HookRegistry.check_if_exists_or_initialize(self._transformer)
        if not self.features:
            self._has_own_forward = "forward" in vars(self._transformer)
            registry.register_hook(self._hook, _HOOK)
            self._forward = self._transformer.forward
            if not hasattr(self._transformer, _CLEAN_UP):
                vars(self._transformer)[_CLEAN_UP] = registry.reset_stateful_hooks
        registry.invalidate_child_registries_cache()  # pipelines that ran before look again
        self.features[name], self._resets[name] = feature, reset

    def remove(self, name: str) -> None:
        """Take a feature off; with the last one, leave nothing that was not there before."""
        transformer = self._transformer
        del self.features[name], self._resets[name]
        self._notes.pop(name, None)
        if self.features:
            return
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        forward = transformer.forward
        registry.remove_hook(_HOOK, recurse=False)
        if forward is not self._forward:  # put on after ours: the registry does not know it
            transformer.forward = forward
        registry.invalidate_child_registries_cache()
        attributes = vars(transformer)
        attributes.pop(_CLEAN_UP, None)
        if not self._has_own_forward:  # the registry puts one there, and leaves it
            function = getattr(attributes.get("forward"), "__func__", None)
            if forward is self._forward or function is type(transformer).forward:
                attributes.pop("forward", None)
        if not registry.hooks:
            del attributes["_diffusers_hook"]


def find_site(module: Any) -> Site | None:
    """The site on a module, if there is one."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(_HOOK)
    return None if hook is None else hook.site


def _cleaning_up(run: Any) -> Any:
    @functools.wraps(run)
    def call(self: ModularPipeline, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, *args, **kwargs)
        finally:
            for part in components_of(self).values():
                if find_site(part) is not None:
                    getattr(part, _CLEAN_UP)()

    return call


# Other pipelines tell their models when they end. Modular ones do not, and would hold the state of
# their last run until the next one.
ModularPipeline.__call__ = _cleaning_up(ModularPipeline.__call__)


def find_feature(module: Any, name: str) -> Any:
    """A feature on a module, or `None`."""
    site = find_site(module)
    return None if site is None else site.features.get(name)


def _warn_of_unknown_argument(
    transformer: nn.Module, family: ModelFamily, name: str, what: str, parameters: list[str]
) -> None:
    told = {
        "timestep": "new runs cannot be told from old ones",
        "text": "branches of guidance cannot be told apart where the pipeline names none",
    }[what]
    warn_user(
        f"{type(transformer).__name__}.forward has no argument {name!r}, so {told}, and such "
        f"steps are computed. Its arguments are {', '.join(parameters)}: name the right one in the "
        f"row of family {family.name!r}, ModelFamily({what}=...), or None if there is none."
    )
