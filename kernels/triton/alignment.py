"""Statistics of the verified alignment: one pass over x, p and both window entries, no store.

Both entries are read anyway, so the loads do not wait for `newest`: it only chooses, in registers,
which of the two is the older. Columns and rules: `dicache.reference`.
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
from .memory import is_active, load, my_share
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


def alignment_statistics(
    x: Tensor,
    p: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    relative_to_probe: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Results | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Error and gamma of the verified alignment: how well the trajectory predicts the probe.

        a = q - q_old     d = q_new - q_old     gamma = clip(<a, d> / <d, d>, low, high)
        error = ||a - gamma d|| / ||q||, or / ||p|| with `relative_to_probe`

    Arguments, returns and errors: `dicache.reference.alignment_statistics`; rows must be
    contiguous.
    """
    given = (x, p, probe_window, newest, entry_sums, active, workspace)
    plan = launch.remembered(_prepare, given, low, high, bool(relative_to_probe))
    sums, result, *letter = launch.results(x, plan, out)
    if plan.batch == 0:
        _finish(sums, result, letter, low, high, relative_to_probe)
    else:
        if workspace is None:
            workspace = launch.new_workspace(x, plan)
        launch.run(
            _alignment_kernel, plan, x, p, probe_window, newest, entry_sums, active, workspace,
            sums, result, *letter, low, high,
        )  # fmt: skip
    return sums, result


def finish_alignment_statistics(
    sums: Tensor, low: float, high: float, relative_to_probe: bool = False
) -> Tensor:
    """(error, gamma) [B + 1, 2] from the sums of `alignment_statistics`."""
    checks.check_finish(sums, low, high, columns=(6,))
    result = sums.new_empty((sums.shape[0] + 1, 2))
    _finish(sums.contiguous(), result, launch.NO_LETTER, low, high, relative_to_probe)
    return result


def _finish(
    sums: Tensor,
    result: Tensor,
    letter: Sequence[Any],
    low: float,
    high: float,
    relative_to_probe: bool,
) -> None:
    with launch.current_device_of(sums):
        _finish_alignment_kernel[(1,)](
            sums, result, *letter, low, high, sums.shape[0],
            TO_PROBE=relative_to_probe, **launch.OPTIONS,
        )  # fmt: skip


def _prepare(
    x: Tensor,
    p: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    active: Tensor | None,
    workspace: Tensor | None,
    low: float,
    high: float,
    relative_to_probe: bool,
) -> launch.Plan:
    checks.check_alignment_statistics(x, p, probe_window, newest, entry_sums, low, high, active)
    checks.check_rows(x=x, p=p, probe_window=probe_window)
    launch.check_contiguous(newest=newest, entry_sums=entry_sums, active=active)
    strides = (
        launch.batch_stride(x), launch.batch_stride(p), *launch.window_strides(probe_window),
    )  # fmt: skip
    programs = launch.resident(x, p)
    return launch.summing((x, p), workspace, strides, 6, programs, TO_PROBE=relative_to_probe)


