"""How to use the cache: the residuals of the two last computed steps, and how to combine them.

A trajectory belongs to one context of one run. It owns every hidden-state sized tensor that the
cache holds, allocated once and rewritten in place: two residual windows of two entries, the
previous probe where the error needs it, and the previous input for delta_minus.

Buffers lie in memory as the model's tokens do. HunyuanVideo's come out of a convolution as a
transposed [B, D, S]; operators that work element by element need no copy in another order.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from .config import DiCacheConfig
from .ops import make_workspace, resolve_backend

_FP16_MAX = torch.finfo(torch.float16).max


class Trajectory:
    """Dynamic Cache Trajectory Alignment (arXiv 2508.17356) for hidden states of one layout.

    Args:
        config: Says which statistics are needed.
        x: [B, ...] tokens before block 0; gives shape, dtype and device.
        p: [B, ...] tokens after the probe.
    """

    @torch.inference_mode(False)  # buffers made inside it could not be rewritten outside
    def __init__(self, config: DiCacheConfig, x: Tensor, p: Tensor) -> None:
        self.config = config
        self.ops = resolve_backend(config.backend, x.device)
        low, high = config.gamma_range
        self.gamma_range = (float(low), math.inf if high is None else float(high))
        batch, wide = x.shape[0], torch.float64 if x.dtype == torch.float64 else torch.float32
        self._layout = (x.shape, x.dtype, x.device, p.shape, p.dtype, p.device)
        self._order = _memory_order(p)
        self._back = [self._order.index(dim) for dim in range(p.dim())]
        self._is_permuted = self._order != sorted(self._order)
        self._copied_x: tuple[Tensor, Tensor] | None = None  # this step's x, and a dense copy
        x, p = self._view(x), self._view(p)
        self.probe_window = torch.zeros((2, *p.shape), dtype=p.dtype, device=p.device)
        self.residual_window = torch.zeros((2, *x.shape), dtype=x.dtype, device=x.device)
        self.previous_probe = None if config.verifies_alignment else p.new_empty(p.shape)
        self.previous_x = x.new_empty(x.shape) if config.error == "delta_minus" else None
        self.newest = torch.zeros(batch, dtype=torch.int32, device=x.device)
        self.entry_sums = torch.zeros((batch, 4), dtype=wide, device=x.device)
        self._workspace = make_workspace(x)
        shared = (self.probe_window, self.newest, self.entry_sums, *self.gamma_range)
        self._statistics: tuple[Any, ...]  # what the operator takes behind x and p
        if config.verifies_alignment:
            to_probe = config.error == "weighted_alignment"
            self._statistics = (*shared, to_probe, None, self._workspace)
        else:
            previous = (self.previous_probe, self.previous_x)
            least_squares = config.alignment == "least_squares"
            self._statistics = (*previous, *shared, least_squares, None, self._workspace)
        self.has_entry = False
        self._older_slot = 1  # host copy of 1 - newest: no device read to find the slot
        self.samples: list[Trajectory] = []  # views of one sample each; see `split`
        self._x_dtype = x.dtype
        self._probes = self.probe_window.unbind()
        self._take_residuals(self.residual_window)
        self.runs_ahead = x.is_cuda  # whether work may be queued while the host does something else
        self._stored_probe = False  # whether this step's p and x are in the previous-step buffers

    def matches(self, x: Tensor, p: Tensor) -> bool:
        """Whether x and p have the shape, dtypes and device that this trajectory was made for."""
        return self._layout == (x.shape, x.dtype, x.device, p.shape, p.dtype, p.device)

    def fetch(self) -> None:
        """A probe is going to come: begin with what can be done for it before."""

    def statistics(self, x: Tensor, p: Tensor) -> Tensor:
        """(error, gamma) [B + 1, 2] on the device; the last row is the whole batch."""
        x, p = self._dense_x(x), _dense(self._view(p) if self._is_permuted else p)
        if self.previous_probe is None:
            return self.ops.alignment_statistics(x, p, *self._statistics)[1]
        for trajectory in (self, *self.samples):
            trajectory._stored_probe = True
        return self.ops.probe_statistics(x, p, *self._statistics)[1]

    def release(self) -> None:
        """The step is going to be computed: let go of what was made ready for a reuse."""
        self._copied_x = None

    def hold(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of x and p in the cache's own buffers, valid until this step is recorded.

        They lie where `record` will write: in the older window entry, or in the previous probe
        and input, which hold this step's values anyway. An entry is invalid while it is a parking
        place. Where a buffer's dtype cannot hold the value the tensor itself is returned.
        """
        x, p = self._view(x), self._view(p)
        self._remember_probe(x, p)
        if self.previous_x is not None:
            x = self.previous_x
        elif self.residual_window.dtype == x.dtype:
            x = self._residuals[self._older_slot].copy_(x)
        if self.previous_probe is not None:
            p = self.previous_probe
        else:
            p = self._probes[self._older_slot].copy_(p)
        return self._view_back(x), self._view_back(p)

    def combine(self, x: Tensor, gamma: Tensor) -> Tensor:
        """y = x + r_old + gamma (r_new - r_old); gamma [B] on the device."""
        if gamma.dtype != self._gamma_dtype:
            gamma = gamma.to(self._gamma_dtype)  # it is fp64 where the probe is
        y = self.ops.combine_residuals(self._dense_x(x), self.residual_window, self.newest, gamma)
        if y.dtype == torch.float16:  # its largest number is within reach of what models compute
            y.clamp_(-_FP16_MAX, _FP16_MAX)
        return self._view_back(y) if self._is_permuted else y

    def record(self, x: Tensor, p: Tensor, y: Tensor) -> None:
        """Push this step's residuals into the window; x and p may come from `hold`."""
        x, p, y = self._view(x), self._view(p), self._view(y)
        self._remember_probe(x, p)
        self.fit(y.dtype)
        window = (self.residual_window, self.probe_window, self.newest, self.entry_sums)
        x, p, y = _dense(x), _dense(p), _dense(y)
        self.ops.record_residuals(
            x, p, y, *window, first=not self.has_entry, workspace=self._workspace
        )
        self.has_entry = True
        self._older_slot = 1 - self._older_slot
        self.end_step()

    def split(self) -> None:
        """Give every sample a trajectory of its own, in `samples`, on views of these buffers.

        Then samples are held and recorded one by one, in steps of their own; statistics and
        combination go on for all in one launch.
        """
        for row in range(self.newest.shape[0]):
            sample, one = copy.copy(self), slice(row, row + 1)
            sample.newest, sample.entry_sums = self.newest[one], self.entry_sums[one]
            sample.probe_window = self.probe_window[:, one]
            sample._probes = sample.probe_window.unbind()
            sample.previous_probe = (
                None if self.previous_probe is None else self.previous_probe[one]
            )
            sample.previous_x = None if self.previous_x is None else self.previous_x[one]
            sample._take_residuals(self.residual_window[:, one])
            sample.samples = []
            self.samples.append(sample)

    def fit(self, dtype: torch.dtype) -> None:
        """Store residuals in the dtype of what the last block returns, which may not be x's."""
        if self.residual_window.dtype == dtype:
            return
        with torch.inference_mode(False):
            self._take_residuals(self.residual_window.to(dtype))
        for row, sample in enumerate(self.samples):
            sample._take_residuals(self.residual_window[:, row : row + 1])

    def _take_residuals(self, window: Tensor) -> None:
        self.residual_window, self._residuals = window, window.unbind()
        is_wide = torch.float64 in (self._x_dtype, window.dtype)
        self._gamma_dtype = torch.float64 if is_wide else torch.float32

    def drop_entries(self) -> None:
        """Forget the window: what is recorded next becomes its only entry."""
        for trajectory in (self, *self.samples):
            trajectory.has_entry = False
        self.end_step()

    def end_step(self) -> None:
        """The previous step's probe is now this one's; called when the step was reused, too."""
        for trajectory in (self, *self.samples):
            trajectory._stored_probe = False
            trajectory._copied_x = None

    @property
    def num_tensors(self) -> int:
        """Number of tensors of the hidden states' size: 4, 5 or, for delta_minus, 6."""
        return 4 + (self.previous_probe is not None) + (self.previous_x is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is kept between steps."""
        optional = (self.previous_probe, self.previous_x)
        owned = [self.probe_window, self.residual_window, self.newest, self.entry_sums]
        owned.append(self._workspace)
        owned += [tensor for tensor in optional if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in owned)

    def _view(self, tensor: Tensor) -> Tensor:
        """A model's tokens in the order of our memory."""
        return tensor.permute(self._order) if self._is_permuted else tensor

    def _view_back(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self._back) if self._is_permuted else tensor

    def _dense_x(self, x: Tensor) -> Tensor:
        """x for an operator; where that takes a copy, one a step."""
        if x.is_contiguous() and not self._is_permuted:
            return x
        if self._copied_x is not None and self._copied_x[0] is x:
            return self._copied_x[1]
        view = self._view(x)
        dense = _dense(view)
        if dense is not view:
            self._copied_x = (x, dense)
        return dense

    def _remember_probe(self, x: Tensor, p: Tensor) -> None:
        if self._stored_probe:
            return
        if self.previous_probe is not None:
            self.previous_probe.copy_(p)
        if self.previous_x is not None:
            self.previous_x.copy_(x)
        self._stored_probe = True


def _dense(tensor: Tensor) -> Tensor:
    """The operators take samples whose elements are contiguous; models may hand out others."""
    if tensor.is_contiguous():
        return tensor
    elements = 1
    for size, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1], strict=True):
        if stride != elements and size > 1:
            return tensor.contiguous()
        elements *= size
    return tensor


def _memory_order(tensor: Tensor) -> list[int]:
    """The order of dimensions in which a tensor's samples [B, ...] lie in memory."""
    strides = tensor.stride()
    return [0, *sorted(range(1, tensor.dim()), key=lambda dim: -strides[dim])]
