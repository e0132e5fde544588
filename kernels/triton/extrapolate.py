"""y = x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (q - q_a), one block a program.

Bit by bit the reference's result, as in combine.py: its order of additions, none of them fused with
a product. Both entries of the residuals are read whatever `newest` is; of q's two the one that is
used. Each element is read and written by the same program: y may be written over x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from . import launch
from .memory import is_active, load, my_share, store, store_tokens


def extrapolate_residuals(
    x: Tensor,
    p: Tensor,
    residual_window: Tensor,
    oldest: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    weights: Tensor,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (q - q_a), in the window's dtype.

    Arguments, returns and errors: `dicache.reference.extrapolate_residuals`; rows must be
    contiguous.
    """
    given = (x, p, residual_window, oldest, probe_window, newest, weights, active, out)
    plan = launch.remembered(_prepare, given)
    if out is None:
        y = x.new_empty(x.shape, dtype=residual_window.dtype)
    else:
        read = {"x": x, "p": p, "oldest": oldest}
        read |= {"residual_window": residual_window, "probe_window": probe_window}
        launch.check_memory(plan, {"out": out}, read)
        y = out
    if plan.programs:
        launch.run(
            _extrapolate_kernel, plan,
            x, p, residual_window, oldest, probe_window, newest, weights, active, y,
        )  # fmt: skip
    return y


def _prepare(
    x: Tensor,
    p: Tensor,
    residual_window: Tensor,
    oldest: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    weights: Tensor,
    active: Tensor | None,
    out: Tensor | None,
) -> launch.Plan:
    checks.check_extrapolate(
        x, p, residual_window, oldest, probe_window, newest, weights, active, out
    )
    checks.check_rows(x=x, p=p, oldest=oldest, weights=weights, out=out)
    checks.check_rows(residual_window=residual_window, probe_window=probe_window)
    launch.check_contiguous(newest=newest, active=active)
    strides = (
        launch.batch_stride(x), launch.batch_stride(p), launch.batch_stride(oldest),
        *launch.window_strides(residual_window), *launch.window_strides(probe_window),
        launch.batch_stride(weights), launch.output_stride(x, out),
    )  # fmt: skip
    # Rows of a buffer that nobody gave are zero where inactive; those of a given one stay.
    fills = out is None and active is not None
    return launch.elementwise((x, p, residual_window), strides, FILLS=fills)


@triton.jit(
    do_not_specialize=["size", "per_sample", "weights_stride"],
    do_not_specialize_on_alignment=launch.SMALL,
)
def _extrapolate_kernel(
    x,
    p,
    residual_window,
    oldest,
    probe_window,
    newest,
    weights,
    active,
    y,
    size,
    per_sample,
    x_stride,
    p_stride,
    oldest_stride,
    residual_entry_stride,
    residual_stride,
    probe_entry_stride,
    probe_stride,
    weights_stride,
    y_stride,
    FILLS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, block, blocks, rest = my_share(per_sample, size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    start = block * BLOCK
    newer = (tl.load(newest + sample) != 0).to(tl.int64)
    x += sample * x_stride + start
    p += sample * p_stride + start
    oldest += sample * oldest_stride + start
    r0 = residual_window + sample * residual_stride + start
    r1 = r0 + residual_entry_stride
    q_a = probe_window + sample * probe_stride + newer * probe_entry_stride + start
    y += sample * y_stride + start
    weights += sample * weights_stride
    w1 = tl.load(weights).to(ACC)
    w2 = tl.load(weights + 1).to(ACC)
    w3 = tl.load(weights + 2).to(ACC)
    whole = block < blocks
    if is_active(active, sample):
        if whole:
            _extrapolate_block(x, p, r0, r1, oldest, q_a, y, newer, w1, w2, w3, lanes, None, ACC)
        else:
            _extrapolate_block(
                x, p, r0, r1, oldest, q_a, y, newer, w1, w2, w3, lanes, lanes < rest, ACC
            )
    elif FILLS:
        zeros = tl.zeros([BLOCK], y.dtype.element_ty)
        if whole:
            store(y + lanes, zeros, None)
        else:
            store(y + lanes, zeros, lanes < rest)


@triton.jit
def _extrapolate_block(
    x, p, r0, r1, oldest, q_a, y, newer, w1, w2, w3, lanes, mask, ACC: tl.constexpr
):
    x_value = load(x + lanes, mask, ACC)
    p_value = load(p + lanes, mask, ACC)
    entry0 = load(r0 + lanes, mask, ACC)
    entry1 = load(r1 + lanes, mask, ACC)
    c = load(oldest + lanes, mask, ACC)
    q = load(q_a + lanes, mask, ACC)
    a = tl.where(newer == 0, entry0, entry1)
    b = tl.where(newer == 0, entry1, entry0)
    along_r = x_value + a + w1 * (a - b) + w2 * (b - c)
    store_tokens(y + lanes, along_r + w3 * (p_value - x_value - q), mask)