@triton.jit(
    do_not_specialize=["serial", "batch", "size", "per_sample"],
    do_not_specialize_on_alignment=launch.SMALL,
)
def _alignment_kernel(
    x,
    p,
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
    entry_stride,
    window_stride,
    TO_PROBE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    add_share(
        x, p, window, newest, entry_sums, active, workspace, size, per_sample,
        x_stride, p_stride, entry_stride, window_stride, ACC, BLOCK,
    )  # fmt: skip
    if is_last(workspace):
        conclude(
            workspace, sums, result, mailbox, promise, serial, low, high, batch, per_sample,
            TO_PROBE, AT_ONCE, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["serial", "batch"], do_not_specialize_on_alignment=launch.SMALL)
def _finish_alignment_kernel(
    sums,
    result,
    mailbox,
    promise,
    serial,
    low: tl.float64,
    high: tl.float64,
    batch,
    TO_PROBE: tl.constexpr,
):
    _finish_rows(sums, result, mailbox, low, high, batch, TO_PROBE)
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
    TO_PROBE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The last program's part: everything that follows from the partial sums."""
    add_partials(workspace, sums, None, batch, per_sample, 6, AT_ONCE, ACC)
    tl.debug_barrier()  # every thread reads rows below that others have stored
    _finish_rows(sums, result, mailbox, low, high, batch, TO_PROBE)
    send(mailbox, promise, serial)


@triton.jit
def add_share(
    x,
    p,
    window,
    newest,
    entry_sums,
    active,
    workspace,
    size,
    per_sample,
    x_stride,
    p_stride,
    entry_stride,
    window_stride,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's partial sums, into the workspace."""
    sample, index, blocks, rest = my_share(per_sample, size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    x += sample * x_stride
    p += sample * p_stride
    window += sample * window_stride
    newest_is_0 = tl.load(newest + sample) == 0
    works = is_active(active, sample)

    aa = tl.zeros([BLOCK], ACC)
    ad = tl.zeros([BLOCK], ACC)
    qq = tl.zeros([BLOCK], ACC)
    pp = tl.zeros([BLOCK], ACC)
    # The partial block comes first: its masked loads need the most registers, and no sums are held
    # yet.
    if works & (rest > 0) & (index == blocks % per_sample):
        aa, ad, qq, pp = _add_block(
            x, p, window, entry_stride, newest_is_0, blocks * BLOCK, lanes, lanes < rest,
            aa, ad, qq, pp, ACC,
        )  # fmt: skip
    for block in range(index, tl.where(works, blocks, 0), per_sample):
        aa, ad, qq, pp = _add_block(
            x, p, window, entry_stride, newest_is_0, block * BLOCK, lanes, None,
            aa, ad, qq, pp, ACC,
        )  # fmt: skip

    # What record left for this sample enters the sums once, through the sample's first program.
    first = works & (index == 0)
    row = entry_sums + sample * 4
    residual = tl.load(row + 2).to(ACC) + tl.load(row + 3).to(ACC)
    store_partial(workspace, 0, tl.sum(aa))
    store_partial(workspace, 1, tl.sum(ad))
    store_partial(workspace, 2, tl.sum(qq))
    store_partial(workspace, 3, tl.where(first, tl.load(row + 1).to(ACC), 0.0))
    store_partial(workspace, 4, tl.where(first, residual, 0.0))
    store_partial(workspace, 5, tl.sum(pp))


@triton.jit
def _add_block(
    x,
    p,
    window,
    entry_stride,
    newest_is_0,
    start,
    lanes,
    mask,
    aa,
    ad,
    qq,
    pp,
    ACC: tl.constexpr,
):
    """The four inner products with one more block of a sample."""
    x_value = load(x + start + lanes, mask, ACC)
    p_value = load(p + start + lanes, mask, ACC)
    entry0 = load(window + start + lanes, mask, ACC)
    entry1 = load(window + entry_stride + start + lanes, mask, ACC)
    old = tl.where(newest_is_0, entry1, entry0)
    new = tl.where(newest_is_0, entry0, entry1)
    q = p_value - x_value
    a = q - old
    aa += a * a
    ad += a * (new - old)
    qq += q * q
    pp += p_value * p_value
    return aa, ad, qq, pp


@triton.jit
def _finish_rows(sums, result, mailbox, low, high, batch, TO_PROBE: tl.constexpr):
    """result [B + 1, 2] = (error, gamma) from sums [B, 6]; row B is of the summed sums."""
    zero = tl.zeros([], sums.dtype.element_ty)
    total0, total1, total2, total3, total4, total5 = zero, zero, zero, zero, zero, zero
    for start in range(0, batch + 1, _ROWS):
        rows = start + tl.arange(0, _ROWS).to(tl.int64)
        aa, total0 = load_column(sums, 0, rows, batch, total0, 6)
        ad, total1 = load_column(sums, 1, rows, batch, total1, 6)
        qq, total2 = load_column(sums, 2, rows, batch, total2, 6)
        dd, total3 = load_column(sums, 3, rows, batch, total3, 6)
        residual, total4 = load_column(sums, 4, rows, batch, total4, 6)
        pp, total5 = load_column(sums, 5, rows, batch, total5, 6)
        gamma = clipped_gamma(ad, dd, residual, low, high)
        misfit = aa - 2 * gamma * ad + gamma * gamma * dd
        misfit = tl.where(misfit < 0, 0.0, misfit)  # keeps NaN, which a maximum may drop
        square = divide(misfit, pp if TO_PROBE else qq)
        error = tl.sqrt(square) if square.dtype == tl.float64 else tl.sqrt_rn(square)
        store_result(result, mailbox, rows, batch, error, gamma)
