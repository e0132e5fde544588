"""Statistics, (error, gamma) and the combination with it in one launch: a whole skipped step.

The programs of the statistics go on to combine what they are given: each waits until the last one
to arrive has turned all partial sums into gamma. So all of them must be on the device at the same
time, which a cooperative launch promises. Sums and y have the bits of the two operators: plan and
blocks are theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..workspace import Results
from . import alignment, launch, probe
from .alignment import add_share as add_alignment_share
from .alignment import conclude as conclude_alignment
from .combine import combine_block, combine_residuals
from .memory import is_active, my_share, store
from .probe import add_share as add_probe_share
from .probe import conclude as conclude_probe
from .reduction import generation_of, is_last, let_others_go_on, wait_for_the_last

# CUDA's words where a part of the GPU, or one with less room, cannot hold all programs at once.
_REFUSALS = ("cooperative launch", "operation not supported")
_refused: set[torch.device] = set()  # those whose driver refused a cooperative launch


def probe_and_combine(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor | None,
    x_prev: Tensor | None,
    probe_window: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    least_squares: bool = False,
    relative_to_probe: bool = False,
    by_sample: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Results | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`probe_statistics`, or `alignment_statistics` without `p_prev`, and `combine_residuals` with
    the gamma that they find, of each sample or of the batch.

    Arguments, returns and errors: `dicache.reference.probe_and_combine`; rows must be contiguous.
    Two launches where a cooperative one cannot be had.
    """
    given = (
        x, p, p_prev, x_prev, probe_window, residual_window, newest, entry_sums, active, workspace,
    )  # fmt: skip
    flags = (bool(least_squares), bool(relative_to_probe), bool(by_sample))
    plan = launch.remembered(_prepare, given, low, high, *flags)
    if p_prev is not None:
        written = {"p_prev": p_prev, "x_prev": x_prev}
        again = {"x": x, "residual_window": residual_window}
        launch.check_memory(plan, written, {"p": p, "probe_window": probe_window}, again)
    if launch.may_cooperate(plan, x.device) and x.device not in _refused:
        sums, result, *letter = launch.results(x, plan, out)
        y = x.new_empty(x.shape, dtype=residual_window.dtype)
        if workspace is None:
            workspace = launch.new_workspace(x, plan)
        try:
            launch.run(
                _probe_and_combine_kernel, plan, x, p, p_prev, x_prev, probe_window,
                residual_window, newest, entry_sums, active, workspace, sums, result, *letter, y,
                low, high,
            )  # fmt: skip
        except RuntimeError as error:  # before anything ran
            if not any(words in str(error) for words in _REFUSALS):
                raise
            _refused.add(x.device)
        else:
            return sums, result, y
    if p_prev is None:
        sums, result = alignment.alignment_statistics(
            x, p, probe_window, newest, entry_sums, low, high, relative_to_probe, active,
            workspace, out,
        )  # fmt: skip
    else:
        sums, result = probe.probe_statistics(
            x, p, p_prev, x_prev, probe_window, newest, entry_sums, low, high, least_squares,
            active, workspace, out,
        )  # fmt: skip
    gamma = result[:-1, 1] if by_sample else result[-1, 1].expand(x.shape[0])
    return sums, result, combine_residuals(x, residual_window, newest, gamma, active)


