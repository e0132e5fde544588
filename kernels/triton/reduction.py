"""Sums over all programs of a launch in one launch: partial sums, a ticket, and the last program.

Every program stores its partial sums into the workspace and then takes a ticket. Whoever takes the
last one knows that all others have stored theirs, adds them in an order fixed by their index, and
sets the ticket back to zero for the next launch. No float is added atomically, so the result has
the same bits whichever program comes last. The workspace beyond the ticket may hold anything before
a launch: nothing is read that this launch has not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..workspace import HEADER_BYTES
from .memory import is_active

_HEADER_BYTES = tl.constexpr(HEADER_BYTES)
_COLUMNS = tl.constexpr(8)  # the room that a workspace has for each program


@triton.jit
def store_partial(workspace, column: tl.constexpr, value):
    """One partial sum of this program, a scalar, so that only the first thread stores it."""
    partials = (workspace + _HEADER_BYTES).to(tl.pointer_type(value.dtype))
    tl.store(partials + column * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def is_last(workspace):
    """Take a ticket: publishes what this program stored, and tells the last one that all did.

    Triton before 3.9 promises no barrier before an atomic, and one that the scratch memory of a sum
    happens to need may go away. Without it a slow warp could still be reading what the last program
    is about to change (`newest`, in record).
    """
    tl.debug_barrier()
    ticket = workspace.to(tl.pointer_type(tl.int32))
    taken = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    return taken == tl.num_programs(0) - 1


@triton.jit
def add_partials(
    workspace, sums, active, batch, per_sample, COLUMNS: tl.constexpr, ACC: tl.constexpr
):
    """The last program's part: sums [B, COLUMNS] from the partial sums, then the ticket back to 0.

    Rows of inactive samples stay as they are. `.cg` reads past this multiprocessor's own cache,
    which may hold what an earlier launch had left.
    """
    partials = (workspace + _HEADER_BYTES).to(tl.pointer_type(ACC))
    columns = tl.arange(0, _COLUMNS)
    # 512 or, with fp64, 256: a sample's partial sums in one load or two, in few registers.
    WIDTH: tl.constexpr = 16384 // ACC.primitive_bitwidth
    lanes = tl.arange(0, WIDTH)
    for sample in range(batch):
        total = tl.zeros([_COLUMNS, WIDTH], ACC)
        for start in range(0, per_sample, WIDTH):
            index = start + lanes
            mask = (columns < COLUMNS)[:, None] & (index < per_sample)[None, :]
            offsets = columns[:, None] * tl.num_programs(0) + (sample * per_sample + index)[None, :]
            total += tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        row = tl.sum(total, axis=1)
        if is_active(active, sample):
            pointers = sums + sample * COLUMNS + columns
            tl.store(pointers, row.to(sums.dtype.element_ty), mask=columns < COLUMNS)
    tl.store(workspace.to(tl.pointer_type(tl.int32)), 0)


@triton.jit
def load_column(sums, column: tl.constexpr, rows, batch, total, COLUMNS: tl.constexpr):
    """One column of sums [B, COLUMNS] at `rows`, with row B the column's total so far.

    Rows are visited in ascending order, so the total is complete where row B is visited.
    """
    value = tl.load(sums + rows * COLUMNS + column, mask=rows < batch, other=0.0)
    total += tl.sum(value)
    return tl.where(rows == batch, total, value), total


@triton.jit
def divide(top, bottom):
    """top / bottom, correctly rounded: the plain operator is an approximation for fp32."""
    if top.dtype == tl.float64:
        return top / bottom
    else:
        return tl.div_rn(top, bottom)


@triton.jit
def is_finite(value):
    return tl.abs(value) < float("inf")  # false for NaN


@triton.jit
def clipped_gamma(top, bottom, residual, low, high):
    """top / bottom within [low, high]; 1 before the clip if bottom is 0; NaN if any is not finite.

    Finiteness is judged before the clip, which would hide an infinite sum.
    """
    low = tl.cast(low, top.dtype)
    high = tl.cast(high, top.dtype)
    gamma = tl.where(bottom == 0, 1.0, divide(top, bottom))
    gamma = tl.where(gamma < low, low, gamma)
    gamma = tl.where(gamma > high, high, gamma)
    valid = is_finite(top) & is_finite(bottom) & is_finite(residual)
    return tl.where(valid, gamma, float("nan"))
