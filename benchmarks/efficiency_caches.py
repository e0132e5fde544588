"""The caches that efficiency.py compares, each made to compute and skip the steps of one mask.

A cache is a context manager that puts itself on a pipeline and takes itself off again. dicache and
cache-dit take a mask; diffusers' caches decide by a threshold, which is set to always or to never
before every step, so that they still do all the work that a decision takes them. Whether a cache
did what the mask says is for the caller to count: see `dicache.bench.counter`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import efficiency_models
import torch
import workloads
from torch import Tensor, nn

from dicache import (
    BlockStack,
    DiCacheConfig,
    ModelFamily,
    apply_dicache,
    get_stats,
    ops,
    remove_dicache,
)
from dicache.driver.families import find_family


@dataclass(frozen=True)
class Applied:
    """A cache that is on a pipeline.

    Attributes:
        force: Called with step and context before every call of the transformer; what it returns
            is added to that call's `cache_context`.
        held: Of the last run and one context: `cache_tensors` of the hidden states' size that were
            kept, `cache_bytes`, and `reused_steps`; what the cache does not tell is not there.
    """

    force: Callable[[int, str], dict[str, Any]] = lambda step, context: {}
    held: Callable[[], dict[str, Any]] = dict


Cache = Callable[[Any, str], AbstractContextManager[Applied]]  # on a pipeline, for a mask


def family_of(transformer: nn.Module) -> ModelFamily:
    """The row of dicache's table for this transformer, which must be in it."""
    family = find_family(transformer)
    assert family is not None, f"{type(transformer).__name__} is in no family"
    return family


def caches(device: torch.device) -> dict[str, Cache]:
    """All caches that run on this device; the first one is dicache with its default backend."""
    found: dict[str, Cache] = {
        f"dicache {name}": functools.partial(dicache_with, name)
        for name in workloads.backends(device)
    }
    found["published"] = published
    found["FirstBlockCache"] = first_block_cache
    if hasattr(diffusers, "SeaCacheConfig"):
        found["SeaCache"] = sea_cache
    if importlib.util.find_spec("cache_dit") is not None:
        found["cache-dit F1B0"] = cache_dit  # last, because it patches the pipeline's class
    return found


def absent(device: torch.device) -> dict[str, str]:
    """Caches that belong into the comparison and cannot run here, with the reason."""
    status, present = ops.backend_status(), caches(device)
    wanted = ("cuda", "triton") if device.type == "cuda" else ("cpp",)
    found = {f"dicache {name}": status[name] for name in wanted if f"dicache {name}" not in present}
    if "SeaCache" not in present:
        found["SeaCache"] = f"not in diffusers {diffusers.__version__}"
    if "cache-dit F1B0" not in present:
        found["cache-dit F1B0"] = "not installed"
    return found


def lists_of_blocks(transformer: nn.Module, share: float = 1.0) -> dict[str, nn.ModuleList]:
    """The first blocks of every list of the transformer; a share of 0 leaves one block in all."""
    found = {}
    for index, stack in enumerate(family_of(transformer).stacks):
        blocks = getattr(transformer, stack.attribute)
        kept = math.ceil(share * len(blocks)) if share else int(index == 0)
        found[stack.attribute] = blocks if kept == len(blocks) else nn.ModuleList(blocks[:kept])
    return found


@contextmanager
def shortened(transformer: nn.Module, share: float) -> Iterator[None]:
    """The transformer with a share of its blocks.

    With one block it does what an ideal skipped step does: the embeddings, the probe block and the
    head.
    """
    whole = lists_of_blocks(transformer)
    _set_lists(transformer, lists_of_blocks(transformer, share))
    try:
        yield
    finally:
        _set_lists(transformer, whole)


def _set_lists(transformer: nn.Module, lists: dict[str, nn.ModuleList]) -> None:
    for name, blocks in lists.items():
        setattr(transformer, name, blocks)


@contextmanager
def ideal(pipe: Any, mask: str) -> Iterator[Applied]:
    """A cache that costs nothing, and gives nothing back: skipped steps end after the probe."""
    transformer = pipe.transformer
    lists = {"C": lists_of_blocks(transformer), "R": lists_of_blocks(transformer, 0)}

    def force(step: int, context: str) -> dict[str, Any]:
        _set_lists(transformer, lists[mask[step]])
        return {}

    try:
        yield Applied(force)
    finally:
        _set_lists(transformer, lists["C"])


@contextmanager
def uncached(pipe: Any, mask: str) -> Iterator[Applied]:
    """No cache."""
    yield Applied()


# --- dicache -------------------------------------------------------------------------------------


@contextmanager
def dicache_with(backend: str, pipe: Any, mask: str) -> Iterator[Applied]:
    """dicache with its default rules for the error, and a mask in place of the threshold."""
    apply_dicache(pipe, DiCacheConfig(schedule=mask, backend=backend))
    try:
        yield Applied(held=functools.partial(_held, pipe))
    finally:
        remove_dicache(pipe)


def _held(pipe: Any) -> dict[str, Any]:
    (stats,) = get_stats(pipe).values()
    contexts = max(len(stats.contexts), 1)
    return {
        "cache_tensors": stats.cache_tensors / contexts,
        "cache_bytes": stats.cache_bytes / contexts,
        "reused_steps": stats.num_reused / contexts,
    }


# --- The published sequence ----------------------------------------------------------------------


@contextmanager
def published(pipe: Any, mask: str) -> Iterator[Applied]:
    """The published scripts' sequence of eager operations, in place of the lists of blocks."""
    transformer = pipe.transformer
    family = family_of(transformer)
    blocks = [block for block, _ in family.blocks(transformer)]
    cached = PublishedBlocks(blocks, family.stacks[0], mask)
    with shortened(transformer, 0):
        setattr(transformer, family.stacks[0].attribute, nn.ModuleList([cached]))
        yield Applied(cached.locate, cached.held)


