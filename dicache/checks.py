"""What every backend demands of an operator's arguments, and the errors that say so.

The reference, the Triton launchers and the fakes that torch.compile traces call these functions;
the compiled backends make the same checks in C++ (csrc/torch/checked.h), where they cost less.
All raise with what was given, what was expected and, where it helps, what to do. Nothing here reads
a tensor's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .workspace import MAILBOX_PROMISE, MAILBOX_RESULT, Results

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_probe_statistics(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor,
    x_prev: Tensor | None,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    active: Tensor | None,
) -> None:
    """Arguments of `probe_statistics`."""
    _check_statistics(x, p, probe_window, newest, entry_sums, low, high, active)
    _check_like("p_prev", p_prev, x, p.dtype, "p's")
    if x_prev is not None:
        _check_like("x_prev", x_prev, x, x.dtype, "x's")


def check_alignment_statistics(
    x: Tensor,
    p: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    active: Tensor | None,
) -> None:
    """Arguments of `alignment_statistics`."""
    _check_statistics(x, p, probe_window, newest, entry_sums, low, high, active)


def check_probe_and_combine(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor | None,
    x_prev: Tensor | None,
    residual_window: Tensor,
) -> None:
    """What `probe_and_combine` demands beyond the two operators that it is made of."""
    if p_prev is None and x_prev is not None:
        raise ValueError("x_prev is given without p_prev. Expected both, or p_prev, or neither.")
    wide = [torch.float64 in (x.dtype, other.dtype) for other in (p, residual_window)]
    if wide[0] != wide[1]:
        raise ValueError(
            f"p has dtype {p.dtype}, residual_window {residual_window.dtype} and x {x.dtype}. "
            f"Expected float64 in both or none of (x, p) and (x, residual_window)."
        )


def check_results(sums: Tensor, result: Tensor, out: Results) -> None:
    """That `out` can take these sums and results [B + 1, 2]."""
    for name, given, like in (("sums", out.sums, sums), ("result", out.result, result)):
        _expect_shape(name, given, like.shape, "what the call leaves")
        _expect_dtype(name, given, (like.dtype,), f"the dtype of the sums, {like.dtype}")
        _expect_device(name, given, like)
        if not given.is_contiguous():
            raise ValueError(f"{name} has strides {list(given.stride())}. Expected contiguous.")
    if out.mailbox is None:
        return
    num_bytes = MAILBOX_RESULT + result.numel() * result.element_size()
    box, promise = out.mailbox, out.promise
    _expect_dtype("mailbox", box, (torch.uint8,), "uint8, from ops.make_results")
    if box.ndim != 1 or box.numel() < num_bytes or not box.is_contiguous():
        raise ValueError(
            f"mailbox has shape {list(box.shape)}. Expected at least {num_bytes} contiguous bytes, "
            f"from ops.make_results."
        )
    is_real = type(box) is Tensor  # a fake is never pinned
    if is_real and result.is_cuda and box.device.type == "cpu" and not box.is_pinned():
        raise ValueError("mailbox is not pinned. Expected memory from ops.make_results(x).")
    if not 0 < out.serial < 2**31:
        raise ValueError(
            f"serial is {out.serial}. Expected 1 to 2^31 - 1, another one than in the call before."
        )
    if promise is not None:
        _expect_device("promise", promise, result)
        room = MAILBOX_RESULT - MAILBOX_PROMISE
        if promise.numel() != 1 or promise.element_size() > room:
            raise ValueError(
                f"promise has shape {list(promise.shape)} and dtype {promise.dtype}. Expected one "
                f"number of at most {room} bytes."
            )


def check_finish(sums: Tensor, low: float, high: float, columns: tuple[int, ...]) -> None:
    """Arguments of `finish_probe_statistics` and `finish_alignment_statistics`."""
    if sums.ndim != 2 or sums.shape[1] not in columns:
        expected = " or ".join(f"[B, {count}]" for count in columns)
        raise ValueError(f"sums has shape {list(sums.shape)}. Expected {expected}.")
    _expect_dtype("sums", sums, (torch.float32, torch.float64), "float32 or float64")
    _check_range(low, high)


def check_combine(
    x: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    gamma: Tensor,
    active: Tensor | None,
    out: Tensor | None,
) -> None:
    """Arguments of `combine_residuals`."""
    _check_tokens(x)
    _check_window("residual_window", residual_window, x)
    _check_per_sample(x, newest, active)
    _expect_shape("gamma", gamma, x.shape[:1], "[B], one weight a sample")
    _check_weights("gamma", gamma, x, residual_window)
    if out is not None:
        _check_like("out", out, x, residual_window.dtype, "residual_window's")


def check_extrapolate(
    x: Tensor,
    p: Tensor,
    residual_window: Tensor,
    oldest: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    weights: Tensor,
    active: Tensor | None,
    out: Tensor | None,
) -> None:
    """Arguments of `extrapolate_residuals`."""
    _check_tokens(x)
    _check_like("p", p, x)
    _check_window("residual_window", residual_window, x)
    _check_like("oldest", oldest, x, residual_window.dtype, "residual_window's")
    _check_window("probe_window", probe_window, x, p.dtype, "p's")
    _check_per_sample(x, newest, active)
    _expect_shape("weights", weights, (x.shape[0], 3), "[B, 3], a row (w1, w2, w3) a sample")
    _check_weights("weights", weights, x, p, residual_window)
    if out is not None:
        _check_like("out", out, x, residual_window.dtype, "residual_window's")


def check_record(
    x: Tensor,
    p: Tensor,
    y: Tensor,
    residual_window: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    active: Tensor | None,
) -> None:
    """Arguments of `record_residuals`."""
    _check_tokens(x)
    _check_like("p", p, x)
    _check_like("y", y, x)
    _check_window("residual_window", residual_window, x, y.dtype, "y's")
    _check_window("probe_window", probe_window, x, p.dtype, "p's")
    _check_per_sample(x, newest, active)
    _check_entry_sums(entry_sums, x)


def check_workspace(x: Tensor, workspace: Tensor | None) -> None:
    """Scratch memory of the operators that add up; its size is checked where it is used."""
    if workspace is not None:
        _expect_dtype("workspace", workspace, (torch.uint8,), "uint8, from ops.make_workspace(x)")
        _expect_device("workspace", workspace, x)


class _Rows(NamedTuple):
    """The samples of a tensor, or of a window's entry, as ranges of bytes."""

    first: int
    stride: int
    length: int
    batch: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.first + (self.batch - 1) * self.stride + self.length

    def overlaps(self, other: _Rows) -> bool:
        """Whether a sample of this one lies over a sample of the other."""
        if self.end <= other.first or other.end <= self.first:
            return False
        mine, others = (range(each.batch) for each in (self, other))
        return any(
            self.first + i * self.stride < other.first + j * other.stride + other.length
            and other.first + j * other.stride < self.first + i * self.stride + self.length
            for i in mine
            for j in others
        )


