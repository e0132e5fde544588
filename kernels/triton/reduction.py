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

from ..workspace import HEADER_BYTES, MAILBOX_PROMISE, MAILBOX_RESULT

_HEADER_BYTES = tl.constexpr(HEADER_BYTES)
_MAILBOX_PROMISE = tl.constexpr(MAILBOX_PROMISE)
_MAILBOX_RESULT = tl.constexpr(MAILBOX_RESULT)
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
def generation_of(workspace):
    """How often the barrier of a grid on this workspace has opened. Read it before `is_last`.

    It counts up from any value and is never put back: a program that is late cannot take a later
    launch's opening for its own.
    """
    return tl.atomic_add(_generation(workspace), 0, sem="relaxed", scope="gpu")


@triton.jit
def let_others_go_on(workspace):
    """The last program: what it has stored is there for those who `wait_for_the_last`."""
    tl.debug_barrier()
    tl.atomic_add(_generation(workspace), 1, sem="release", scope="gpu")


@triton.jit
def wait_for_the_last(workspace, generation):
    """All other programs; the last one must be able to run meanwhile, or they wait for ever."""
    while tl.atomic_add(_generation(workspace), 0, sem="acquire", scope="gpu") == generation:
        pass
    tl.debug_barrier()


@triton.jit
def _generation(workspace):
    return workspace.to(tl.pointer_type(tl.int32)) + 1


@triton.jit
def add_partials(
    workspace,
    sums,
    active,
    batch,
    per_sample,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The last program's part: sums [B, COLUMNS] from the partial sums, then the ticket back to 0.

    `AT_ONCE` samples are added up beside each other (`launch.samples_at_once`). Rows of inactive
    samples stay as they are. `.cg` reads past this multiprocessor's own cache, which may hold what
    an earlier launch had left.
    """
    partials = (workspace + _HEADER_BYTES).to(tl.pointer_type(ACC))
    rows = tl.arange(0, AT_ONCE * _COLUMNS)  # a column of a sample
    column = rows % _COLUMNS
    # One sample: 256 or, with fp64, 128. Eight elements a thread, in few registers.
    WIDTH: tl.constexpr = 8192 // ACC.primitive_bitwidth // AT_ONCE
    lanes = tl.arange(0, WIDTH)
    for first in range(0, batch, AT_ONCE):
        sample = first + rows // _COLUMNS
        here = (column < COLUMNS) & (sample < batch)
        begin = column * tl.num_programs(0) + sample * per_sample
        total = tl.zeros([AT_ONCE * _COLUMNS, WIDTH], ACC)
        for start in range(0, per_sample, WIDTH):
            index = start + lanes
            mask = here[:, None] & (index < per_sample)[None, :]
            offsets = begin[:, None] + index[None, :]
            total += tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        row = tl.sum(total, axis=1)
        if active is not None:
            here = here & (tl.load(active + sample, mask=here, other=0) != 0)
        tl.store(sums + sample * COLUMNS + column, row.to(sums.dtype.element_ty), mask=here)
    tl.store(workspace.to(tl.pointer_type(tl.int32)), 0)


@triton.jit
def store_result(result, mailbox, rows, batch, error, gamma):
    """(error, gamma) of `rows` up to row B; the same goes into the mailbox, if there is one."""
    mask = rows <= batch
    tl.store(result + 2 * rows, error, mask=mask)
    tl.store(result + 2 * rows + 1, gamma, mask=mask)
    if mailbox is not None:
        letter = (mailbox + _MAILBOX_RESULT).to(tl.pointer_type(error.dtype))
        tl.store(letter + 2 * rows, error, mask=mask)
        tl.store(letter + 2 * rows + 1, gamma, mask=mask)


@triton.jit
def send(mailbox, promise, serial):
    """Ends a letter to the host: whoever finds its serial there finds the rest, too."""
    if mailbox is not None:
        if promise is not None:
            tl.store((mailbox + _MAILBOX_PROMISE).to(promise.dtype), tl.load(promise))
        tl.debug_barrier()
        place = mailbox.to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(place, serial, sem="release", scope="sys")


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
