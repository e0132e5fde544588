"""An un-cached twin of a model, and the paper's formulas computed on it, independent of dicache.

The twin shows x, p and y of a call through plain forward hooks, and can push another y through its
own head. `expected_run` derives from it what a cached model has to return for a given schedule. It
guarantees fp64 arithmetic between capture and head, so that the test's tolerance is the cache's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import FAMILIES, blocks, run_model
from torch import Tensor, nn


@dataclass(frozen=True)
class Capture:
    """One un-cached call: tokens before block 0, after the probe, after the last block, output.

    Of several streams the tokens are [B, all of them], each weighed so that its mean square counts.
    """

    x: Tensor
    p: Tensor
    y: Tensor
    output: Tensor


@dataclass(frozen=True)
class Expected:
    """What a step has to give: its output, and the gamma that it used (`None` if computed)."""

    output: Tensor
    gamma: float | None


class Twin:
    """An un-cached model of family `name` whose image tokens can be read and replaced."""

    def __init__(self, name: str, model: nn.Module, probe_depth: int = 1) -> None:
        self.model, self.image_output = model, FAMILIES[name].image_output
        self.image_first, self.streams = FAMILIES[name].image_first, FAMILIES[name].streams
        self.blocks, self.probe_depth = blocks(name, model), probe_depth

    def call(self, inputs: dict[str, Any]) -> Capture:
        """Run the model and capture its image tokens on the way."""
        seen: dict[str, Tensor] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.streams:
                given = args or [kwargs[name] for name in self.streams]
                seen["x"] = _weighed(given[: len(self.streams)])
            else:
                seen["x"] = (args[0] if args else kwargs["hidden_states"]).double()

        def keep(name: str) -> Any:
            return lambda module, args, output: seen.update({name: self._image(output, seen["x"])})

        hooks = [
            self.blocks[0].register_forward_pre_hook(before, with_kwargs=True),
            self.blocks[self.probe_depth - 1].register_forward_hook(keep("p")),
            self.blocks[-1].register_forward_hook(keep("y")),
        ]
        with _removed_after(hooks):
            output = run_model(self.model, inputs)
        return Capture(seen["x"], seen["p"], seen["y"], output)

    def head(self, inputs: dict[str, Any], y: Tensor) -> Tensor:
        """The model's output if its last block had returned `y`."""

        def replace(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                place = self._place(output, y)
                return torch.cat(
                    [output[:, : place.start], y.to(output.dtype), output[:, place.stop :]], dim=1
                )
            if self.streams:
                sizes = [each[0].numel() for each in output]
                weighed = zip(y.split(sizes, dim=1), _weights(output), output, strict=True)
                return tuple((p / weight).reshape(e.shape).to(e.dtype) for p, weight, e in weighed)
            parts = list(output)
            parts[self.image_output] = y.to(parts[self.image_output].dtype)
            return tuple(parts)

        with _removed_after([self.blocks[-1].register_forward_hook(replace)]):
            return run_model(self.model, inputs)

    def _image(self, output: Any, x: Tensor) -> Tensor:
        if self.streams:
            return _weighed(output)
        tokens = output if isinstance(output, Tensor) else output[self.image_output]
        return tokens[:, self._place(tokens, x)].double()

    def _place(self, tokens: Tensor, x: Tensor) -> slice:
        """Where the image tokens are among those with text."""
        start = 0 if self.image_first else tokens.shape[1] - x.shape[1]
        return slice(start, start + x.shape[1])


def _weights(streams: Sequence[Tensor]) -> list[float]:
    """1 of the smallest stream; of one with 4^k times its elements, about, 2^-k."""
    sizes = [each.numel() for each in streams]
    ratios = [size / min(sizes) for size in sizes]
    return [2.0 ** -min(range(20), key=lambda k: abs(math.log(r / 4**k))) for r in ratios]


def _weighed(streams: Sequence[Tensor]) -> Tensor:
    pairs = zip(streams, _weights(streams), strict=True)
    return torch.cat([weight * each.double().flatten(1) for each, weight in pairs], dim=1)


def expected_run(
    twin: Twin,
    calls: Iterable[dict[str, Any]],
    mask: str,
    alignment: str,
    gamma_range: tuple[float, float | None],
) -> list[Expected]:
    """Output and gamma of every step of a run in which `mask` says what is computed and reused."""
    window: list[tuple[Tensor, Tensor]] = []  # (r, q) of the two last computed steps
    steps = []
    for letter, inputs in zip(mask, calls, strict=True):
        call = twin.call(inputs)
        if letter == "C":
            window = [*window[-1:], (call.y - call.x, call.p - call.x)]
            steps.append(Expected(call.output, None))
            continue
        r_new, q_new = window[-1]
        r_old, q_old = window[0]
        gamma = _gamma(call.p - call.x - q_old, q_new - q_old, alignment, gamma_range)
        y = call.x + r_old + gamma * (r_new - r_old)
        steps.append(Expected(twin.head(inputs, y), gamma))
    return steps


def assert_close(output: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Largest deviation, relative to the largest expected value."""
    deviation = (output - expected).abs().max() / expected.abs().max()
    assert deviation <= tolerance, f"relative deviation {deviation:.2e}"


def _gamma(a: Tensor, d: Tensor, alignment: str, gamma_range: tuple[float, float | None]) -> float:
    if not d.any():  # one entry only
        gamma = 1.0
    elif alignment == "l1":
        gamma = float(a.abs().mean() / d.abs().mean())
    else:
        gamma = float((a * d).sum() / (d * d).sum())
    low, high = gamma_range
    return min(max(gamma, low), math.inf if high is None else high)


@contextmanager
def _removed_after(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