def check_memory(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Refuse memory that a launch would write twice, or read too late (the fast backends).

    Elements are read and then overwritten one by one, so a tensor that is read may be one that is
    written, sample for sample. Call `check_rows` before.
    """
    kept: list[tuple[str, _Rows]] = []
    for name, tensor in written.items():
        for rows in _rows_of(name, tensor):
            if rows.batch > 1 and rows.stride < rows.length:
                raise ValueError(
                    f"{name} is written, and its samples overlap: {rows.stride} bytes from one to "
                    f"the next, of {rows.length} bytes each. Expected samples with memory of their "
                    f"own."
                )
            for other, taken in kept:
                if rows.overlaps(taken):
                    which = "its two entries overlap" if other == name else f"overlaps {other}"
                    raise ValueError(
                        f"{name} is written, and {which}. Expected memory of its own for each."
                    )
            kept.append((name, rows))
    for name, tensor in read.items():
        for rows in _rows_of(name, tensor):
            for other, taken in kept:
                if rows != taken and rows.overlaps(taken):
                    raise ValueError(
                        f"{name} overlaps {other}, which is written. Expected the same memory in "
                        f"the same dtype, sample for sample, or memory of its own."
                    )


def check_kept(written: Mapping[str, Tensor | None], again: Mapping[str, Tensor | None]) -> None:
    """Refuse to write what is read once more afterwards (the fast backends)."""
    for name, tensor in again.items():
        for rows in _rows_of(name, tensor):
            for other, target in written.items():
                if any(rows.overlaps(taken) for taken in _rows_of(other, target)):
                    raise ValueError(
                        f"{name} overlaps {other}, which is written before it is read again. "
                        f"Expected memory of its own."
                    )


def _rows_of(name: str, tensor: Tensor | None) -> list[_Rows]:
    if tensor is None or tensor.numel() == 0:
        return []
    if name.endswith("_window"):
        return [rows for entry in (tensor[0], tensor[1]) for rows in _rows_of("", entry)]
    batch, bytes_each = tensor.shape[0], tensor.element_size()
    length = tensor.numel() // batch * bytes_each
    stride = tensor.stride(0) * bytes_each if batch > 1 else length
    return [_Rows(tensor.data_ptr(), stride, length, batch, tensor.dtype)]


def check_rows(**tensors: Tensor | None) -> None:
    """Samples may lie anywhere, but the elements of one must be contiguous (the fast backends)."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_contiguous():
            continue
        rows = tensor.flatten(0, 1) if name.endswith("_window") else tensor
        if not rows[:1].is_contiguous():
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}. The "
                f"elements of one sample must be contiguous; only the batch stride is free. Call "
                f".contiguous(), or use backend='reference'."
            )


