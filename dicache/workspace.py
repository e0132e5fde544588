"""Memory that operators are given: scratch memory of launches that add up, and their results.

A workspace is a ticket and the counter of rounds, then a row of partial sums a block;
csrc/include/dicache/launch_plan.h and kernels/triton/launch.py plan within these bounds. A mailbox
is laid out as csrc/include/dicache/arguments.h says.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

HEADER_BYTES = 128  # the ticket, zero between two launches, and the count of rounds
BYTES_PER_BLOCK = 64  # up to 8 partial sums of 4 or 8 bytes
BLOCKS_PER_MULTIPROCESSOR = 4  # of CUDA; what is resident at 64 registers a thread
BLOCKS_ELSEWHERE = 512
MAILBOX_PROMISE, MAILBOX_RESULT = 8, 16  # bytes before them; the serial lies at 0


class Results(NamedTuple):
    """Where statistics write, for a caller who does not want new tensors in every call.

    The mailbox is memory that the host reads while later work still runs. A launch fills it and
    then stores the serial: who sees that number, another one in every call, finds what the call
    left. So nothing is copied between two launches, and a launch that goes on (`probe_and_combine`)
    need not be waited for.

    Attributes:
        sums: [B, C] fp32 (fp64 if x or p is fp64).
        result: [B + 1, 2], likewise.
        mailbox: uint8, at least 16 + 2 (B + 1) itemsize bytes: the serial (int32), from byte 8 the
            promise's bytes, from byte 16 the result. Pinned where x is on a GPU.
        serial: 1 to 2^31 - 1.
        promise: One more number that the host wants to read, on x's device, of up to 8 bytes.
    """

    sums: Tensor
    result: Tensor
    mailbox: Tensor | None = None
    serial: int = 0
    promise: Tensor | None = None


def make_results(x: Tensor, p: Tensor, columns: int, mailbox: bool = True) -> Results:
    """Memory for the statistics of tokens x and p [B, ...] with so many columns: 5, 6 or 7.

    It belongs to one stream at a time, as a workspace does. Give every call a serial of its own:
    `results._replace(serial=...)`.
    """
    wide = torch.float64 if torch.float64 in (x.dtype, p.dtype) else torch.float32
    batch = x.shape[0]
    sums = torch.empty(batch, columns, dtype=wide, device=x.device)
    result = torch.empty(batch + 1, 2, dtype=wide, device=x.device)
    if not mailbox:
        return Results(sums, result)
    num_bytes = MAILBOX_RESULT + result.numel() * result.element_size()
    host = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=x.is_cuda)
    return Results(sums, result, host)


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
