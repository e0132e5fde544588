"""A sample of a tensor's elements, to see cheaply whether tensors are alike."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SIZE = 1024  # elements
_SEED = 0


@torch.no_grad()
def sample_of(tensor: Tensor) -> Tensor:
    """A fixed random choice of elements [n], n <= 1024: the same of all tensors of a size.

    It is a tensor of its own, whatever becomes of the other one.
    """
    count = tensor.numel()
    if count <= SIZE:
        return tensor.detach().flatten().clone()
    return torch.take(tensor.detach(), _choice(count, tensor.device))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _choice(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(count, (SIZE,), generator=generator).to(device)
