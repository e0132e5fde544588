"""DiCache in diffusers models: hooks on the root open a step, the calls of its blocks follow it.

The hook on the root asks the `CallTracker` which context and run a call belongs to. The call of the
last probe block asks the session for a decision. On a reused step the blocks between pass their
input through, and the last one returns x plus the approximated residual whatever it was given:
residuals that the model adds between blocks (ControlNet) are part of y - x, and must not count
twice.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame

from .. import phase
from ..config import DiCacheConfig
from ..session import DiCacheSession, DiCacheWarning, Step
from .bypass import Bypass, twin_class
from .calls import CallTracker
from .compiling import compiled_like, under
from .families import BlockStack, ModelFamily, find_family, supported_families
from .root_hook import RootHook, find_root_hook
from .rows import Rows, UnknownRowsError

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
        hook.owner.detach()


def sessions(model: Any) -> dict[str, DiCacheSession]:
    """The sessions of a pipeline's transformers by component name, or of one transformer."""
    found = _root_hooks(model)
    if not found:
        raise ValueError(
            f"There is no DiCache on this {type(model).__name__}. Call apply_dicache first."
        )
    return {name: hook.owner.session for name, hook in found.items()}


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a pipeline, that is, has components."""
    return isinstance(model, DiffusionPipeline)


def components_of(model: Any) -> dict[str, Any]:
    """A pipeline's components by name, or the given model as "transformer"."""
    parts = model.components if is_pipeline(model) else {"transformer": model}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        part = unwrap_module(part)
        if part is not None and all(part is not other for other in found.values()):
            found[name] = part
    return found


def needs_gradients(transformer: nn.Module, hidden_states: Tensor) -> bool:
    """Whether gradients of the model or of these tokens are asked for, where they are enabled."""
    parameters = transformer.parameters()
    return hidden_states.requires_grad or any(each.requires_grad for each in parameters)


def _transformers(model: Any) -> dict[str, nn.Module]:
    """The supported transformers among a model's components."""
    parts = components_of(model)
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


