"""y = x + r_old + gamma (r_new - r_old), one block a program, bit by bit the reference's result.

Additions are in the reference's order and none is fused with the product. Both entries are read
whatever `newest` is, so their loads do not wait for it. Each element is read and written by the
same program: y may be written over x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from . import launch
from .memory import is_active, load, my_share, store, store_tokens


def combine_residuals(
    x: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    gamma: Tensor,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x + r_old + gamma (r_new - r_old), in the window's dtype.

    Arguments, returns and errors: `dicache.reference.combine_residuals`; rows must be contiguous.
    """
    given = (x, residual_window, newest, gamma, active, out)
    plan = launch.remembered(_prepare, given)
    if out is None:
        y = x.new_empty(x.shape, dtype=residual_window.dtype)
    else:
        launch.check_memory(plan, {"out": out}, {"x": x, "residual_window": residual_window})
        y = out
    if plan.programs:
        launch.run(_combine_kernel, plan, x, residual_window, newest, gamma, active, y)
    return y


def _prepare(
    x: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    gamma: Tensor,
    active: Tensor | None,
    out: Tensor | None,
) -> launch.Plan:
    checks.check_combine(x, residual_window, newest, gamma, active, out)
    checks.check_rows(x=x, residual_window=residual_window, out=out)
    launch.check_contiguous(newest=newest, active=active)
    strides = (
        launch.batch_stride(x), *launch.window_strides(residual_window), gamma.stride(0),
        launch.output_stride(x, out),
    )  # fmt: skip
    # Rows of a buffer that nobody gave are zero where inactive; those of a given one stay.
    fills = out is None and active is not None
    return launch.elementwise((x, residual_window), strides, FILLS=fills)


@triton.jit(
    do_not_specialize=["size", "per_sample", "gamma_stride"],
    do_not_specialize_on_alignment=launch.SMALL,
)
def _combine_kernel(
    x,
    window,
    newest,
    gamma,
    active,
    y,
    size,
    per_sample,
    x_stride,
    entry_stride,
    window_stride,
    gamma_stride,
    y_stride,
    FILLS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, block, blocks, rest = my_share(per_sample, size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    start = block * BLOCK
    x += sample * x_stride + start
    window += sample * window_stride + start
    y += sample * y_stride + start
    newest_is_0 = tl.load(newest + sample) == 0
    weight = tl.load(gamma + sample * gamma_stride).to(ACC)
    whole = block < blocks
    if is_active(active, sample):
        if whole:
            combine_block(x, window, entry_stride, newest_is_0, weight, y, lanes, None, ACC)
        else:
            combine_block(x, window, entry_stride, newest_is_0, weight, y, lanes, lanes < rest, ACC)
    elif FILLS:
        zeros = tl.zeros([BLOCK], y.dtype.element_ty)
        if whole:
            store(y + lanes, zeros, None)
        else:
            store(y + lanes, zeros, lanes < rest)


@triton.jit
def combine_block(x, window, entry_stride, newest_is_0, weight, y, lanes, mask, ACC: tl.constexpr):
    """One block of y."""
    x_value = load(x + lanes, mask, ACC)
    entry0 = load(window + lanes, mask, ACC)
    entry1 = load(window + entry_stride + lanes, mask, ACC)
    old = tl.where(newest_is_0, entry1, entry0)
    new = tl.where(newest_is_0, entry0, entry1)
    store_tokens(y + lanes, x_value + old + weight * (new - old), mask)
