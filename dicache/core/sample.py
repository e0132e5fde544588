"""A sample of a tensor's elements, to see cheaply whether tensors are alike."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SIZE = 1024  # elements


@torch.no_grad()
def rows_of(tensor: Tensor, rows: int) -> Tensor:
    """A fixed choice of elements [rows, n] in fp32, n <= 1024: the same of all tensors of a size.

    It is a tensor of its own, whatever becomes of the other one.

    Args:
        tensor: [B, ...], or anything else.
        rows: B for a choice of every row; where the tensor has not so many, it is one row.
    """
    tensor = tensor.detach()
    if tensor.dim() < 2 or tensor.shape[0] != rows:
        rows = 1
    count = tensor.numel() // max(rows, 1)
    if count <= SIZE:
        return tensor.reshape(rows, count).to(torch.float32, copy=True)
    return torch.take(tensor, places(count, rows, tensor.device)).to(torch.float32)


def sample_of(tensor: Tensor) -> Tensor:
    """The same of the whole tensor, [n]."""
    return rows_of(tensor, 1)[0]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def places(count: int, rows: int, device: torch.device) -> Tensor:
    """Places of elements [rows, SIZE], hashed from 0, 1, ... on the device: a copy would wait."""
    mixed = torch.arange(SIZE, device=device) * 0x9E3779B97F4A7C1
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    chosen = ((mixed ^ (mixed >> 32)) & 0x3FFFFFFFFFFFFFFF) % count
    return chosen + count * torch.arange(rows, device=device)[:, None]
