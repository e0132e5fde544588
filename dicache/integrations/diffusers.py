"""DiCache in diffusers models: a root hook opens a step, a hook on every block asks it what to do.

The root hook asks the `CallTracker` which context and run a call belongs to. The hook of the last
probe block asks the session for a decision. On a reused step the blocks between pass their input
through, and the last one returns x plus the approximated residual whatever it was given: residuals
that the model adds between blocks (ControlNet) are part of y - x and must not count twice.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from ..config import DiCacheConfig
from ..session import DiCacheSession, DiCacheWarning, Step
from .calls import CallTracker
from .families import BlockStack, ModelFamily, find_family, supported_families

_HOOK = "dicache"


def apply(model: Any, config: DiCacheConfig | None = None) -> None:
    """See `dicache.apply_dicache`."""
    config = DiCacheConfig() if config is None else config
    if not isinstance(config, DiCacheConfig):
        raise TypeError(f"config is a {type(config).__name__}. Expected a DiCacheConfig.")
    pipeline = model if is_pipeline(model) else None
    caches = [_TransformerCache(each, config, pipeline) for each in _transformers(model).values()]
    for cache in caches:  # only now, so that an error above leaves every transformer as it was
        cache.attach()


def remove(model: Any) -> None:
    """See `dicache.remove_dicache`."""
    found = _root_hooks(model)
    if not found:
        warnings.warn(
            f"There is no DiCache on this {type(model).__name__}, so nothing was removed.",
            DiCacheWarning,
            stacklevel=3,
        )
    for hook in found.values():
        hook.cache.detach()


def sessions(model: Any) -> dict[str, DiCacheSession]:
    """The sessions of a pipeline's transformers by component name, or of one transformer."""
    found = _root_hooks(model)
    if not found:
        raise ValueError(
            f"There is no DiCache on this {type(model).__name__}. Call apply_dicache first."
        )
    return {name: hook.cache.session for name, hook in found.items()}


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a pipeline, that is, has components."""
    return isinstance(model, DiffusionPipeline)


def _components(model: Any) -> dict[str, Any]:
    """A pipeline's components by name, or the given model as "transformer"."""
    parts = model.components if is_pipeline(model) else {"transformer": model}
    return {name: unwrap_module(part) for name, part in parts.items() if part is not None}


def _transformers(model: Any) -> dict[str, nn.Module]:
    """The supported transformers among a model's components."""
    parts = _components(model)
    found = {name: part for name, part in parts.items() if find_family(part) is not None}
    if not found:
        given = {n: p for n, p in parts.items() if n.startswith("transformer")} or parts
        classes = ", ".join(sorted({type(part).__name__ for part in given.values()}))
        known = ", ".join(family.model_class for family in supported_families())
        raise ValueError(
            f"DiCache does not support {type(model).__name__} ({classes}). Supported transformers: "
            f"{known}. dicache.integrations.register_family adds one."
        )
    return found


def _root_hooks(model: Any) -> dict[str, _RootHook]:
    """Our hooks on a model's components, whether or not their family is still registered."""
    found = {name: _root_hook(part) for name, part in _components(model).items()}
    return {name: hook for name, hook in found.items() if hook is not None}


def _root_hook(module: Any) -> _RootHook | None:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(_HOOK)


