"""Probe statistics of the published rules: one pass that also stores p (and x) for the next step.

A sample's programs take its blocks in turn. Each element is read and then overwritten by the same
program, so p may be the buffer that it is stored to. Columns and rules: `dicache.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..workspace import Results
from . import launch
from .memory import is_active, load, my_share, store
from .reduction import (
    add_partials,
    clipped_gamma,
    divide,
    is_last,
    load_column,
    send,
    store_partial,
    store_result,
)

_ROWS = tl.constexpr(64)  # samples finished at once


def probe_statistics(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor,
    x_prev: Tensor | None,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    least_squares: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Results | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Error and gamma of the published rules; also stores p (and x) for the next step.

        delta_y = sum|p - p_prev| / sum|p_prev|        error = delta_y, or |delta_y - delta_x|
        gamma   = clip(sum|a| / sum|d|, low, high),    a = q - q_old,   d = q_new - q_old

    or, with `least_squares`, gamma = clip(<a, d> / <d, d>, low, high). Arguments, returns and
    errors: `dicache.reference.probe_statistics`; rows must be contiguous.
    """
    given = (x, p, p_prev, x_prev, probe_window, newest, entry_sums, active, workspace)
    plan = launch.remembered(_prepare, given, low, high, bool(least_squares))
    written = {"p_prev": p_prev, "x_prev": x_prev}
    launch.check_memory(plan, written, {"x": x, "p": p, "probe_window": probe_window})
    sums, result, *letter = launch.results(x, plan, out)
    if plan.batch == 0:
        _finish(sums, result, letter, low, high)
    else:
        if workspace is None:
            workspace = launch.new_workspace(x, plan)
        launch.run(
            _probe_kernel, plan, x, p, p_prev, x_prev, probe_window, newest, entry_sums, active,
            workspace, sums, result, *letter, low, high,
        )  # fmt: skip
    return sums, result


def finish_probe_statistics(sums: Tensor, low: float, high: float) -> Tensor:
    """(error, gamma) [B + 1, 2] from the sums of `probe_statistics`, after an all-reduce if any."""
    checks.check_finish(sums, low, high, columns=(5, 7))
    result = sums.new_empty((sums.shape[0] + 1, 2))
    _finish(sums.contiguous(), result, launch.NO_LETTER, low, high)
    return result


def _finish(sums: Tensor, result: Tensor, letter: Sequence[Any], low: float, high: float) -> None:
    with launch.current_device_of(sums):
        _finish_probe_kernel[(1,)](
            sums, result, *letter, low, high, sums.shape[0],
            COLUMNS=sums.shape[1], **launch.OPTIONS,
        )  # fmt: skip


def _prepare(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor,
    x_prev: Tensor | None,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    active: Tensor | None,
    workspace: Tensor | None,
    low: float,
    high: float,
    least_squares: bool,
) -> launch.Plan:
    checks.check_probe_statistics(
        x, p, p_prev, x_prev, probe_window, newest, entry_sums, low, high, active
    )
    checks.check_rows(x=x, p=p, p_prev=p_prev, x_prev=x_prev, probe_window=probe_window)
    launch.check_contiguous(newest=newest, entry_sums=entry_sums, active=active)
    columns = 5 if x_prev is None else 7
    strides = (
        launch.batch_stride(x), launch.batch_stride(p), launch.batch_stride(p_prev),
        launch.batch_stride(x_prev), *launch.window_strides(probe_window),
    )  # fmt: skip
    programs = resident(x, p, x_prev, least_squares)
    return launch.summing(
        (x, p), workspace, strides, columns, programs, LEAST_SQUARES=least_squares, COLUMNS=columns
    )


def resident(x: Tensor, p: Tensor, x_prev: Tensor | None, least_squares: bool) -> int:
    """Programs on one multiprocessor: two sums more, or a wide tensor more, leave room for two."""
    programs = launch.resident(x, p)
    return 2 if x_prev is not None or (programs == 3 and least_squares) else programs


