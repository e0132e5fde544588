"""Sparse attention of one layer: profile the heads, put their tokens in order, attend in the band.

flex_attention computes the blocks that its table names. Compiled, it is one kernel; called plainly
it computes all S x S scores. So it is compiled, by these rules:

- Inside somebody's compiled code it is called plainly, and becomes a part of that code.
- Elsewhere `COMPILED` decides: `True` compiles it, `False` calls it plainly, and `None`, as it is,
  compiles it on a GPU, and on the CPU if there is a C++ compiler.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .layout import permute_qkv, permute_tokens
from .masks import Tables, block_mask, make_bounds, make_tables, token_major
from .profiling import temporal_heads

COMPILED: bool | None = None


@dataclass(eq=False)
class Plan:
    """What all sparse layers of a call share; made once for a resolution and its prompts.

    Compiled code reads its tensors alone, so no prompt and no step makes other code.

    Attributes:
        bounds: int32 [B, 4] from `make_bounds`.
        order: int32 [S], the token at each position of token-major order.
        positions: int32 [S], the position of each token in it.
        tables: The band's blocks, from `make_tables`.
        block_size: Tokens of a block.
        misfit: Set by a layer whose tensors were not those that the plan was made for.
    """

    bounds: Tensor
    order: Tensor
    positions: Tensor
    tables: Tables
    block_size: int
    misfit: bool = False

    @staticmethod
    @torch.no_grad()
    @torch.inference_mode(False)  # so that compiled code meets the same kind of tensor everywhere
    def make(
        sink_frames: int,
        grid: tuple[int, int, int],
        text: int,
        valid_text: Tensor,
        density: float,
        block_size: int,
    ) -> Plan:
        """The plan for a video of grid = (frames, height, width) tokens, behind it `text` tokens.

        `valid_text` is int32 [B], how many of these are no padding; its device is the plan's.
        """
        frames, height, width = grid
        frame_size, device = height * width, valid_text.device
        sink, video_end = sink_frames * frame_size, frames * frame_size
        length = video_end + text
        orders = token_major(sink, frames - sink_frames, frame_size, length)
        order, positions = (each.to(device) for each in orders)
        bounds = make_bounds(sink, video_end, video_end + valid_text, density)
        tables = make_tables(bounds, length, block_size)
        return Plan(bounds, order, positions, tables, block_size)

    def fits(self, batch: int, length: int, device: torch.device) -> bool:
        """Whether the plan is for tokens [batch, length, ...] on this device."""
        same = batch == self.bounds.shape[0] and length == self.order.shape[0]
        return same and device == self.order.device


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, rows: Tensor, temporal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention within the band, in each head's own order of tokens.

    Args:
        q, k, v: [B, S, H, D] tokens: sink, video in frame-major order, text, padding.
        plan: For this B and S.
        rows: int64 [R], the queries that tell the heads apart.
        temporal: uint8 [B, H], 1 for the temporal heads, if they are known; else they are profiled.

    Returns:
        [B, S, H, D] in the order of q, and uint8 [B, H], 1 for the temporal heads.
    """
    if temporal is None:
        temporal = temporal_heads(q, k, v, rows, plan.bounds, plan.positions)
    q, k, v = permute_qkv(q, k, v, temporal, plan.order)
    mask = block_mask(plan.tables, plan.bounds, q.shape[1], plan.block_size)
    output = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return permute_tokens(output.transpose(1, 2), temporal, plan.positions), temporal


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    if torch.compiler.is_compiling() or not _compiles(q.device):
        return flex_attention(q, k, v, block_mask=mask)
    return _compiled_flex_attention()(q, k, v, block_mask=mask)


def _compiles(device: torch.device) -> bool:
    if COMPILED is not None:
        return COMPILED
    return device.type != "cpu" or _has_compiler()


@functools.cache
def _has_compiler() -> bool:
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return any(name and shutil.which(name) for name in names)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)
