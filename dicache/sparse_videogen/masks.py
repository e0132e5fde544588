"""Which query attends which key: one band, the always-kept tokens around it, and its block tables.

A sequence is [sink | video | text | padding], with frame-major video. Text and sink (Wan's first
frame) are always kept, as queries and as keys; of the others a pair is kept if its positions are at
most W apart. In frame-major order that band is a window over neighbouring frames
(spatial heads); in token-major order, all frames of one place after another, the same band is a
window over neighbouring places in all frames (temporal heads). So one mask serves both, and heads
differ by the order of their tokens alone. Padding attends padding only, and nobody else does.

The sink's queries look at everything because in a temporal head they have no place in the band: the
tokens around them there are those of the first places in the picture.

Everything is computed from the intervals' ends, on the device: nothing of size S x S, and nothing
waits for the host. Source: arXiv 2502.01776, section 3; the band over single tokens, its width from
the share that is kept, and the sink's queries are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Kept = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def make_bounds(sink: int, video_end: int, valid_end: Tensor, density: float) -> Tensor:
    """What a mask depends on, for every sample.

    Args:
        sink: Number of leading tokens that are always kept.
        video_end: Number of sink and video tokens, n.
        valid_end: int32 [B] number of sink, video and valid text tokens, e.
        density: Share of the e^2 elements to keep.

    Returns:
        int32 [B, 4] = (sink, video_end, valid_end, W). W is the widest band that keeps no more than
        `density`, and 0, the diagonal alone, if the text and the sink are more already.
    """
    total = valid_end.long() ** 2  # [B]
    widths = torch.arange(video_end, device=valid_end.device)  # [n]
    kept = kept_elements(sink, video_end, valid_end.long()[:, None], widths)  # [B, n]
    enough = kept <= (total.double() * density)[:, None]
    window = (enough.sum(dim=1) - 1).clamp(min=0)
    first = torch.full_like(valid_end, sink), torch.full_like(valid_end, video_end)
    return torch.stack([*first, valid_end, window.to(torch.int32)], dim=1)


def kept_elements(sink: int, video_end: int, valid_end: Tensor, window: Tensor) -> Tensor:
    """Number of pairs among the valid tokens that a band of this half-width W keeps.

    All e^2, but of the m x m among the m = n - s tokens between sink and text the band alone: the
    diagonal, and on either side of it the sum of min(W, k) over k < m.
    """
    banded = video_end - sink
    return valid_end**2 - banded**2 + banded + 2 * _sum_min(window, banded)


def is_narrow(sink: int, grid: tuple[int, int, int], text: int, density: float) -> bool:
    """Whether a band of this density does not reach as far as one frame."""
    frames, height, width = grid
    video_end = frames * height * width
    length = video_end + text
    kept = kept_elements(sink, video_end, torch.tensor(length), torch.tensor(height * width))
    return kept.item() > density * length**2


def _sum_min(window: Tensor, count: int) -> Tensor:
    """The sum of min(W, k) over k = 0 .. count - 1."""
    ramp = window.clamp(max=max(count - 1, 0))
    return ramp * (ramp + 1) // 2 + (count - 1 - ramp) * ramp


def is_kept(i: Tensor, j: Tensor, bounds: Tensor) -> Tensor:
    """Whether the query at position i attends the key at position j.

    Args:
        i, j: Positions, of shapes that broadcast.
        bounds: int32 [..., 4], whose leading dimensions broadcast with them.
    """
    sink, video_end, valid_end, window = bounds.unbind(-1)
    valid = (i < valid_end) & (j < valid_end)
    padding = (i >= valid_end) & (j >= valid_end)
    always = (i < sink) | (j < sink) | (i >= video_end) | (j >= video_end)
    return (valid & (always | ((i - j).abs() <= window))) | padding


def mask_function(bounds: Tensor) -> Kept:
    """The mask in flex_attention's form; all it depends on is read from the tensor `bounds`.

    So neither another prompt nor another resolution makes other code of it.
    """

    def kept(sample: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return is_kept(i, j, bounds[sample])

    return kept


def make_tables(bounds: Tensor, length: int, block_size: int) -> Tables:
    """Which blocks of a row are kept in part, and which as a whole.

    Args:
        bounds: int32 [B, 4] from `make_bounds`.
        length: Number S of tokens, with padding; n = ceil(S / block_size).
        block_size: Tokens of a block. One that reaches beyond S counts as kept in part.

    Returns:
        int32 counts [B, 1, n] and indices [B, 1, n, n], of which the first ones count: of blocks
        kept in part, then of blocks kept as a whole.
    """
    some, whole = kept_blocks(bounds, length, block_size)
    return (*_table(some & ~whole), *_table(whole))


def block_mask(tables: Tables, bounds: Tensor, length: int, block_size: int) -> BlockMask:
    """The mask [B, 1, S, S] for flex_attention's forward pass, from `make_tables`.

    It is put together where it is used: its length would be a constant of compiled code that reads
    it from an object.
    """
    return BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=block_size,
        mask_mod=mask_function(bounds),
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


def kept_blocks(bounds: Tensor, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Which blocks [B, n, n] keep some of their elements, and which keep all.

    A block is two intervals of positions. Some pair of two intervals is within W if the gap between
    them is; all pairs are if their far ends are.
    """
    starts = torch.arange(0, length, block_size, device=bounds.device, dtype=torch.int32)
    ends = (starts + block_size).clamp(max=length)  # behind the last token
    i, i_end, j, j_end = starts[:, None], ends[:, None], starts, ends
    sink, video_end, valid_end, window = (each[:, None, None] for each in bounds.unbind(-1))

    # What the band alone may keep: rows and columns between the sink and the text.
    row, row_end = i.maximum(sink), i_end.minimum(video_end)
    column, column_end = j.maximum(sink), j_end.minimum(video_end)

    valid = (i < valid_end) & (j < valid_end)
    only_band = (i >= sink) & (i_end.minimum(valid_end) <= video_end)
    only_band = only_band & (j >= sink) & (j_end.minimum(valid_end) <= video_end)
    gap = (column - row_end).maximum(row - column_end) + 1
    padding = (i_end > valid_end) & (j_end > valid_end)
    some = (valid & (~only_band | (gap <= window))) | padding

    all_valid = (i_end <= valid_end) & (j_end <= valid_end)
    none_left = (row >= row_end) | (column >= column_end)
    reach = (row_end - 1 - column).maximum(column_end - 1 - row)
    all_padding = (i >= valid_end) & (j >= valid_end)
    inside = (i + block_size <= length) & (j + block_size <= length)
    whole = inside & ((all_valid & (none_left | (reach <= window))) | all_padding)
    return some, whole


def _table(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """int32 counts [B, 1, n] and, in front, the indices [B, 1, n, n] of a row's chosen blocks."""
    order = torch.argsort((~blocks).to(torch.uint8), dim=-1, stable=True)
    counts = blocks.sum(dim=-1)
    return counts.to(torch.int32)[:, None], order.to(torch.int32)[:, None]


def token_major(sink: int, frames: int, frame_size: int, length: int) -> tuple[Tensor, Tensor]:
    """The order of a temporal head's tokens, and where each token is in it.

    The `frames` frames of `frame_size` tokens behind the sink are put place by place; the sink in
    front and what is behind the video stay where they are.

    Returns:
        order: int32 [S], the token at each position.
        positions: int32 [S], the position of each token; the inverse.
    """
    order = torch.arange(length, dtype=torch.int32)
    positions, video = order.clone(), slice(sink, sink + frames * frame_size)
    order[video] = order[video].view(frames, frame_size).T.flatten()
    positions[video] = positions[video].view(frame_size, frames).T.flatten()
    return order, positions
