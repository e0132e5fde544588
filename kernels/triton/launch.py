"""How the launchers cut their work: grid, strides, workspace and compile options.

The plan is a function of sizes and device alone, never of tuning or of what else runs, because the
grid fixes the order in which sums are added.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..workspace import BLOCKS_ELSEWHERE, BYTES_PER_BLOCK, HEADER_BYTES

NUM_WARPS = 8
_ELEMENTS_PER_THREAD = 8
_BLOCK = _ELEMENTS_PER_THREAD * 32 * NUM_WARPS

# A fused multiply-add rounds once where the reference rounds twice.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Plan:
    """The grid of a summing launch over tensors [B, ...]."""

    batch: int
    size: int  # elements of one sample
    block: int  # elements that a program takes at once
    programs_per_sample: int

    @property
    def programs(self) -> int:
        return self.batch * self.programs_per_sample

    @property
    def grid(self) -> tuple[int]:
        return (self.programs,)


def plan(x: Tensor, *others: Tensor, resident: int = 3) -> Plan:
    """As many programs as the device runs at once, shared equally by the samples.

    `resident` is how many fit on a multiprocessor: 3 with up to 80 registers a thread, 2 with up to
    128. One program more would wait for the others and then run alone.
    """
    batch, size, block = x.shape[0], sample_size(x), block_size(x, *others)
    room = max_programs(x.device, resident) // max(batch, 1)
    return Plan(batch, size, block, max(1, min(triton.cdiv(size, block), room)))


def max_programs(device: torch.device, resident: int) -> int:
    """How many programs a summing launch has if the batch does not need more."""
    if device.type != "cuda":
        return BLOCKS_ELSEWHERE
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


def block_size(*tensors: Tensor) -> int:
    """Elements of a block: one 16-byte vector a thread of a 2-byte dtype, two of a wider one.

    More of them need so many registers that fewer programs run at once.
    """
    wide = any(tensor.element_size() == 8 for tensor in tensors)
    return _BLOCK // 2 if wide else _BLOCK


def sample_size(x: Tensor) -> int:
    """Elements of one sample of x [B, ...]."""
    return x.numel() // x.shape[0] if x.shape[0] else 0


def take_workspace(workspace: Tensor | None, x: Tensor, plan: Plan) -> Tensor:
    """`workspace` if it has room for the plan; a new one, which costs a launch, if it is `None`."""
    num_bytes = HEADER_BYTES + BYTES_PER_BLOCK * plan.programs
    if workspace is None:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=x.device)
    if workspace.dtype != torch.uint8 or workspace.device != x.device:
        raise ValueError(
            f"workspace is {workspace.dtype} on {workspace.device}. Expected torch.uint8 on "
            f"{x.device}, from dicache.ops.make_workspace."
        )
    if workspace.numel() < num_bytes or not workspace.is_contiguous():
        raise ValueError(
            f"workspace has shape {list(workspace.shape)} and strides {list(workspace.stride())}. "
            f"Expected at least {num_bytes} contiguous bytes for this batch of {plan.batch}: make "
            f"it with dicache.ops.make_workspace for the largest batch."
        )
    return workspace


def device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's device the current one, which is where Triton launches."""
    return torch.xpu.device_of(x) if x.is_xpu else torch.cuda.device_of(x)  # nothing on the CPU


def wide(*tensors: Tensor) -> tl.dtype:
    """The dtype of the arithmetic."""
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def torch_dtype(accumulator: tl.dtype) -> torch.dtype:
    """The same dtype for an allocation."""
    return torch.float64 if accumulator == tl.float64 else torch.float32


def batch_stride(tensor: Tensor | None) -> int:
    """Elements from one sample of [B, ...] to the next.

    0 where there is one sample, so that an odd size does not cost it the 16-byte accesses.
    """
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def window_strides(window: Tensor) -> tuple[int, int]:
    """Elements of a window [2, B, ...] from entry to entry and from sample to sample."""
    return window.stride(0), batch_stride(window[0])


def check_contiguous(**tensors: Tensor | None) -> None:
    """The small tensors of one number or row a sample: the kernels take them without strides."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}. "
                f"The Triton kernels need it contiguous: call .contiguous()."
            )
