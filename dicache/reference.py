r"""The operators in plain PyTorch: the definition that every faster implementation must meet.

Notation, for one denoising step and one context (hidden states of shape [B, ...], usually
[B, S, D]):

    x       tokens before block 0              p       tokens after the probe's blocks
    y       tokens after the last block        q, r    p - x and y - x
    q_old, q_new, r_old, r_new                 residuals of the two last computed steps

The residuals live in windows of shape [2, B, ...]; `newest` (int32 [B]) says which of the two
entries is the newer one of each sample. A window's first entry is recorded into both places: then
d = q_new - q_old is zero, gamma is 1 and y = x + r_new, with no special case anywhere.

Arithmetic is done in fp32 (fp64 if any input is fp64) and rounded once, when a result is stored.
Sums are per sample. There is no epsilon anywhere: a zero denominator of gamma gives gamma = 1,
a zero denominator of the error leaves it non-finite, and NaN or infinity reach the result, where
the gate finds them. An optional `active` (uint8 [B]) names the samples to work on; buffers of the
others stay as they are. No function returns a Python number, so none waits for the device, and
none takes part in autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .workspace import MAILBOX_PROMISE, MAILBOX_RESULT, Results

_LARGEST_FP16 = torch.finfo(torch.float16).max

# Columns of the sums that `probe_statistics` returns; delta_minus appends the last two. With
# a = q - q_old and d = q_new - q_old, gamma is column 2 over column 3 in both its solutions.
#   0 sum|p - p_prev|   1 sum|p_prev|   2 sum|a|, or <a, d>    3 sum|d|, or <d, d>    4 sum|r|
#   5 sum|x - x_prev|   6 sum|x_prev|
# Columns of the sums that `alignment_statistics` returns.
#   0 <a, a>            1 <a, d>        2 <q, q>               3 <d, d>               4 sum|r|
#   5 <p, p>
# sum|r| is over both window entries: finite exactly if the window can be used.
# Columns of the entry sums that `record_residuals` leaves for the next step's statistics.
#   0 sum|d|            1 <d, d>        2 sum|r_new|           3 sum|r_old|


@torch.no_grad()
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

    (arXiv 2508.17356, Online Probe Profiling and Dynamic Cache Trajectory Alignment.) With
    `least_squares` gamma is `clip(<a, d> / <d, d>, low, high)` instead.

    Args:
        x: [B, ...] tokens before block 0, any floating dtype.
        p: [B, ...] tokens after the probe.
        p_prev: [B, ...] the previous step's p, in p's dtype; overwritten with p.
        x_prev: [B, ...] the previous step's x, overwritten with x; `None` unless the error is
            delta_minus.
        probe_window: [2, B, ...] residuals q of the two last computed steps.
        newest: int32 [B], 0 or 1.
        entry_sums: fp32 [B, 4] from `record_residuals` (fp64 for fp64 data).
        low: Lower bound of gamma.
        high: Upper bound; may be `inf`.
        least_squares: Which of the two gammas.
        active: uint8 [B] or `None` for all samples. Sums of inactive samples are zero.
        workspace: From `dicache.ops.make_workspace`; only the GPU backends use it.
        out: Where to write, from `dicache.ops.make_results`; `None` allocates.

    Returns:
        sums [B, 5], or [B, 7] with `x_prev`, and result [B + 1, 2] = (error, gamma): a row a
        sample and, last, the row of the whole batch, the ratio of the summed sums. Both in fp32
        (fp64 if x or p is fp64).

    Raises:
        ValueError: A shape, dtype or device is not as above, or low > high.
    """
    checks.check_probe_statistics(
        x, p, p_prev, x_prev, probe_window, newest, entry_sums, low, high, active
    )
    wide = wide_dtype(x, p)
    q_old = _entry(probe_window, newest, old=True).to(wide)
    a = (p.to(wide) - x.to(wide)) - q_old
    if least_squares:
        gamma_top = _dot(a, _entry(probe_window, newest, old=False).to(wide) - q_old)
    else:
        gamma_top = _sum_abs(a)
    columns = [
        _sum_abs(p.to(wide) - p_prev.to(wide)),
        _sum_abs(p_prev.to(wide)),
        gamma_top,
        entry_sums[:, 1 if least_squares else 0],
        entry_sums[:, 2].to(wide) + entry_sums[:, 3].to(wide),
    ]
    _store(p_prev, p, active)
    if x_prev is not None:
        columns += [_sum_abs(x.to(wide) - x_prev.to(wide)), _sum_abs(x_prev.to(wide))]
        _store(x_prev, x, active)
    sums = _only(torch.stack([column.to(wide) for column in columns], dim=1), active)
    return _results(sums, finish_probe_statistics(sums, low, high), out)