def _check_statistics(
    x: Tensor,
    p: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    active: Tensor | None,
) -> None:
    _check_tokens(x)
    _check_like("p", p, x)
    _check_window("probe_window", probe_window, x, p.dtype, "p's")
    _check_per_sample(x, newest, active)
    _check_entry_sums(entry_sums, x)
    _check_range(low, high)


def _check_tokens(x: Tensor) -> None:
    if x.ndim == 0:
        raise ValueError("x has no dimensions. Expected [B, ...], usually [B, S, D].")
    _expect_dtype("x", x, FLOATING, "bfloat16, float16, float32 or float64")


def _check_like(
    name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype | None = None, whose: str = ""
) -> None:
    _expect_shape(name, tensor, x.shape, "x's shape")
    _expect_device(name, tensor, x)
    if dtype is None:
        _expect_dtype(name, tensor, FLOATING, "bfloat16, float16, float32 or float64")
    else:
        _expect_dtype(name, tensor, (dtype,), f"{whose} dtype {dtype}")


def _check_window(
    name: str, window: Tensor, x: Tensor, dtype: torch.dtype | None = None, whose: str = ""
) -> None:
    # Not compared with (2, *x.shape): under torch.compile a batch of 2 would be taken for that 2.
    if window.ndim != x.ndim + 1 or window.shape[0] != 2 or window.shape[1:] != x.shape:
        raise ValueError(
            f"{name} has shape {list(window.shape)} and x {list(x.shape)}. Expected two entries of "
            f"x's shape, [2, B, ...]."
        )
    _expect_device(name, window, x)
    if dtype is None:
        _expect_dtype(name, window, FLOATING, "bfloat16, float16, float32 or float64")
    else:
        _expect_dtype(name, window, (dtype,), f"{whose} dtype {dtype}")


def _check_per_sample(x: Tensor, newest: Tensor, active: Tensor | None) -> None:
    _expect_shape("newest", newest, x.shape[:1], "[B]")
    _expect_dtype("newest", newest, (torch.int32,), "int32")
    _expect_device("newest", newest, x)
    if active is not None:
        _expect_shape("active", active, x.shape[:1], "[B]")
        _expect_dtype("active", active, (torch.uint8,), "uint8")
        _expect_device("active", active, x)


def _check_weights(name: str, weights: Tensor, x: Tensor, *others: Tensor) -> None:
    if torch.float64 in (x.dtype, *(tensor.dtype for tensor in others)):
        _expect_dtype(name, weights, (torch.float32, torch.float64), "float32 or float64")
    else:
        _expect_dtype(name, weights, (torch.float32,), "float32 (float64 only for float64 data)")
    _expect_device(name, weights, x)


def _check_entry_sums(entry_sums: Tensor, x: Tensor) -> None:
    _expect_shape("entry_sums", entry_sums, (x.shape[0], 4), "[B, 4]")
    _expect_dtype("entry_sums", entry_sums, (torch.float32, torch.float64), "float32 or float64")
    _expect_device("entry_sums", entry_sums, x)


def _check_range(low: float, high: float) -> None:
    if not low <= high:  # also refuses NaN
        raise ValueError(f"gamma is clipped to [{low}, {high}]. Expected low <= high.")


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}. Expected {list(shape)}: {meaning}."
        )


def _expect_dtype(name: str, tensor: Tensor, allowed: tuple, expected: str) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}. Expected {expected}.")


def _expect_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}. Expected one device.")