def _prepare(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor | None,
    x_prev: Tensor | None,
    probe_window: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    active: Tensor | None,
    workspace: Tensor | None,
    low: float,
    high: float,
    least_squares: bool,
    relative_to_probe: bool,
    by_sample: bool,
) -> launch.Plan:
    rest = (probe_window, newest, entry_sums, low, high, active)
    if p_prev is None:
        checks.check_alignment_statistics(x, p, *rest)
    else:
        checks.check_probe_statistics(x, p, p_prev, x_prev, *rest)
    checks.check_probe_and_combine(x, p, p_prev, x_prev, residual_window)
    gamma = x.new_empty(x.shape[:1], dtype=launch.torch_dtype(launch.wide(x, p)))
    checks.check_combine(x, residual_window, newest, gamma, active, None)
    checks.check_rows(x=x, p=p, p_prev=p_prev, x_prev=x_prev)
    checks.check_rows(probe_window=probe_window, residual_window=residual_window)
    launch.check_contiguous(newest=newest, entry_sums=entry_sums, active=active)
    strides = (
        launch.batch_stride(x), launch.batch_stride(p), launch.batch_stride(p_prev),
        launch.batch_stride(x_prev), *launch.window_strides(probe_window),
        *launch.window_strides(residual_window), launch.output_stride(x, None),
    )  # fmt: skip
    if p_prev is None:
        columns, programs = 6, launch.resident(x, p)
    else:
        columns = 5 if x_prev is None else 7
        programs = probe.resident(x, p, x_prev, least_squares)
    return launch.summing(
        (x, p), workspace, strides, columns, programs,
        LEAST_SQUARES=least_squares, TO_PROBE=relative_to_probe, BY_SAMPLE=by_sample,
        launch_cooperative_grid=True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["serial", "batch", "size", "per_sample"],
    do_not_specialize_on_alignment=launch.SMALL,
)
def _probe_and_combine_kernel(
    x,
    p,
    p_prev,
    x_prev,
    probe_window,
    residual_window,
    newest,
    entry_sums,
    active,
    workspace,
    sums,
    result,
    mailbox,
    promise,
    serial,
    y,
    low: tl.float64,
    high: tl.float64,
    batch,
    size,
    per_sample,
    x_stride,
    p_stride,
    p_prev_stride,
    x_prev_stride,
    probe_entry_stride,
    probe_stride,
    residual_entry_stride,
    residual_stride,
    y_stride,
    LEAST_SQUARES: tl.constexpr,
    TO_PROBE: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if p_prev is None:
        add_alignment_share(
            x, p, probe_window, newest, entry_sums, active, workspace, size, per_sample,
            x_stride, p_stride, probe_entry_stride, probe_stride, ACC, BLOCK,
        )  # fmt: skip
    else:
        add_probe_share(
            x, p, p_prev, x_prev, probe_window, newest, entry_sums, active, workspace, size,
            per_sample, x_stride, p_stride, p_prev_stride, x_prev_stride, probe_entry_stride,
            probe_stride, LEAST_SQUARES, ACC, BLOCK,
        )  # fmt: skip
    generation = generation_of(workspace)
    if is_last(workspace):
        if p_prev is None:
            conclude_alignment(
                workspace, sums, result, mailbox, promise, serial, low, high, batch, per_sample,
                TO_PROBE, AT_ONCE, ACC,
            )  # fmt: skip
        else:
            conclude_probe(
                workspace, sums, result, mailbox, promise, serial, low, high, batch, per_sample,
                5 if x_prev is None else 7, AT_ONCE, ACC,
            )  # fmt: skip
        let_others_go_on(workspace)
    else:
        wait_for_the_last(workspace, generation)
    _combine_share(
        x, residual_window, newest, active, result, y, batch, size, per_sample,
        x_stride, residual_entry_stride, residual_stride, y_stride, BY_SAMPLE, ACC, BLOCK,
    )  # fmt: skip


@triton.jit
def _combine_share(
    x,
    window,
    newest,
    active,
    result,
    y,
    batch,
    size,
    per_sample,
    x_stride,
    entry_stride,
    window_stride,
    y_stride,
    BY_SAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y of the blocks whose sums this program has added up; zero where the sample is inactive.

    The last blocks come first: of x they are what the cache still has.
    """
    sample, index, blocks, rest = my_share(per_sample, size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    x += sample * x_stride
    window += sample * window_stride
    y += sample * y_stride
    newest_is_0 = tl.load(newest + sample) == 0
    works = is_active(active, sample)
    # Another program has stored it during this launch.
    weight = tl.load(result + 2 * (sample if BY_SAMPLE else batch) + 1, cache_modifier=".cg")
    mine = tl.cdiv(tl.maximum(blocks - index, 0), per_sample)
    for step in range(0, mine):
        start = (index + (mine - 1 - step) * per_sample) * BLOCK
        if works:
            combine_block(
                x + start, window + start, entry_stride, newest_is_0, weight, y + start, lanes,
                None, ACC,
            )  # fmt: skip
        elif active is not None:
            store(y + start + lanes, tl.zeros([BLOCK], y.dtype.element_ty), None)
    if (rest > 0) & (index == blocks % per_sample):
        start = blocks * BLOCK
        # Not the mask of the sums' partial block, which would be kept in registers since then.
        inside = start + lanes < size
        if works:
            combine_block(
                x + start, window + start, entry_stride, newest_is_0, weight, y + start, lanes,
                inside, ACC,
            )  # fmt: skip
        elif active is not None:
            store(y + start + lanes, tl.zeros([BLOCK], y.dtype.element_ty), inside)
