"""What is known of one call of a cached model while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.step import Step
from ..core.where import Where
from .samples import Samples


class Locator(Protocol):
    """An adapter's: tells where calls stand."""

    def where(self, arguments: Mapping[str, Any], layout: torch.Size) -> Where:
        """Where the call with these arguments stands; asked at the call's first block.

        Args:
            arguments: Of the model's call, by name.
            layout: Shape [B, S, D] of its tokens.
        """

    def groups(self) -> Sequence[Any]:
        """Process groups of ranks that share a sequence; `None` for one that is not known.

        Asked when the cache is applied, and in every branch's first step of a run.
        """
        return ()

    def given(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Of the arguments of block 0's call what its `forward` gets, if hooks split them."""
        return args, kwargs

    def end_call(self) -> None:
        """The call is over, one way or another."""


class Untouched:
    """Whether blocks leave the tokens that they are given as they are.

    A copy is compared: torch counts the writes into a tensor, but neither those of other packages'
    kernels nor any in inference mode. That waits for the device, in a model's first step alone.

    Args:
        x: Tokens that enter a block.
    """

    def __init__(self, x: Tensor) -> None:
        self._x, self._copy = x, x.detach().clone()

    def is_true_beside(self, output: Tensor) -> bool:
        """Whether x is as it was, and shares no memory with what came out."""
        x = self._x
        if x.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
            return False
        if torch.equal(x, self._copy):
            return True
        return torch.allclose(x, self._copy, rtol=0.0, atol=0.0, equal_nan=True)


class Call:
    """One call of a model.

    Args:
        arguments: By name.

    Attributes:
        step: The step that it is, from its first block on.
        x: [B, S, D] tokens before block 0, as long as they are needed.
        untouched: Tells whether the probe wrote into x, as long as that is not known of the model.
        num_tokens: S.
        samples: Those that blocks run for, if not for all.
    """

    step: Step | None = None
    x: Tensor | None = None
    untouched: Untouched | None = None
    num_tokens: int = 0
    samples: Samples | None = None

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
