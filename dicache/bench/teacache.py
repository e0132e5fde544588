r"""TeaCache's rule (arXiv 2411.19108), for comparisons: it has no place in diffusers.

A step is computed where the sum of d since the last computed step reaches the threshold, with
d = mean|m - m_prev| / mean|m_prev|, m the modulated input of the first block's attention, and is
else x plus the last computed residual; a run's first and last steps are computed.

It rescales d by a polynomial that is fitted for single large models. Here d counts as it is:
polynomials of degree 1, 2 and 4, fitted to two samples of the demo Flux, fell below zero in most
steps and left 28 dB at best.

The reuse itself is MagCache's, of diffusers, whose ratios are set to what the rule says: a ratio of
1 skips, another one computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import MagCacheConfig
from torch import Tensor, nn

from dicache.driver.families import find_family

_COMPUTES, _SKIPS = 9.0, 1.0  # ratios
_THRESHOLD = 0.5  # between what they cost
_ATTENTION = ("attn", "attn1")


class _IsThere(Exception):  # noqa: N818 - nothing is wrong
    """The modulated input is, and the rest of the block is not wanted."""


@contextmanager
def teacache(model: Any, steps: int, threshold: float) -> Iterator[None]:
    """Put the rule on a model of diffusers.

    Args:
        model: With `enable_cache` and `cache_context`.
        steps: Number of steps of a run.
        threshold: Of the accumulated change.
    """
    config = MagCacheConfig(
        threshold=_THRESHOLD,
        max_skip_steps=steps,
        retention_ratio=0.0,
        num_inference_steps=steps,
        mag_ratios=[_SKIPS] * steps,
    )
    accumulated: dict[str, float] = {}

    def decide(context: str, step: int, changed: float | None) -> None:
        total = accumulated.get(context, 0.0) + (changed or 0.0)
        computes = changed is None or step == steps - 1 or total >= threshold
        accumulated[context] = 0.0 if computes else total
        config.mag_ratios = torch.full((steps,), _COMPUTES if computes else _SKIPS)

    model.enable_cache(config)
    try:
        with _watching(model, steps, decide):
            yield
    finally:
        model.disable_cache()


@contextmanager
def _watching(
    model: Any, steps: int, tell: Callable[[str, int, float | None], None]
) -> Iterator[None]:
    """Tell of every call the context, the step and how far the modulated input moved.

    A run's first step has moved nowhere: `None`.
    """
    family = find_family(model)
    assert family is not None  # of every subject
    block = next(iter(family.blocks(model)))[0]
    attention = next(getattr(block, name) for name in _ATTENTION if hasattr(block, name))
    context, calls, before = "", dict[str, int](), dict[str, Tensor]()
    seen: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _IsThere

    plain_forward, plain_context = block.forward, model.cache_context

    def forward(*args: Any, **kwargs: Any) -> Any:
        hook = attention.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with contextlib.suppress(_IsThere):
                type(block).forward(block, *args, **kwargs)  # below all that counts blocks
        finally:
            hook.remove()
        tokens, step = seen.pop(), calls.get(context, 0) % steps
        calls[context] = step + 1
        tell(context, step, _change(tokens, before[context]) if step else None)
        before[context] = tokens
        return plain_forward(*args, **kwargs)

    @contextmanager
    def cache_context(name: str, **given: Any) -> Iterator[None]:
        nonlocal context
        context = name
        with plain_context(name, **given):
            yield

    block.forward, model.cache_context = forward, cache_context
    try:
        yield
    finally:
        block.forward = plain_forward
        del model.cache_context


def _change(tokens: Tensor, before: Tensor) -> float:
    return float((tokens - before).abs().mean() / before.abs().mean())