@triton.jit(
    do_not_specialize=["serial", "batch", "size", "per_sample"],
    do_not_specialize_on_alignment=launch.SMALL,
)
def _probe_kernel(
    x,
    p,
    p_prev,
    x_prev,
    window,
    newest,
    entry_sums,
    active,
    workspace,
    sums,
    result,
    mailbox,
    promise,
    serial,
    low: tl.float64,
    high: tl.float64,
    batch,
    size,
    per_sample,
    x_stride,
    p_stride,
    p_prev_stride,
    x_prev_stride,
    entry_stride,
    window_stride,
    LEAST_SQUARES: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    add_share(
        x, p, p_prev, x_prev, window, newest, entry_sums, active, workspace, size, per_sample,
        x_stride, p_stride, p_prev_stride, x_prev_stride, entry_stride, window_stride,
        LEAST_SQUARES, ACC, BLOCK,
    )  # fmt: skip
    if is_last(workspace):
        conclude(
            workspace, sums, result, mailbox, promise, serial, low, high, batch, per_sample,
            COLUMNS, AT_ONCE, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["serial", "batch"], do_not_specialize_on_alignment=launch.SMALL)
def _finish_probe_kernel(
    sums,
    result,
    mailbox,
    promise,
    serial,
    low: tl.float64,
    high: tl.float64,
    batch,
    COLUMNS: tl.constexpr,
):
    _finish_rows(sums, result, mailbox, low, high, batch, COLUMNS)
    send(mailbox, promise, serial)


@triton.jit
def conclude(
    workspace,
    sums,
    result,
    mailbox,
    promise,
    serial,
    low,
    high,
    batch,
    per_sample,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The last program's part: everything that follows from the partial sums."""
    add_partials(workspace, sums, None, batch, per_sample, COLUMNS, AT_ONCE, ACC)
    tl.debug_barrier()  # every thread reads rows below that others have stored
    _finish_rows(sums, result, mailbox, low, high, batch, COLUMNS)
    send(mailbox, promise, serial)


@triton.jit
def add_share(
    x,
    p,
    p_prev,
    x_prev,
    window,
    newest,
    entry_sums,
    active,
    workspace,
    size,
    per_sample,
    x_stride,
    p_stride,
    p_prev_stride,
    x_prev_stride,
    entry_stride,
    window_stride,
    LEAST_SQUARES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's partial sums, into the workspace; stores its share of p (and x)."""
    sample, index, blocks, rest = my_share(per_sample, size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    x += sample * x_stride
    p += sample * p_stride
    p_prev += sample * p_prev_stride
    if x_prev is not None:
        x_prev += sample * x_prev_stride
    new_entry = (tl.load(newest + sample) != 0).to(tl.int64)
    q_new = window + sample * window_stride + new_entry * entry_stride
    q_old = window + sample * window_stride + (1 - new_entry) * entry_stride
    works = is_active(active, sample)

    p_moved = tl.zeros([BLOCK], ACC)
    p_size = tl.zeros([BLOCK], ACC)
    top = tl.zeros([BLOCK], ACC)
    x_moved = tl.zeros([BLOCK], ACC)
    x_size = tl.zeros([BLOCK], ACC)
    # The partial block comes first: its masked loads need the most registers, and no sums are held
    # yet.
    if works & (rest > 0) & (index == blocks % per_sample):
        p_moved, p_size, top, x_moved, x_size = _add_block(
            x, p, p_prev, x_prev, q_old, q_new, blocks * BLOCK, lanes, lanes < rest,
            p_moved, p_size, top, x_moved, x_size, LEAST_SQUARES, ACC,
        )  # fmt: skip
    for block in range(index, tl.where(works, blocks, 0), per_sample):
        p_moved, p_size, top, x_moved, x_size = _add_block(
            x, p, p_prev, x_prev, q_old, q_new, block * BLOCK, lanes, None,
            p_moved, p_size, top, x_moved, x_size, LEAST_SQUARES, ACC,
        )  # fmt: skip

    # What record left for this sample enters the sums once, through the sample's first program.
    first = works & (index == 0)
    row = entry_sums + sample * 4
    bottom = tl.load(row + (1 if LEAST_SQUARES else 0))
    residual = tl.load(row + 2).to(ACC) + tl.load(row + 3).to(ACC)
    store_partial(workspace, 0, tl.sum(p_moved))
    store_partial(workspace, 1, tl.sum(p_size))
    store_partial(workspace, 2, tl.sum(top))
    store_partial(workspace, 3, tl.where(first, bottom.to(ACC), 0.0))
    store_partial(workspace, 4, tl.where(first, residual, 0.0))
    if x_prev is not None:
        store_partial(workspace, 5, tl.sum(x_moved))
        store_partial(workspace, 6, tl.sum(x_size))


@triton.jit
def _add_block(
    x,
    p,
    p_prev,
    x_prev,
    q_old,
    q_new,
    start,
    lanes,
    mask,
    p_moved,
    p_size,
    top,
    x_moved,
    x_size,
    LEAST_SQUARES: tl.constexpr,
    ACC: tl.constexpr,
):
    """The five sums with one more block of a sample, whose p (and x) is stored."""
    x_value = load(x + start + lanes, mask, ACC)
    if x_prev is not None:
        x_before = load(x_prev + start + lanes, mask, ACC)
        x_moved += tl.abs(x_value - x_before)
        x_size += tl.abs(x_before)
    p_value = load(p + start + lanes, mask, ACC)
    old = load(q_old + start + lanes, mask, ACC)
    a = (p_value - x_value) - old
    if LEAST_SQUARES:
        top += a * (load(q_new + start + lanes, mask, ACC) - old)
    else:
        top += tl.abs(a)
    p_before = load(p_prev + start + lanes, mask, ACC)
    p_moved += tl.abs(p_value - p_before)
    p_size += tl.abs(p_before)
    if x_prev is not None:
        store(x_prev + start + lanes, x_value, mask)
    store(p_prev + start + lanes, p_value, mask)
    return p_moved, p_size, top, x_moved, x_size


@triton.jit
def _finish_rows(sums, result, mailbox, low, high, batch, COLUMNS: tl.constexpr):
    """result [B + 1, 2] = (error, gamma) from sums [B, COLUMNS]; row B is of the summed sums."""
    zero = tl.zeros([], sums.dtype.element_ty)
    total0, total1, total2, total3, total4, total5, total6 = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    for start in range(0, batch + 1, _ROWS):
        rows = start + tl.arange(0, _ROWS).to(tl.int64)
        p_moved, total0 = load_column(sums, 0, rows, batch, total0, COLUMNS)
        p_size, total1 = load_column(sums, 1, rows, batch, total1, COLUMNS)
        top, total2 = load_column(sums, 2, rows, batch, total2, COLUMNS)
        bottom, total3 = load_column(sums, 3, rows, batch, total3, COLUMNS)
        residual, total4 = load_column(sums, 4, rows, batch, total4, COLUMNS)
        error = divide(p_moved, p_size)
        if COLUMNS == 7:
            x_moved, total5 = load_column(sums, 5, rows, batch, total5, COLUMNS)
            x_size, total6 = load_column(sums, 6, rows, batch, total6, COLUMNS)
            error = tl.abs(error - divide(x_moved, x_size))
        gamma = clipped_gamma(top, bottom, residual, low, high)
        store_result(result, mailbox, rows, batch, error, gamma)
