"""Several token streams of a model as one tensor, so that everything that decides sees but one.

Some models carry tokens of two kinds beside each other, of different widths, and read both behind
the last block: video and audio. Their x, p and y are joined where they enter the cache, and split
again behind the last block.

A stream counts by its mean square, not by its size: video has a hundred times the elements that
audio has, which could change altogether before anybody saw it. So a larger stream is scaled down.
By a power of two, which rounds nothing but what is next to 0 in fp16, and is taken back when it is
split; a smaller one scaled up might leave fp16's range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def join(streams: Sequence[Tensor]) -> Tensor:
    """[B, N, g] the tokens of all streams, one behind the other, in a tensor of their own.

    Args:
        streams: [B, S, D] of each, S and D its own. g is the greatest common divisor of all D, so
            that a row holds elements of one token.

    Returns:
        Of the dtype that holds them all. A stream's elements are multiplied by its scale, 2^-k with
        k = log2(n / n_min) / 2, rounded, of its n elements and those of the smallest stream.
    """
    width = math.gcd(*[each.shape[-1] for each in streams])
    parts = [each.reshape(each.shape[0], -1, width) for each in streams]
    joined = torch.cat(parts, dim=1)
    for part, scale in zip(_parts_of(joined, streams), _scales(streams), strict=True):
        if scale != 1:
            part.mul_(scale)
    return joined


def split(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The streams of `join`, each with the shape and dtype of its tensor in `like`."""
    parts = zip(_parts_of(joined, like), _scales(like), like, strict=True)
    return [(part / scale).reshape(each.shape).to(each.dtype) for part, scale, each in parts]


def _parts_of(joined: Tensor, streams: Sequence[Tensor]) -> Iterator[Tensor]:
    """Views of the joined tensor, one a stream; autograd lets each be written into."""
    batch, _, width = joined.shape
    start = 0
    for each in streams:
        rows = each.numel() // (batch * width)
        yield joined.narrow(1, start, rows)
        start += rows


def _scales(streams: Sequence[Tensor]) -> list[float]:
    sizes = [max(each.numel(), 1) for each in streams]
    return [2.0 ** -round(math.log2(size / min(sizes)) / 2) for size in sizes]