@torch.no_grad()
def finish_probe_statistics(sums: Tensor, low: float, high: float) -> Tensor:
    """(error, gamma) [B + 1, 2] from the sums of `probe_statistics`, after an all-reduce if any."""
    checks.check_finish(sums, low, high, columns=(5, 7))
    sums = torch.cat([sums, sums.sum(dim=0, keepdim=True)])  # the last row: the whole batch
    error = sums[:, 0] / sums[:, 1]
    if sums.shape[1] == 7:
        error = (error - sums[:, 5] / sums[:, 6]).abs()
    return torch.stack([error, _gamma(sums[:, 2], sums[:, 3], sums[:, 4], low, high)], dim=1)


@torch.no_grad()
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
        error = ||a - gamma d|| / ||q||
              = sqrt(max(0, <a, a> - 2 gamma <a, d> + gamma^2 <d, d>) / <q, q>)

    An unclipped gamma is the least-squares solution, and the error its relative misfit; a clipped
    one is judged by the misfit that it really leaves. With `relative_to_probe` the error is
    ||a - gamma d|| / ||p||. Nothing is written.

    Args, returns and errors as `probe_statistics`, the sums being [B, 6].
    """
    checks.check_alignment_statistics(x, p, probe_window, newest, entry_sums, low, high, active)
    wide = wide_dtype(x, p)
    p = p.to(wide)
    q = p - x.to(wide)
    q_old = _entry(probe_window, newest, old=True).to(wide)
    a = q - q_old
    d = _entry(probe_window, newest, old=False).to(wide) - q_old
    residual = entry_sums[:, 2].to(wide) + entry_sums[:, 3].to(wide)
    columns = [_dot(a, a), _dot(a, d), _dot(q, q), entry_sums[:, 1], residual, _dot(p, p)]
    sums = _only(torch.stack([column.to(wide) for column in columns], dim=1), active)
    return _results(sums, finish_alignment_statistics(sums, low, high, relative_to_probe), out)


@torch.no_grad()
def finish_alignment_statistics(
    sums: Tensor, low: float, high: float, relative_to_probe: bool = False
) -> Tensor:
    """(error, gamma) [B + 1, 2] from the sums of `alignment_statistics`."""
    checks.check_finish(sums, low, high, columns=(6,))
    sums = torch.cat([sums, sums.sum(dim=0, keepdim=True)])
    aa, ad, qq, dd, residual, pp = sums.unbind(dim=1)
    gamma = _gamma(ad, dd, residual, low, high)
    misfit = aa - 2 * gamma * ad + gamma * gamma * dd
    error = (misfit.clamp(min=0) / (pp if relative_to_probe else qq)).sqrt()
    return torch.stack([error, gamma], dim=1)


@torch.no_grad()
def combine_residuals(
    x: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    gamma: Tensor,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x + r_old + gamma (r_new - r_old), in the window's dtype.

    In fp16 y ends at the largest number, +-65504, infinity too; NaN stays NaN.

    Args:
        x: [B, ...] tokens before block 0.
        residual_window: [2, B, ...] residuals r of the two last computed steps.
        newest: int32 [B].
        gamma: fp32 [B] (fp64 too for fp64 data), read on the device. May be expanded from one
            number.
        active: uint8 [B] or `None`. Inactive rows of `out` stay as they are (without `out` they
            are zero).
        out: Where to write, [B, ...] in the window's dtype; may be `x`. `None` allocates.

    Returns:
        y [B, ...].

    Raises:
        ValueError: A shape, dtype or device is not as above.
    """
    checks.check_combine(x, residual_window, newest, gamma, active, out)
    wide = wide_dtype(x, residual_window)
    old = _entry(residual_window, newest, old=True).to(wide)
    new = _entry(residual_window, newest, old=False).to(wide)
    y = x.to(wide) + old + _rows(gamma.to(wide), x) * (new - old)
    return _output(_tokens(y, residual_window.dtype), active, out)