@dataclass
class _PublishedState:
    """What one context keeps. Windows are (older, newer)."""

    x: Tensor
    p: Tensor
    probes: tuple[Tensor, Tensor]
    residuals: tuple[Tensor, Tensor]


class PublishedBlocks(nn.Module):
    """All blocks of a model as one, cached by `workloads.published_step`.

    Serves models whose blocks all take (hidden_states, encoder_hidden_states, ...), and whose lists
    return the same. Steps that the mask computes are not probed, as with dicache. In its favour, it
    keeps references where the scripts may copy, and waits for the device once a skipped step, for
    the error.
    """

    def __init__(self, blocks: list[nn.Module], stack: BlockStack, mask: str) -> None:
        super().__init__()
        self._blocks, self._outputs, self._mask = tuple(blocks), stack.outputs, mask
        self._states: dict[str, _PublishedState] = {}
        self._step, self._context = 0, ""
        self._accumulated = 0.0

    def locate(self, step: int, context: str) -> dict[str, Any]:
        """Where the next call is. The first step of a run drops what an earlier one left."""
        if step == 0:
            self._states.pop(context, None)
        self._step, self._context = step, context
        return {}

    def held(self) -> dict[str, Any]:
        """Tensors of one context."""
        if not self._states:
            return {}
        state = next(iter(self._states.values()))
        kept = {id(t): t for t in (state.x, state.p, *state.probes, *state.residuals)}.values()
        return {"cache_tensors": len(kept), "cache_bytes": sum(tensor.nbytes for tensor in kept)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """All blocks, or the first one and the approximation."""
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        x, text = given["hidden_states"], given["encoder_hidden_states"]
        values = self._run(self._blocks[:1], {"hidden_states": x}, args, kwargs)
        if self._mask[self._step] == "R":
            values["hidden_states"] = self._skip(x, values["hidden_states"], text)
        else:
            p = values["hidden_states"]
            values = self._run(self._blocks[1:], values, args, kwargs)
            self._record(x, p, values["hidden_states"])
        outputs = tuple(values[name] for name in self._outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _run(
        self,
        blocks: tuple[nn.Module, ...],
        values: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        for block in blocks:
            if args:  # hidden_states, then perhaps encoder_hidden_states
                streams = [values[n] for n in sorted(values, reverse=True)]
                output = block(*streams, *args[len(streams) :], **kwargs)
            else:
                output = block(**kwargs | values)
            outputs = output if len(self._outputs) > 1 else (output,)
            values = dict(zip(self._outputs, outputs, strict=True))
        return values

    def _skip(self, x: Tensor, p: Tensor, text: Tensor) -> Tensor:
        state = self._states[self._context]
        error, _, y = workloads.published_step(
            x, p, text, state.p, state.x, state.probes, state.residuals
        )
        self._accumulated += error.item()  # the decision, which waits for the device
        state.x, state.p = x, p
        return y

    def _record(self, x: Tensor, p: Tensor, y: Tensor) -> None:
        q, r = p - x, y - x
        before = self._states.get(self._context)
        older = (q, r) if before is None else (before.probes[1], before.residuals[1])
        self._states[self._context] = _PublishedState(x, p, (older[0], q), (older[1], r))


# --- diffusers and cache-dit ---------------------------------------------------------------------


@contextmanager
def first_block_cache(pipe: Any, mask: str) -> Iterator[Applied]:
    """diffusers' FirstBlockCache."""
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

    transformer = pipe.transformer
    transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    first, _ = family_of(transformer).blocks(transformer)[0]
    hook = first._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)

    def force(step: int, context: str) -> dict[str, Any]:
        hook.threshold = math.inf if mask[step] == "R" else -1.0
        return {}

    try:
        yield Applied(force)
    finally:
        transformer.disable_cache()


@contextmanager
def sea_cache(pipe: Any, mask: str) -> Iterator[Applied]:
    """diffusers' SeaCache, which asks the pipeline for its position; only Wan's tells."""
    config = diffusers.SeaCacheConfig(
        retention_steps=0,
        cache_end_steps=0,
        max_consecutive_cached=0,
        raw_vision_callback=efficiency_models.vision_latents,
    )
    pipe.transformer.enable_cache(config)
    sigmas: list[float] = []

    def force(step: int, context: str) -> dict[str, Any]:
        config.threshold = math.inf if mask[step] == "R" else 0.0
        if step == 0:
            sigmas[:] = pipe.scheduler.sigmas.tolist()  # once a run, so that no other step waits
        return {"step_index": step, "sigma": sigmas[step], "num_inference_steps": len(mask)}

    try:
        yield Applied(force)
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def cache_dit(pipe: Any, mask: str) -> Iterator[Applied]:
    """cache-dit's DBCache with one block in front and none behind.

    Steps that its mask does not compute are decided by a comparison; it is made, and always passes.
    """
    import cache_dit as package

    config = package.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=0.999,  # from 1 on it would not compare at all
        num_inference_steps=len(mask),
        steps_computation_mask=[int(letter == "C") for letter in mask],
        steps_computation_policy="dynamic",
    )
    package.enable_cache(pipe, cache_config=config)
    compare = pipe._context_manager.similarity

    def compare_and_pass(*args: Any, **kwargs: Any) -> bool:
        compare(*args, **kwargs)
        return True

    pipe._context_manager.similarity = compare_and_pass
    try:
        yield Applied()
    finally:
        package.disable_cache(pipe)
