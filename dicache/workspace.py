"""Scratch memory of the launches that add up: a ticket, then a row of partial sums a block.

csrc/include/dicache/launch_plan.h and kernels/triton/launch.py plan within these bounds.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

HEADER_BYTES = 128  # the ticket, zero between two launches
BYTES_PER_BLOCK = 64  # up to 8 partial sums of 4 or 8 bytes
BLOCKS_PER_MULTIPROCESSOR = 4  # of CUDA; what is resident at 64 registers a thread
BLOCKS_ELSEWHERE = 512


def make_workspace(x: Tensor) -> Tensor:
    """Scratch memory for the partial sums of statistics and record on tensors like x [B, ...].

    One belongs to one stream at a time: launches that run side by side must not share it. Every
    launch leaves it ready for the next one. Without a workspace the GPU backends allocate one in
    each call and clear its counter, which is a second launch.

    Returns:
        uint8, zeroed, about 34 KB on an H200; empty on the CPU, which needs none.
    """
    if x.device.type == "cpu" and not interprets_triton():
        return torch.zeros(0, dtype=torch.uint8, device=x.device)
    blocks = max(max_blocks(x.device), x.shape[0])
    num_bytes = HEADER_BYTES + BYTES_PER_BLOCK * blocks
    return torch.zeros(num_bytes, dtype=torch.uint8, device=x.device)


def max_blocks(device: torch.device) -> int:
    """The most blocks that a launch has; more only where there are more samples than that."""
    if device.type != "cuda":
        return BLOCKS_ELSEWHERE
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return BLOCKS_PER_MULTIPROCESSOR * processors


def interprets_triton() -> bool:
    """Whether Triton kernels run on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