@torch.no_grad()
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
    """Statistics, and the tokens that are filled in by the gamma they give.

    Those of `probe_statistics` with `least_squares` where `p_prev` is given, else those of
    `alignment_statistics` with `relative_to_probe`; then `combine_residuals` without `out`.

    p_prev and x_prev are overwritten, so x and `residual_window`, which are read again, must lie
    elsewhere. What is not listed here is as for these functions.

    Args:
        by_sample: Whether every sample has its own gamma; else all have the batch's.

    Returns:
        sums [B, 5, 6 or 7], result [B + 1, 2] and y [B, ...].

    Raises:
        ValueError: As for these functions; or fp64 is in one of (x, p) and (x, residual_window)
            only, or `x_prev` is given without `p_prev`.
    """
    checks.check_probe_and_combine(x, p, p_prev, x_prev, residual_window)
    rest = (probe_window, newest, entry_sums, low, high)
    if p_prev is None:
        sums, result = alignment_statistics(x, p, *rest, relative_to_probe, active, workspace, out)
    else:
        sums, result = probe_statistics(
            x, p, p_prev, x_prev, *rest, least_squares, active, workspace, out
        )
    gamma = result[:-1, 1] if by_sample else result[-1, 1].expand(x.shape[0])
    return sums, result, combine_residuals(x, residual_window, newest, gamma, active)


@torch.no_grad()
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
    r"""y = x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (q - q_a), in the residuals' dtype.

    a, b and c are the three last computed steps, the newest first. Terms are added from left to
    right. Every term is computed whatever its weight is, so that what is not finite reaches y even
    if its weight is zero (0 * inf is NaN). In fp16 y ends at its largest number, as in
    `combine_residuals`.

    Args:
        x: [B, ...] tokens before block 0.
        p: [B, ...] tokens after the probe; q = p - x.
        residual_window: [2, B, ...] residuals r_a (the newer entry) and r_b.
        oldest: [B, ...] residuals r_c, in the window's dtype.
        probe_window: [2, B, ...] in p's dtype; its newer entry is q_a, and the other is not read.
        newest: int32 [B], for both windows.
        weights: fp32 [B, 3] (fp64 too for fp64 data), (w1, w2, w3) of each sample, read on the
            device. May be expanded from one row.
        active: uint8 [B] or `None`. Inactive rows of `out` stay as they are (without `out` they
            are zero).
        out: Where to write, [B, ...] in the window's dtype; may be `x`. `None` allocates.

    Returns:
        y [B, ...].

    Raises:
        ValueError: A shape, dtype or device is not as above.
    """
    checks.check_extrapolate(
        x, p, residual_window, oldest, probe_window, newest, weights, active, out
    )
    wide = wide_dtype(x, p, residual_window)
    r_a = _entry(residual_window, newest, old=False).to(wide)
    r_b = _entry(residual_window, newest, old=True).to(wide)
    r_c = oldest.to(wide)
    q_a = _entry(probe_window, newest, old=False).to(wide)
    w1, w2, w3 = (_rows(column, x) for column in weights.to(wide).unbind(dim=1))
    q = p.to(wide) - x.to(wide)
    y = x.to(wide) + r_a + w1 * (r_a - r_b) + w2 * (r_b - r_c) + w3 * (q - q_a)
    return _output(_tokens(y, residual_window.dtype), active, out)


