"""How the launchers cut their work: grid, strides, workspace and compile options.

The plan is a function of sizes and device alone, never of tuning or of what else runs, because the
grid fixes the order in which sums are added.

Checks and plan follow from the tensors' layouts: their shapes, strides, dtypes and devices. They
are made once a layout and remembered, because in Python they cost more than a small launch takes.
What depends on addresses or numbers is looked at in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..workspace import BLOCKS_ELSEWHERE, BYTES_PER_BLOCK, HEADER_BYTES, Results

NUM_WARPS = 8
_ELEMENTS_PER_THREAD = 8
_BLOCK = _ELEMENTS_PER_THREAD * 32 * NUM_WARPS

_REGISTERS = 65536  # of a multiprocessor

# A fused multiply-add rounds once where the reference rounds twice.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

# Arguments whose addresses are read and written a number at a time: nothing is compiled again
# because one of them lies elsewhere.
SMALL = (
    "newest", "entry_sums", "active", "gamma", "weights", "workspace", "sums", "result", "mailbox",
    "promise",
)  # fmt: skip

NO_LETTER = (None, None, 0)  # mailbox, promise and serial of results that go nowhere
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_MOST_LAYOUTS = 256
_known: dict[tuple[Any, ...], Any] = {}


@dataclass
class Plan:
    """What follows from the layouts of a call's tensors."""

    programs: int
    numbers: tuple[int, ...]  # sizes and strides, as the kernel takes them
    constants: dict[str, Any]  # arguments that are compiled in, and options
    batch: int
    resident: int = 0  # programs on a multiprocessor
    columns: int = 0  # of sums
    wide: torch.dtype = torch.float32  # dtype of sums
    lengths: tuple[int, ...] = ()  # bytes from the first to behind the last element, once known
    allowed: tuple[int, ...] = ()  # addresses that were looked at and may overlap as they do


def remembered(prepare: Callable[..., Any], tensors: tuple[Tensor | None, ...], *flags: Any) -> Any:
    """`prepare(*tensors, *flags)`, which is called once for all calls with these layouts.

    It sees the first call's tensors and must not ask for their addresses or values.
    """
    layouts = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    key = (prepare, flags, *layouts)
    known = _known.get(key)
    if known is None:
        known = prepare(*tensors, *flags)
        if len(_known) >= _MOST_LAYOUTS:
            _known.clear()
        _known[key] = known
    return known


def summing(
    tensors: tuple[Tensor, ...],
    workspace: Tensor | None,
    strides: tuple[int, ...],
    columns: int,
    resident: int,
    **constants: Any,
) -> Plan:
    """As many programs as the device runs at once, shared equally by the samples.

    `resident` is how many a multiprocessor runs. One program more would wait for the others and
    then run alone. x comes first of `tensors`, whose dtypes are the arithmetic's.
    """
    x, accumulator = tensors[0], wide(*tensors)
    batch, size, block = x.shape[0], sample_size(x), block_size(*tensors)
    room = max_programs(x.device, resident) // max(batch, 1)
    per_sample = max(1, min(triton.cdiv(size, block), room))
    if workspace is not None:
        _check_workspace(workspace, x, batch * per_sample)
    constants |= {"AT_ONCE": samples_at_once(batch), "ACC": accumulator, "BLOCK": block}
    constants |= _options(x, resident)
    numbers = (batch, size, per_sample, *strides)
    programs, dtype = batch * per_sample, torch_dtype(accumulator)
    return Plan(programs, numbers, constants, batch, resident, columns, dtype)


def elementwise(tensors: tuple[Tensor, ...], strides: tuple[int, ...], **constants: Any) -> Plan:
    """One block a program."""
    x, block = tensors[0], block_size(*tensors)
    batch, size = x.shape[0], sample_size(x)
    blocks = triton.cdiv(size, block)
    constants |= {"ACC": wide(*tensors), "BLOCK": block, **OPTIONS}
    return Plan(batch * blocks, (size, blocks, *strides), constants, batch)


def run(kernel: Any, plan: Plan, x: Tensor, *arguments: Any) -> None:
    """Launch a kernel of the package on x's device."""
    with current_device_of(x):
        kernel[(plan.programs,)](x, *arguments, *plan.numbers, **plan.constants)


def may_cooperate(plan: Plan, device: torch.device) -> bool:
    """Whether to ask for a launch whose programs wait for each other."""
    fits = 0 < plan.programs <= max_programs(device, plan.resident)
    return fits and has_cooperative_launch(device)


def has_cooperative_launch(device: torch.device) -> bool:
    """Not in the interpreter, where a program runs to its end before the next one begins."""
    return device.type == "cuda" and torch.version.hip is None


