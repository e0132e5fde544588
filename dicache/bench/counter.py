"""`BlockCounter`: the blocks that really run in every call of a model, below any cache's hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dicache.driver.families import find_family


class BlockCounter:
    """Counts from now on, whatever is put on the model later.

    Args:
        transformer: A model of a family in dicache's table.

    Raises:
        ValueError: It is of none.

    Attributes:
        num_blocks: Number of its blocks.
        per_call: Blocks that ran in every call of the model since the last `take`.
    """

    def __init__(self, transformer: nn.Module) -> None:
        family = find_family(transformer)
        if family is None:
            raise ValueError(
                f"{type(transformer).__name__} is in no family, so nobody knows its blocks. "
                f"Expected one that `dicache info` lists, or a row by register_family."
            )
        self._blocks = [block for block, _ in family.blocks(transformer)]
        self.num_blocks = len(self._blocks)
        self.per_call: list[int] = []
        self._hook = transformer.register_forward_pre_hook(lambda *_: self.per_call.append(0))
        for block in self._blocks:
            block.forward = self._counted(block.forward)

    def take(self) -> list[int]:
        """`per_call`, which begins anew."""
        taken, self.per_call = self.per_call, []
        return taken

    def remove(self) -> None:
        """Give the blocks their own `forward` back."""
        self._hook.remove()
        for block in self._blocks:
            del block.forward

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.per_call:  # else somebody calls a block by itself
                self.per_call[-1] += 1
            return forward(*args, **kwargs)

        return counted


def cost_of(calls: Sequence[int], num_blocks: int, depth: int, uncached_calls: int) -> float:
    """Block work un-cached over cached, if the model had `depth` instead of `num_blocks` blocks.

    A call that ran all blocks would run them there too; one that skipped ran its probe alone.

    Args:
        calls: Blocks that ran in every call of the model.
        num_blocks: Of the model.
        depth: Number of blocks that are asked about.
        uncached_calls: Number of calls of the un-cached runs, which differs where a method takes
            fewer steps.
    """
    spent = sum(depth if count == num_blocks else count for count in calls)
    return uncached_calls * depth / max(spent, 1)