def _root_hooks(model: Any) -> dict[str, RootHook]:
    """Our hooks on a model's components, whether or not their family is still registered."""
    found = {name: find_root_hook(part, _HOOK) for name, part in components_of(model).items()}
    return {name: hook for name, hook in found.items() if hook is not None}


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
        self._parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.step: Step | None = None  # set while the transformer runs
        self.x: Tensor | None = None  # [B, S, D] tokens before block 0, as long as needed
        self.p: Tensor | None = None  # [B, S, D] tokens after the probe
        self.num_tokens = 0
        self.arguments: dict[str, Any] = {}  # of the transformer's call, by name
        self.skips = False  # whether blocks pass their input through, after the decision to reuse
        self.rows: Rows | None = None  # the samples that blocks run for, if not for all
        corners = {0, config.probe_depth - 1, len(self.blocks) - 1}
        self.block_calls = [
            _CornerCall(self, block, stack, index)
            if index in corners
            else _BlockCall(self, block, stack)
            for index, (block, stack) in enumerate(self.blocks)
        ]
        self._surrounding: Callable[..., Any] | None = None  # dynamo's, of a compiled caller
        self._compile: Callable[..., Any] | None = None  # as the transformer itself was compiled
        self._in_use = threading.Lock()
        self.corner_calls = [self.block_calls[index] for index in sorted(corners)]
        self.bypasses = self._make_bypasses(family)

    def _make_bypasses(self, family: ModelFamily) -> list[Bypass]:
        """For each list of blocks, what it holds instead of those behind the probe but the last."""
        corners = {call.block for call in self.corner_calls}
        probe = {call.stack.attribute for call in self.block_calls[: self.config.probe_depth]}
        is_other = type(self.transformer).__name__ != family.model_class  # a subclass
        bypasses = []
        for stack in family.stacks:
            calls = [each for each in self.block_calls if each.stack is stack]
            classes: dict[type, type] = {}
            for call in calls:  # one a kind: what is touched in every step should be little
                kind = type(call.block)
                if kind not in classes:
                    made = twin_class(kind, self, stack.outputs, tuple(call.places))
                    classes |= {} if made is None else {kind: made}
            chosen = {call.block for call in calls} - corners
            whole_for = None if is_other or stack.attribute in probe else stack.whole_for
            blocks = getattr(self.transformer, stack.attribute)
            bypasses.append(Bypass(blocks, classes, chosen, whole_for))
        return bypasses

    def attach(self) -> None:
        """Take the place of the calls; the root hook makes the cache visible to diffusers."""
        self._compiled_before = self.transformer._compiled_call_impl
        if self._compiled_before is not None:
            self._compile = compiled_like(self._compiled_before)
            if self._compile is None:  # first of all: a warning may be made an error
                self._warn_of_plain_blocks()
        is_bare = _has_own_forward(self.transformer)
        self._hook = RootHook(self, self.calls, self.calls.reset)
        self._hook.put_on(self.transformer, _HOOK)
        self._bare_forward = self.transformer.forward if is_bare else None
        for call in self.block_calls:
            call.install(self._compile)
        self._take_root_call()
        self.transformer._cache_config = self.config  # type: ignore[assignment]

    def _warn_of_plain_blocks(self) -> None:
        warnings.warn(
            f"This {type(self.transformer).__name__} was compiled as a whole, DiCache takes it "
            f"apart, and this torch does not tell what it was compiled with: its blocks now run "
            f"uncompiled. Call compile_repeated_blocks(...) instead of compile(...), before or "
            f"after applying DiCache.",
            DiCacheWarning,
            stacklevel=5,
        )

    def detach(self) -> None:
        """Give the calls back and free the state."""
        self.calls.reset()
        self.end_skipping()
        for call in self.block_calls:
            call.uninstall()
        _put_back(self.transformer, self._compiled_before)
        del self.transformer.compile  # the instance's; the class has its own
        del self.transformer.__reduce_ex__
        self._hook.take_off(self.transformer, _HOOK)
        vars(self.transformer).pop("_cache_config", None)

    def _take_root_call(self) -> None:
        """Steps are opened and closed around the transformer's call, outside of its `forward`.

        Offloading replaces a model's `forward` at the end of every call, and whatever wraps it is
        lost. Nor can the transformer be compiled in one piece: a decision takes Python in its
        middle. `transformer.compile(...)` and `torch.compile(transformer)` compile block by block,
        as `compile_repeated_blocks` does.
        """
        self.transformer._compiled_call_impl = self._call_root
        self.transformer.__reduce_ex__ = self._refuse_copy  # type: ignore[method-assign]
        self.transformer.compile = self._compile_blocks  # type: ignore[method-assign]

    def _compile_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Stands for the transformer's `compile`."""
        self._compile = None
        for call in self.block_calls:
            call.block.compile(*args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _call_root(self, *args: Any, **kwargs: Any) -> Any:
        surrounding = set_eval_frame(None)  # by a torch.compile around us, which must not see us
        is_free = self._in_use.acquire(blocking=False)
        try:
            if not is_free:
                self._refuse_second_call()
            callback = surrounding if callable(surrounding) else None
            if callback is not self._surrounding:  # it shall see the blocks alone
                self._compile_under(callback)
            return self._run_step(args, kwargs)
        finally:
            if is_free:
                self._in_use.release()
            set_eval_frame(surrounding)

    def _run_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.skips:  # an interrupt came while the last step was put away
            self.end_skipping()
        for call in self.corner_calls:
            if call.block._compiled_call_impl is not call.call:
                self._install_again()  # compiled since the last step
                break
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs} if args else kwargs
        self.arguments = named
        timestep, text = named.get("timestep"), named.get("encoder_hidden_states")
        try:
            self.step = step = self.calls.open_step(timestep, text)
            output = self.transformer._call_impl(*args, **kwargs)
            if not step.is_done:
                self._warn_of_unseen_blocks()
        except BaseException:
            if self.step is not None:
                self.step.close()
            self.session.reset()  # an aborted run leaves nothing behind
            raise
        finally:
            if self.skips:
                self.end_skipping()
            self.step = self.x = self.p = self.rows = None
            self.arguments = {}
        return output

    def end_skipping(self) -> None:
        """Put the blocks back into their lists."""
        for bypass in self.bypasses:
            bypass.end()
        self.skips = False

    def _warn_of_unseen_blocks(self) -> None:
        assert self.step is not None
        self.step.close()
        self.session.warn(
            "unseen",
            "The blocks that the cache was applied to did not all run, so the step counts for "
            "nothing. Were blocks replaced? Call remove_dicache and apply_dicache again.",
        )

    def _refuse_second_call(self) -> None:
        raise RuntimeError(
            f"This {type(self.transformer).__name__} is running already: in another thread, or "
            f"this call came from inside of it. Its cache belongs to one run at a time. Give every "
            f"thread a transformer of its own, let them take turns, or call remove_dicache."
        )

    def _compile_under(self, callback: Callable[..., Any] | None) -> None:
        self._surrounding = callback
        for call in self.block_calls:
            call.install(self._compile if callback is None else under(callback))

    def _refuse_copy(self, *_: Any) -> Any:
        """Stands for what pickle and deepcopy ask a model for."""
        raise TypeError(
            "A model with DiCache cannot be copied or pickled: diffusers' hooks would run the "
            "original's weights. Call remove_dicache first, and apply_dicache to both."
        )

    __deepcopy__ = _refuse_copy

    def _install_again(self) -> None:
        """Come back outside of blocks that were compiled meanwhile.

        Corners are looked at in every step, all blocks only where blocks are computed: a block
        between that nobody passes through costs time on a skipped step, but changes nothing.
        """
        for call in self.block_calls:
            if not call.is_outermost:
                call.install()

    def enter_blocks(self, hidden_states: Tensor) -> None:
        """Note the tokens that enter block 0."""
        if torch.is_grad_enabled() and needs_gradients(self.transformer, hidden_states):
            self._leave_step_to_gradients()
            return
        self.x, self.num_tokens = hidden_states, hidden_states.shape[1]
        step = self.step
        assert step is not None  # or the block would have been called past us
        step.enter_phase(phase.current(self.transformer))

    def _leave_step_to_gradients(self) -> None:
        assert self.step is not None  # or the block would have been called past us
        self.session.warn(
            "gradients",
            "Gradients are recorded, and the cache has none to give, so steps are computed "
            "without it. Call the model inside torch.no_grad() or torch.inference_mode().",
        )
        self.step.close()
        self.x = None

    def after_probe(self, p: Tensor) -> None:
        """Take the decision; on a computed step move x and p into the cache's buffers."""
        step = self.step
        assert step is not None  # or the block would have been called past us
        if self.x is None:  # block 0 was replaced, and nobody saw x
            return
        if p.requires_grad and torch.is_grad_enabled():  # of the text, say
            self._leave_step_to_gradients()
            return
        self.skips = step.needs_probe and step.probe(self.x, p).action == "reuse"
        if step.rows is not None:
            self.rows = Rows(step.rows, p)
        if self.skips:
            arguments = self.arguments if self._is_bare else None
            for bypass in self.bypasses:
                bypass.begin(arguments)
        else:
            self.x, self.p = step.hold(self.x, p)
        self.count(self.config.probe_depth, p.shape[0])  # now: hold may have begun a run

    @property
    def _is_bare(self) -> bool:
        """Whether only diffusers' own code runs around the blocks: nothing wraps or hooks it."""
        model = self.transformer
        if model._forward_pre_hooks or model._forward_hooks_always_called:
            return False
        return model.forward is self._bare_forward

    def after_last_block(self, y: Tensor) -> Tensor:
        """Record a computed step; the tokens of all samples."""
        assert self.step is not None
        if self.x is None or self.p is None:
            return y
        if self.rows is None:  # else they were counted one by one
            self.count(len(self.blocks) - self.config.probe_depth, y.shape[0])
        y = self.step.record(self.x, self.p, y)
        self.x = self.p = None
        self._install_again()
        return y

    def count(self, blocks: int, samples: int) -> None:
        """Blocks that ran, for the statistics."""
        stats = self.session.stats
        stats.block_calls += blocks
        stats.block_samples += blocks * samples

    def _check(self) -> None:
        name = type(self.transformer).__name__
        other = getattr(self.transformer, "_cache_config", None)
        if other is not None or find_root_hook(self.transformer, _HOOK) is not None:
            own = other is None or isinstance(other, DiCacheConfig)
            raise ValueError(  # diffusers' own begins alike
                f"Caching has already been enabled on this {name}, with "
                f"{'DiCache' if own else type(other).__name__}, and two caches do not stack. Call "
                f"{'remove_dicache(...)' if own else 'disable_cache()'} first."
            )
        if len({id(block) for block, _ in self.blocks}) < len(self.blocks):
            raise ValueError(
                f"This {name} runs one block in several places. Expected blocks of their own: the "
                f"cache could not tell the places apart."
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


class _BlockCall:
    """Stands between a block's caller and the block: runs it or passes its input through.

    It lies where torch keeps a module's compiled call (`Module._compiled_call_impl`), which is the
    first thing that calling a module looks at. So it is outside of everything else on the block:
    outside of compiled code, which never sees the cache, and of hooks and offloading, which a
    skipped block does not wake. Copies of the block, and pickled ones, come without it.
    """

    def __init__(self, cache: _TransformerCache, block: nn.Module, stack: BlockStack) -> None:
        self.cache, self.block, self.names = cache, block, stack.outputs
        self.stack = stack
        self.take = itemgetter(*stack.outputs)  # a tuple, or with one name a value
        self.places = _places(block)
        self.compiled: Callable[..., Any] | None = None  # the block's call, where it is compiled
        self.call: Callable[..., Any] | None = None  # what was installed

    @property
    def is_outermost(self) -> bool:
        """Whether calls come to us first; not, if the block was compiled since `install`."""
        return self.block._compiled_call_impl is self.call

    def install(self, compile_call: Callable[..., Any] | None = None) -> None:
        """Take the place of the block's call, whatever it is by now: plain, or compiled.

        A plain one is compiled by `compile_call`, if there is one.
        """
        if not self.is_outermost:
            self.compiled = self.block._compiled_call_impl
        if self.compiled is not None:
            self.inner = self.compiled
        elif compile_call is not None:
            self.inner = compile_call(self.block._call_impl)
        else:
            self.inner = self.block._call_impl
        self.block._compiled_call_impl = self.call = self.make_call()

    def uninstall(self) -> None:
        """Put back what was there; if somebody compiled the block since the last step, nothing."""
        if self.is_outermost:
            _put_back(self.block, self.compiled)

    def make_call(self) -> Callable[..., Any]:
        """The function that stands for the block's call: one frame, as it runs in every step."""
        cache, inner = self.cache, self.inner
        pass_through, run_rows = self.pass_through, self.run_rows

        def call(*args: Any, **kwargs: Any) -> Any:
            if cache.skips:  # nobody looked into the list that holds a twin by now
                return pass_through(args, kwargs)
            if cache.rows is not None:
                return run_rows(args, kwargs)
            return inner(*args, **kwargs)

        return call

    def run_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block for some samples only; the others keep what they came with."""
        rows = self.cache.rows
        assert rows is not None
        given = {name: args[i] for name, i in self.places.items() if i < len(args)} | kwargs
        try:
            gathered = rows.gather(given, self.stack.per_sample)
        except UnknownRowsError as error:  # its arguments cannot be told apart: it runs for all
            self.cache.session.warn("rows", f"{type(self.block).__name__}: {error}")
            self.cache.count(1, rows.batch)
            return self.inner(*args, **kwargs)
        self.cache.count(1, len(rows.indices))
        named = [gathered.pop(name) for name, place in self.places.items() if place < len(args)]
        values = self.by_name(self.inner(*named, *args[len(self.places) :], **gathered))
        for name, part in values.items():
            values[name] = rows.scatter(part, self.argument(name, args, kwargs))
        return self.take(values)

    def pass_through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would return if it changed nothing."""
        return self.take({name: self.argument(name, args, kwargs) for name in self.names})

    def by_name(self, output: Any) -> dict[str, Any]:
        """A block's output by the names of its arguments."""
        return dict(zip(self.names, output if len(self.names) > 1 else (output,), strict=True))

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of the block by its name."""
        return kwargs[name] if name in kwargs else args[self.places[name]]


class _CornerCall(_BlockCall):
    """The call of a first, a last, or a last probe block: where tokens are taken and given."""

    def __init__(
        self, cache: _TransformerCache, block: nn.Module, stack: BlockStack, index: int
    ) -> None:
        super().__init__(cache, block, stack)
        self.is_first = index == 0
        self.ends_probe = index == cache.config.probe_depth - 1
        self.is_last = index == len(cache.blocks) - 1

    def make_call(self) -> Callable[..., Any]:
        return self._call

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        if cache.step is None:  # called on its own, outside the transformer
            return self.inner(*args, **kwargs)
        if self.is_first:
            name = self.stack.hidden_states
            cache.enter_blocks(kwargs[name] if name in kwargs else args[self.places[name]])
        if cache.skips:
            return self._give(args, kwargs) if self.is_last else self.pass_through(args, kwargs)
        if cache.rows is not None and not self.is_last:
            return self.run_rows(args, kwargs)
        if cache.rows is not None:
            return self._end_for_rows(args, kwargs)
        output = self.inner(*args, **kwargs)
        if self.ends_probe:
            cache.after_probe(self._tokens(output))
        if self.is_last:
            cache.after_last_block(self._tokens(output))
        return output

    def _end_for_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the last block for the samples that are computed, and fill the others in."""
        rows = self.cache.rows
        assert rows is not None
        output = self.run_rows(args, kwargs)
        y = self.cache.after_last_block(rows.take(self._tokens(output)))
        return self._with_tokens(self.by_name(output), y)

    def _give(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = kwargs
        if args:
            values = {name: self.argument(name, args, kwargs) for name in self.names}
        step, x = self.cache.step, self.cache.x
        assert step is not None and x is not None  # set by block 0 of this call
        self.cache.end_skipping()  # the model's head, and hooks behind it, find all blocks there
        return self._with_tokens(values, step.reuse(x))

    def _with_tokens(self, values: dict[str, Any], y: Tensor) -> Any:
        """A block's output with these image tokens in it."""
        name = self.stack.hidden_states
        if self.stack.text_in_front:
            text = values[name][:, : -self.cache.num_tokens]
            y = torch.cat([text.to(y.dtype), y], dim=1)
        return self.take({**values, name: y})

    def _tokens(self, output: Any) -> Tensor:
        """The image tokens [B, S, D] of a block's output."""
        names = self.names
        hidden = output if len(names) == 1 else output[names.index(self.stack.hidden_states)]
        return hidden[:, -self.cache.num_tokens :] if self.stack.text_in_front else hidden


def _put_back(module: nn.Module, compiled: Callable[..., Any] | None) -> None:
    """Give a module the call back that it had, without leaving anything where there was nothing."""
    vars(module).pop("_compiled_call_impl", None)
    if compiled is not None:
        module._compiled_call_impl = compiled


def _has_own_forward(transformer: nn.Module) -> bool:
    """Whether the model is one of diffusers' and its `forward` is as it was written there."""
    kind = type(transformer)
    function: Any = kind.forward
    modules = [kind.__module__]
    while function is not None:  # where its code is: a wrapper borrows the name of what it wraps
        modules.append(getattr(function, "__globals__", {}).get("__name__", ""))
        function = getattr(function, "__wrapped__", None)
    are_its_own = all(module.partition(".")[0] == "diffusers" for module in modules)
    return are_its_own and "forward" not in vars(transformer)


def _places(block: nn.Module) -> dict[str, int]:
    """Where a block's arguments are among the positional ones."""
    parameters = list(inspect.signature(type(unwrap_module(block)).forward).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {name: place for place, name in enumerate(named)}