@torch.no_grad()
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

    `x` may be the residual slot and `p` the probe slot that are overwritten: on a computed step
    the caller parks them there, so that nothing else has to hold them until the last block.

    Args:
        x: [B, ...] tokens before block 0.
        p: [B, ...] tokens after the probe.
        y: [B, ...] tokens after the last block.
        residual_window: [2, B, ...] in y's dtype.
        probe_window: [2, B, ...] in p's dtype.
        newest: int32 [B]; updated.
        entry_sums: fp32 [B, 4] (fp64 for fp64 data); overwritten with `sum|d|` and `<d, d>`,
            d = q_new - q_old (the next step's denominators of gamma), and sum|r| of the newer and
            of the older entry, which are finite exactly if the entries can be used.
        first: Whether this is the only entry; it is then written to both places.
        active: uint8 [B] or `None`.
        workspace: From `dicache.ops.make_workspace`; only the GPU backends use it.

    Raises:
        ValueError: A shape, dtype or device is not as above.
    """
    checks.check_record(x, p, y, residual_window, probe_window, newest, entry_sums, active)
    wide = wide_dtype(x, p, y)
    residual = (y.to(wide) - x.to(wide)).to(residual_window.dtype)
    probe_residual = (p.to(wide) - x.to(wide)).to(probe_window.dtype)
    slot = (newest == 0).int()
    for index in (0, 1):
        chosen = torch.ones_like(slot, dtype=torch.bool) if first else slot == index
        chosen = chosen if active is None else chosen & active.bool()
        _store(residual_window[index], residual, chosen)
        _store(probe_window[index], probe_residual, chosen)
    _store(newest, slot, active)
    q_new, q_old = (_entry(probe_window, newest, old=old).to(wide) for old in (False, True))
    d = q_new - q_old
    size = _sum_abs(residual.to(wide))
    sums = torch.stack([_sum_abs(d), _dot(d, d), size, size if first else entry_sums[:, 2]], dim=1)
    _store(entry_sums, sums.to(entry_sums.dtype), active)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on these tensors."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _results(sums: Tensor, result: Tensor, out: Results | None) -> tuple[Tensor, Tensor]:
    if out is None:
        return sums, result
    checks.check_results(sums, result, out)
    out.sums.copy_(sums)
    out.result.copy_(result)
    if out.mailbox is not None:
        parts = {MAILBOX_RESULT: result}
        if out.promise is not None:
            parts[MAILBOX_PROMISE] = out.promise
        parts[0] = torch.full((), out.serial, dtype=torch.int32, device=result.device)  # the last
        for first, part in parts.items():
            raw = part.reshape(-1).contiguous().view(torch.uint8)
            out.mailbox[first : first + raw.numel()].copy_(raw, non_blocking=True)
    return out.sums, out.result


def _sum_abs(value: Tensor) -> Tensor:
    return value.abs().flatten(1).sum(dim=1)  # [B]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).flatten(1).sum(dim=1)  # [B]


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))  # [B] -> [B, 1, ...]


def _entry(window: Tensor, newest: Tensor, old: bool) -> Tensor:
    is_second = newest == 0 if old else newest != 0
    return torch.where(_rows(is_second, window[0]), window[1], window[0])


def _gamma(top: Tensor, bottom: Tensor, residual: Tensor, low: float, high: float) -> Tensor:
    gamma = torch.where(bottom == 0, torch.ones_like(top), top / bottom).clamp(low, high)
    # Clipping would hide an infinite sum, so finiteness is judged before it.
    valid = top.isfinite() & bottom.isfinite() & residual.isfinite()
    return torch.where(valid, gamma, torch.full_like(gamma, torch.nan))


def _only(sums: Tensor, active: Tensor | None) -> Tensor:
    return sums if active is None else torch.where(_rows(active.bool(), sums), sums, 0.0)


def _tokens(y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:  # its largest number is within reach of what models compute
        y = y.clamp(-_LARGEST_FP16, _LARGEST_FP16)
    return y.to(dtype)


def _output(y: Tensor, active: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:  # contiguous, whatever x is
        out = (torch.empty if active is None else torch.zeros)(
            y.shape, dtype=y.dtype, device=y.device
        )
    _store(out, y, active)
    return out


def _store(buffer: Tensor, value: Tensor, chosen: Tensor | None) -> None:
    if chosen is None:
        buffer.copy_(value)
    else:
        buffer.copy_(torch.where(_rows(chosen.bool(), buffer), value, buffer))