def results(x: Tensor, plan: Plan, out: Results | None) -> tuple[Any, ...]:
    """(sums, result, mailbox, promise, serial): buffers of the caller's, or new ones."""
    if out is None:
        sums = x.new_empty((plan.batch, plan.columns), dtype=plan.wide)
        return sums, sums.new_empty((plan.batch + 1, 2)), *NO_LETTER
    sums, result, mailbox, serial, promise = out
    given = (sums, result, mailbox, promise)
    remembered(_check_results, given, x.device, plan.batch, plan.columns, plan.wide)
    if mailbox is None:
        return sums, result, *NO_LETTER
    if not 0 < serial < 2**31 or mailbox.data_ptr() % 16:
        raise ValueError(
            f"serial is {serial}, and mailbox begins at {mailbox.data_ptr()}. Expected 1 to "
            f"2^31 - 1, another one than in the call before, and memory from ops.make_results."
        )
    if promise is not None:  # as bits, so that the kernel is one for all dtypes of a size
        promise = promise.view(_INTEGERS[promise.element_size()])
    return sums, result, mailbox, promise, serial


def _check_results(
    sums: Tensor,
    result: Tensor,
    mailbox: Tensor | None,
    promise: Tensor | None,
    device: torch.device,
    batch: int,
    columns: int,
    dtype: torch.dtype,
) -> bool:
    like = torch.empty(batch, columns, dtype=dtype, device=device)
    given = Results(sums, result, mailbox, 1, promise)
    checks.check_results(like, like.new_empty(batch + 1, 2), given)
    return True


def check_memory(
    plan: Plan,
    written: Mapping[str, Tensor | None],
    read: Mapping[str, Tensor | None],
    again: Mapping[str, Tensor | None] | None = None,
) -> None:
    """`checks.check_memory`, unless all lie apart, or lie where they lay in a call before.

    `again`: what is read once more after all is written.
    """
    given = (*written.values(), *read.values(), *(again.values() if again else ()))
    tensors = [t for t in given if t is not None]
    addresses = tuple([t.data_ptr() for t in tensors])
    if addresses == plan.allowed or (plan.lengths and _lie_apart(addresses, plan.lengths)):
        return
    checks.check_memory(written, read)
    if again is not None:
        checks.check_kept(written, again)
    plan.lengths, plan.allowed = tuple(_length_of(t) for t in tensors), addresses


def _lie_apart(addresses: tuple[int, ...], lengths: tuple[int, ...]) -> bool:
    end = 0
    for address, length in sorted(zip(addresses, lengths, strict=True)):
        if address < end:
            return False
        end = address + length
    return True


def _length_of(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()


def output_stride(x: Tensor, out: Tensor | None) -> int:
    """`batch_stride` of an output: contiguous where nobody gave one."""
    if out is None:
        return 0 if x.shape[0] == 1 else sample_size(x)
    return batch_stride(out)


def resident(*tensors: Tensor) -> int:
    """Programs of a summing launch on one multiprocessor: four with elements of 16 bits.

    A wider block takes twice the registers. ptxas keeps to what is left for each (`OPTIONS`);
    tests/test_triton_compile.py sees that nothing is spilled for it.
    """
    return 4 if all(tensor.element_size() == 2 for tensor in tensors) else 3


def _options(x: Tensor, resident: int) -> dict[str, Any]:
    """Compile options of a summing launch."""
    if x.is_xpu or torch.version.hip is not None:
        return OPTIONS
    registers = _REGISTERS // (32 * NUM_WARPS * resident)
    return OPTIONS | {"maxnreg": registers // 8 * 8}  # they are given out by eights


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


def samples_at_once(batch: int) -> int:
    """How many samples the last program adds up beside each other."""
    return 1 if batch <= 1 else 4 if batch <= 4 else 16


def sample_size(x: Tensor) -> int:
    """Elements of one sample of x [B, ...]."""
    return x.numel() // x.shape[0] if x.shape[0] else 0


def new_workspace(x: Tensor, plan: Plan) -> Tensor:
    """Of a call that was given none; it costs a launch."""
    num_bytes = HEADER_BYTES + BYTES_PER_BLOCK * plan.programs
    return torch.zeros(num_bytes, dtype=torch.uint8, device=x.device)


def _check_workspace(workspace: Tensor, x: Tensor, programs: int) -> None:
    num_bytes = HEADER_BYTES + BYTES_PER_BLOCK * programs
    if workspace.dtype != torch.uint8 or workspace.device != x.device:
        raise ValueError(
            f"workspace is {workspace.dtype} on {workspace.device}. Expected torch.uint8 on "
            f"{x.device}, from dicache.ops.make_workspace."
        )
    if workspace.numel() < num_bytes or not workspace.is_contiguous():
        raise ValueError(
            f"workspace has shape {list(workspace.shape)} and strides {list(workspace.stride())}. "
            f"Expected at least {num_bytes} contiguous bytes for this batch of {x.shape[0]}: make "
            f"it with dicache.ops.make_workspace for the largest batch."
        )


def current_device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's device the current one, which is where Triton launches."""
    if x.is_cuda:
        # To ask costs a tenth of the context.
        here = x.get_device() == torch.cuda.current_device()
        return nullcontext() if here else torch.cuda.device_of(x)
    return torch.xpu.device_of(x) if x.is_xpu else nullcontext()


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
