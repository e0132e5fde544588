"""One call of a model: the patches of its blocks, and the step of the cache that they drive.

    block 0           x is noted, a step opens
    the probe's last  decide: reuse, or keep x and p and go on
    blocks between    run, or pass their arguments through
    the last block    record, or x + residual in the place of its image tokens

Models and ControlNets write into tokens in place, so x is copied before block 0 has it, and p
before the next block does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...core.step import Step
from .table import Block

Arguments: TypeAlias = dict[str, Any]
Patch: TypeAlias = Callable[[Arguments, dict[str, Any]], Arguments]


class Call:
    """One call of a model.

    Args:
        blocks: The model's, in the order in which they run.
        depth: How many of them form the probe.
        open_step: Opens the step of a call with tokens x; `None` where nobody can tell it.
        may_reuse: Whether a step may be reused here.

    Attributes:
        num_run: Blocks that ran.
    """

    def __init__(
        self,
        blocks: list[Block],
        depth: int,
        open_step: Callable[[Tensor], Step | None],
        may_reuse: bool,
    ) -> None:
        self._blocks, self._depth, self._may_reuse = blocks, depth, may_reuse
        self._open_step = open_step
        self._step: Step | None = None
        self._x: Tensor | None = None
        self._count = 0  # of image tokens
        self._reused: Tensor | None = None  # the image behind the last block
        self.num_run = 0

    def patches(self, others: Mapping[Any, Patch]) -> dict[tuple[str, int], Patch]:
        """A patch for every block, around that of another node where there is one."""
        if "torch._dynamo" in sys.modules:  # whoever compiles a model has imported it
            _leave_out_of_compiled_code()
        return {
            block.key: BlockPatch(self, place, others.get(block.key))
            for place, block in enumerate(self._blocks)
        }

    def close(self) -> None:
        """The call is over, one way or another."""
        if self._step is not None:
            self._step.close()
        self._step = self._x = None

    @property
    def is_reused(self) -> bool:
        """Whether blocks are left out, from the decision to the last block.

        After the call it means that the last block's patch was never asked.
        """
        return self._reused is not None

    def begin(self, x: Tensor) -> None:
        """Tokens x enter block 0."""
        self._count = x.shape[1]
        self._step = self._open_step(x)
        self._x = None if self._step is None else x.clone()

    def end_block(self, place: int, tokens: Tensor) -> None:
        """A block ran: decide behind the probe, record behind the last one."""
        self.num_run += 1
        if place == self._depth - 1:
            self._decide(self._image(place, tokens))
        if place == len(self._blocks) - 1 and self._step is not None:
            self._step.record(self._image(place, tokens))

    def pass_block(self, place: int, arguments: Arguments) -> Arguments:
        """What a block returns that a reused step leaves out."""
        if place < len(self._blocks) - 1:
            return arguments
        image, self._reused = self._reused, None
        assert image is not None  # whoever asks has looked
        return {**arguments, "img": self._blocks[place].with_image(arguments["img"], image)}

    def _image(self, place: int, tokens: Tensor) -> Tensor:
        return self._blocks[place].image_of(tokens, self._count)

    def _decide(self, p: Tensor) -> None:
        step, x, self._x = self._step, self._x, None
        if step is None or x is None:
            return
        if step.needs_probe:
            step.probe(x, p)
        if step.action == "reuse" and self._may_reuse:
            self._reused = step.reuse(x)
        else:
            step.resume(x, p)


class BlockPatch:
    """What ComfyUI calls in a block's place: `patch(arguments, {"original_block": block})`.

    Where the model is compiled, this frame is left out of the compiled code, and the block is not.
    """

    __slots__ = ("_call", "_other", "_place")

    def __init__(self, call: Call, place: int, other: Patch | None) -> None:
        self._call, self._place, self._other = call, place, other

    def __call__(self, arguments: Arguments, extra: dict[str, Any]) -> Arguments:
        call, place = self._call, self._place
        if place == 0:
            call.begin(arguments["img"])
        if call.is_reused:
            return call.pass_block(place, arguments)
        block = extra["original_block"]
        out = block(arguments) if self._other is None else self._other(arguments, extra)
        call.end_block(place, out["img"])
        return out


@functools.cache
def _leave_out_of_compiled_code() -> None:
    """Frames of patches are not compiled.

    Said when it matters: torch imports its compiler to hear it, which takes a second or more.
    """
    for name in ("begin", "end_block", "pass_block"):
        setattr(Call, name, torch.compiler.disable(getattr(Call, name)))
    call = torch.compiler.disable(BlockPatch.__call__, recursive=False)
    setattr(BlockPatch, "__call__", call)  # noqa: B010 -- a method is no attribute to mypy
