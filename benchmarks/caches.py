"""The caches that are compared in pipelines, made to compute and skip the steps of one mask.

A cache is a context manager that puts itself on a pipeline and takes itself off again. dicache
takes a mask; FirstBlockCache decides by a threshold, which is set to always or to never before
every step, so that it still does all the work that a decision takes it. Whether a cache did what
the mask says is for the caller to count: see `dicache.bench.counter`. `dicache bench` compares with
more of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import workloads
from torch import nn

from dicache import DiCacheConfig, ModelFamily, apply_dicache, get_stats, remove_dicache
from dicache.driver.families import find_family


@dataclass(frozen=True)
class Applied:
    """A cache that is on a pipeline.

    Attributes:
        force: Called with the step before every call of the transformer.
        held: Of the last run and one context: `cache_tensors` of the hidden states' size that were
            kept, `cache_bytes`, and `reused_steps`; what the cache does not tell is not there.
    """

    force: Callable[[int], None] = lambda step: None
    held: Callable[[], dict[str, Any]] = dict


Cache = Callable[[Any, str], AbstractContextManager[Applied]]  # on a pipeline, for a mask


def family_of(transformer: nn.Module) -> ModelFamily:
    """The row of dicache's table for this transformer, which must be in it."""
    family = find_family(transformer)
    assert family is not None, f"{type(transformer).__name__} is in no family"
    return family


def caches(device: torch.device) -> dict[str, Cache]:
    """All caches that run on this device; the first one is dicache with its default backend."""
    names = workloads.backends(device)
    found: dict[str, Cache] = {f"dicache {n}": functools.partial(dicache_with, n) for n in names}
    return {**found, "FirstBlockCache": first_block_cache}


def lists_of_blocks(transformer: nn.Module, share: float = 1.0) -> dict[str, nn.ModuleList]:
    """The first blocks of every list, two at least; a share of 0 leaves one block in all."""
    found = {}
    for index, stack in enumerate(family_of(transformer).stacks):
        blocks = getattr(transformer, stack.attribute)
        fewest = min(2, len(blocks))
        kept = max(fewest, math.ceil(share * len(blocks))) if share else int(index == 0)
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

    def force(step: int) -> None:
        _set_lists(transformer, lists[mask[step]])

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


# --- diffusers -----------------------------------------------------------------------------------


@contextmanager
def first_block_cache(pipe: Any, mask: str) -> Iterator[Applied]:
    """diffusers' FirstBlockCache."""
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

    transformer = pipe.transformer
    transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    first, _ = family_of(transformer).blocks(transformer)[0]
    hook = first._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)

    def force(step: int) -> None:
        hook.threshold = math.inf if mask[step] == "R" else -1.0

    try:
        yield Applied(force)
    finally:
        transformer.disable_cache()
