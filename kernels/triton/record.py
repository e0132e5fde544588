"""Record: push (r, q) = (y - x, p - x) into the windows, and leave the sums for the next step.

Each element is read and then overwritten by the same program, so x and p may be the very slots that
are overwritten. `newest` and `entry_sums` are changed by the last program alone: it has taken the
last ticket, so every other one has read them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from . import launch
from .memory import is_active, load, my_share, rounded, store
from .reduction import add_partials, is_last, store_partial

_ROWS = tl.constexpr(256)  # samples turned to their new entry at once


def record_residuals(
    x: Tensor,
    p: Tensor,
    y: Tensor,
    residual_window: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    first: bool,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    r"""Push (r, q) = (y - x, p - x) over the older window entry, and turn `newest` to it.

    Leaves entry_sums [B, 4] = sum|d|, <d, d>, sum|r_new|, sum|r_old| with d = q_new - q_old of the
    stored entries. Arguments and errors: `dicache.reference.record_residuals`; rows must be
    contiguous.
    """
    given = (
        x, p, y, residual_window, probe_window, newest, entry_sums, active, workspace,
    )  # fmt: skip
    plan = launch.remembered(_prepare, given, bool(first))
    windows = {"residual_window": residual_window, "probe_window": probe_window}
    launch.check_memory(plan, windows, {"x": x, "p": p, "y": y})
    if plan.batch == 0:
        return
    if workspace is None:
        workspace = launch.new_workspace(x, plan)
    launch.run(
        _record_kernel, plan, x, p, y, residual_window, probe_window, newest, entry_sums, active,
        workspace,
    )  # fmt: skip


def _prepare(
    x: Tensor,
    p: Tensor,
    y: Tensor,
    residual_window: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    active: Tensor | None,
    workspace: Tensor | None,
    first: bool,
) -> launch.Plan:
    checks.check_record(x, p, y, residual_window, probe_window, newest, entry_sums, active)
    checks.check_rows(x=x, p=p, y=y, residual_window=residual_window, probe_window=probe_window)
    launch.check_contiguous(newest=newest, entry_sums=entry_sums, active=active)
    strides = (
        launch.batch_stride(x), launch.batch_stride(p), launch.batch_stride(y),
        *launch.window_strides(residual_window), *launch.window_strides(probe_window),
    )  # fmt: skip
    return launch.summing((x, p, y), workspace, strides, 4, launch.resident(x, p, y), FIRST=first)


@triton.jit(
    do_not_specialize=["batch", "size", "per_sample"],
    do_not_specialize_on_alignment=launch.SMALL,
)
def _record_kernel(
    x,
    p,
    y,
    residual_window,
    probe_window,
    newest,
    entry_sums,
    active,
    workspace,
    batch,
    size,
    per_sample,
    x_stride,
    p_stride,
    y_stride,
    residual_entry_stride,
    residual_stride,
    probe_entry_stride,
    probe_stride,
    FIRST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, index, blocks, rest = my_share(per_sample, size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    x += sample * x_stride
    p += sample * p_stride
    y += sample * y_stride
    # The entry that is newest now becomes the older one; the other slot takes the new entry.
    kept = (tl.load(newest + sample) != 0).to(tl.int64)
    residual_window += sample * residual_stride
    r_new = residual_window + (1 - kept) * residual_entry_stride
    r_old = residual_window + kept * residual_entry_stride
    probe_window += sample * probe_stride
    q_new = probe_window + (1 - kept) * probe_entry_stride
    q_old = probe_window + kept * probe_entry_stride
    works = is_active(active, sample)

    d_abs = tl.zeros([BLOCK], ACC)
    dd = tl.zeros([BLOCK], ACC)
    r_abs = tl.zeros([BLOCK], ACC)
    # The partial block comes first: its masked loads need the most registers, and no sums are held
    # yet.
    if works & (rest > 0) & (index == blocks % per_sample):
        d_abs, dd, r_abs = _record_block(
            x, p, y, r_new, r_old, q_new, q_old, blocks * BLOCK, lanes, lanes < rest,
            d_abs, dd, r_abs, FIRST, ACC,
        )  # fmt: skip
    for block in range(index, tl.where(works, blocks, 0), per_sample):
        d_abs, dd, r_abs = _record_block(
            x, p, y, r_new, r_old, q_new, q_old, block * BLOCK, lanes, None,
            d_abs, dd, r_abs, FIRST, ACC,
        )  # fmt: skip

    r_sum = tl.sum(r_abs)
    store_partial(workspace, 0, tl.sum(d_abs))
    store_partial(workspace, 1, tl.sum(dd))
    store_partial(workspace, 2, r_sum)
    if FIRST:
        store_partial(workspace, 3, r_sum)
    else:
        previous = tl.load(entry_sums + sample * 4 + 2).to(ACC)
        store_partial(workspace, 3, tl.where(works & (index == 0), previous, 0.0))
    if is_last(workspace):
        add_partials(workspace, entry_sums, active, batch, per_sample, 4, AT_ONCE, ACC)
        _turn_newest(newest, active, batch)


@triton.jit
def _record_block(
    x,
    p,
    y,
    r_new,
    r_old,
    q_new,
    q_old,
    start,
    lanes,
    mask,
    d_abs,
    dd,
    r_abs,
    FIRST: tl.constexpr,
    ACC: tl.constexpr,
):
    """The three sums with one more block of a sample, whose residuals are stored.

    All loads come before the stores, and the sums are of the rounded values, as they are stored.
    """
    x_value = load(x + start + lanes, mask, ACC)
    residual = load(y + start + lanes, mask, ACC) - x_value
    probe_residual = load(p + start + lanes, mask, ACC) - x_value
    r = rounded(residual, r_new.dtype.element_ty)
    q = rounded(probe_residual, q_new.dtype.element_ty)
    if FIRST:
        d = q.to(ACC) - q.to(ACC)  # zero, or NaN where q is not finite, as in the reference
        store(r_old + start + lanes, r, mask)
        store(q_old + start + lanes, q, mask)
    else:
        d = q.to(ACC) - load(q_old + start + lanes, mask, ACC)
    store(r_new + start + lanes, r, mask)
    store(q_new + start + lanes, q, mask)
    d_abs += tl.abs(d)
    dd += d * d
    r_abs += tl.abs(r.to(ACC))
    return d_abs, dd, r_abs


@triton.jit
def _turn_newest(newest, active, batch):
    """newest = 1 - newest for the active samples."""
    for start in range(0, batch, _ROWS):
        rows = start + tl.arange(0, _ROWS)
        mask = rows < batch
        if active is not None:
            mask = mask & (tl.load(active + rows, mask=mask, other=0) != 0)
        entry = tl.load(newest + rows, mask=mask, other=0)
        tl.store(newest + rows, (entry == 0).to(tl.int32), mask=mask)
