"""Tokens of some heads in another order, one launch for queries, keys and values together.

Every program takes the tokens of one head at `BLOCK` positions and copies them, so the output is
the reference's bit by bit. A head's elements at one token are contiguous: whatever the order, reads
and writes are whole runs of D elements, 256 bytes in the models that this is for. Positions beside
each other are written beside each other; the table of sources costs 4 bytes a token and head.

The checks of the arguments are those of `dicache.sparse_videogen.layout`, which makes them in the
fake too; this file stands below it and repeats none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch

_BLOCK = 64  # positions of a program
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def permute_qkv(
    q: Tensor, k: Tensor, v: Tensor, temporal: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, S, H, D] with the tokens of temporal heads at the places that `order` says."""
    outputs = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _launch((q, k, v), outputs, temporal, order)
    return outputs


def permute_tokens(x: Tensor, temporal: Tensor, order: Tensor) -> Tensor:
    """out[b, s, h] = x[b, order[s], h] for temporal heads, x[b, s, h] for the others."""
    output = x.new_empty(x.shape)
    _launch((x,), (output,), temporal, order)
    return output


def _launch(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], temporal: Tensor, order: Tensor
) -> None:
    batch, length, heads, width = inputs[0].shape
    if inputs[0].numel() == 0:
        return
    sources = [inputs[min(index, len(inputs) - 1)] for index in range(3)]
    targets = [outputs[min(index, len(outputs) - 1)] for index in range(3)]
    strides = [stride for x in sources for stride in (launch.batch_stride(x), *x.stride()[1:3])]
    with launch.current_device_of(inputs[0]):
        _permute_kernel[(triton.cdiv(length, _BLOCK), batch * heads)](
            *sources, *targets, temporal, order, length, heads, *strides,
            TENSORS=len(inputs), D=width, WIDTH=triton.next_power_of_2(width), BLOCK=_BLOCK,
            **_OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "heads"])
def _permute_kernel(
    x0,
    x1,
    x2,
    y0,
    y1,
    y2,
    temporal,
    order,
    length,
    heads,
    x0_batch,
    x0_token,
    x0_head,
    x1_batch,
    x1_token,
    x1_head,
    x2_batch,
    x2_token,
    x2_head,
    TENSORS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < length
    tokens = places
    if tl.load(temporal + sample * heads + head) != 0:
        tokens = tl.load(order + places, mask=inside, other=0)
    tokens = tokens.to(tl.int64)
    lanes = tl.arange(0, WIDTH)
    # The mask is the same for all elements of a token, so it does not break their 16 bytes.
    mask = inside[:, None] & (lanes < D)[None, :] if D != WIDTH else inside[:, None]
    target = ((sample * length + places) * heads + head)[:, None] * D + lanes[None, :]
    x0 += sample * x0_batch + head * x0_head
    _copy(x0 + (tokens * x0_token)[:, None] + lanes[None, :], y0 + target, mask)
    if TENSORS > 1:
        x1 += sample * x1_batch + head * x1_head
        _copy(x1 + (tokens * x1_token)[:, None] + lanes[None, :], y1 + target, mask)
        x2 += sample * x2_batch + head * x2_head
        _copy(x2 + (tokens * x2_token)[:, None] + lanes[None, :], y2 + target, mask)


@triton.jit
def _copy(source, target, mask):
    tl.store(target, tl.load(source, mask=mask), mask=mask)