class _TransformerCache:
    """The cache of one transformer: its session, and what the hooks of one call share.

    Raises:
        ValueError: The transformer cannot take the cache; nothing was changed.
    """

    def __init__(
        self, transformer: nn.Module, config: DiCacheConfig, pipeline: DiffusionPipeline | None
    ) -> None:
        family = find_family(transformer)
        assert family is not None  # _transformers lets only supported ones pass
        self.transformer, self.config = transformer, config
        self.blocks = family.blocks(transformer)
        self._check()
        resolved = _with_threshold(config, transformer, family)
        ascending = family.ascending_timesteps
        self.session = DiCacheSession(resolved, ascending_timesteps=ascending)
        self.calls = CallTracker(self.session, pipeline)
        self._parameters = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self.step: Step | None = None  # set while the transformer runs
        self.x: Tensor | None = None  # [B, S, D] tokens before block 0, as long as needed
        self.p: Tensor | None = None  # [B, S, D] tokens after the probe
        self.num_tokens = 0

    def attach(self) -> None:
        """Register the hooks; the root hook makes the cache visible to diffusers.

        Steps are opened and closed by torch's own hooks: offloading replaces a model's `forward`
        at the end of every call, and whatever wraps it is lost.
        """
        registry = HookRegistry.check_if_exists_or_initialize(self.transformer)
        registry.register_hook(_RootHook(self), _HOOK)
        self._root_forward = self.transformer.forward
        self._handles = (
            self.transformer.register_forward_pre_hook(self._open_step, with_kwargs=True),
            self.transformer.register_forward_hook(self._close_step, always_call=True),
        )
        for index, (block, stack) in enumerate(self.blocks):
            hook = _BlockHook(self, block, stack, index)
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, _HOOK)
        registry.invalidate_child_registries_cache()
        self.transformer._cache_config = self.config  # type: ignore[assignment]

    def detach(self) -> None:
        """Take the hooks off and free the state."""
        self.calls.reset()
        for handle in self._handles:
            handle.remove()
        registry = HookRegistry.check_if_exists_or_initialize(self.transformer)
        forward = self.transformer.forward
        registry.remove_hook(_HOOK, recurse=True)
        if forward is not self._root_forward:  # put on after ours: the registry does not know it
            self.transformer.forward = forward
        registry.invalidate_child_registries_cache()
        self.transformer._cache_config = None  # type: ignore[assignment]

    def _open_step(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.step is not None:  # the call before was interrupted and never closed
            self.session.reset()
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        self.step = self.calls.open_step(arguments)

    def _close_step(self, module: nn.Module, args: Any, output: Any) -> None:
        step, self.step = self.step, None
        self.x = self.p = None
        if step is not None:
            step.close()
        if output is None:  # forward raised: an aborted run leaves nothing behind
            self.session.reset()

    def enter_blocks(self, hidden_states: Tensor) -> None:
        """Note the tokens that enter block 0."""
        self.x, self.num_tokens = hidden_states, hidden_states.shape[1]

    def after_probe(self, p: Tensor) -> None:
        """Take the decision; on a computed step move x and p into the cache's buffers."""
        assert self.step is not None and self.x is not None  # block 0 ran before
        if self.step.needs_probe:
            self.step.probe(self.x, p)
        if self.step.action != "reuse":
            self.x, self.p = self.step.hold(self.x, p)

    def after_last_block(self, y: Tensor) -> None:
        """Record a computed step."""
        assert self.step is not None and self.x is not None and self.p is not None
        self.step.record(self.x, self.p, y)
        self.x = self.p = None

    def _check(self) -> None:
        name = type(self.transformer).__name__
        if _root_hook(self.transformer) is not None:
            raise ValueError(f"This {name} has DiCache already. Call remove_dicache first.")
        other = getattr(self.transformer, "_cache_config", None)
        if other is not None:
            raise ValueError(
                f"This {name} is cached with {type(other).__name__}, and two caches do not stack. "
                f"Call disable_cache() first."
            )
        if self.config.probe_depth >= len(self.blocks):
            raise ValueError(
                f"probe_depth is {self.config.probe_depth} and this {name} has {len(self.blocks)} "
                f"blocks. Expected a probe_depth smaller than the number of blocks."
            )


def _with_threshold(
    config: DiCacheConfig, transformer: nn.Module, family: ModelFamily
) -> DiCacheConfig:
    if config.threshold is not None:
        return config
    threshold = family.threshold
    if config.verifies_alignment:
        own = getattr(transformer, "config", {}).get("_dicache_threshold")
        threshold = family.default_threshold if own is None else own
    return replace(config, threshold=threshold)


class _RootHook(ModelHook):
    """What diffusers finds on the transformer: the pipeline's context, and the reset at its end."""

    _is_stateful = True

    def __init__(self, cache: _TransformerCache) -> None:
        super().__init__()
        self.cache = cache
        self.context = cache.calls.context

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by the pipeline when it ends."""
        self.cache.calls.reset()
        self.context.reset()
        return module


class _BlockHook(ModelHook):
    """Runs a block or passes its input through, as the open step says."""

    def __init__(
        self, cache: _TransformerCache, block: nn.Module, stack: BlockStack, index: int
    ) -> None:
        super().__init__()
        self.cache, self.stack, self.index = cache, stack, index
        self.ends_probe = index == cache.config.probe_depth - 1
        self.is_last = index == len(cache.blocks) - 1
        parameters = list(inspect.signature(type(unwrap_module(block)).forward).parameters)[1:]
        self._positions = {name: parameters.index(name) for name in stack.outputs}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        if cache.step is None:  # called on its own, outside the transformer
            return self.fn_ref.original_forward(*args, **kwargs)
        if self.index == 0:
            cache.enter_blocks(self._argument(self.stack.hidden_states, args, kwargs))
        if cache.step.action == "reuse":
            return self._skip(args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        cache.session.stats.block_calls += 1
        if self.ends_probe:
            cache.after_probe(self._tokens(output))
        if self.is_last:
            cache.after_last_block(self._tokens(output))
        return output

    def _skip(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = {name: self._argument(name, args, kwargs) for name in self.stack.outputs}
        if self.is_last:
            step, x = self.cache.step, self.cache.x
            assert step is not None and x is not None  # set by block 0 of this call
            y, name = step.reuse(x), self.stack.hidden_states
            if self.stack.text_in_front:
                text = values[name][:, : -self.cache.num_tokens]
                y = torch.cat([text.to(y.dtype), y], dim=1)
            values[name] = y
        outputs = tuple(values.values())
        return outputs if len(outputs) > 1 else outputs[0]

    def _tokens(self, output: Any) -> Tensor:
        """The image tokens [B, S, D] of a block's output."""
        names = self.stack.outputs
        hidden = output if len(names) == 1 else output[names.index(self.stack.hidden_states)]
        return hidden[:, -self.cache.num_tokens :] if self.stack.text_in_front else hidden

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[self._positions[name]]
