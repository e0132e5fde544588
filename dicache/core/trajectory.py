"""How to use the cache: the residuals of the two last computed steps, and how to combine them.

A trajectory belongs to one context of one run. It owns every hidden-state sized tensor that the
cache holds, allocated once and rewritten in place: two residual windows of two entries, a third
entry of r where weights are calibrated, and what the error of the rules remembers beside them.
Where they are between two steps is the store's.

Buffers lie in memory as the model's tokens do. HunyuanVideo's come out of a convolution as a
transposed [B, D, S]; operators that work element by element need no copy in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import make_results, make_workspace, resolve_backend, why_slow
from .ranks import Ranks
from .readback import Mailbox
from .rules import Rules
from .store import BATCH_DIMENSION, make_store
from .warning import warn_user

_MOST_WEIGHTS = 1024
# Up to this size a reused step is one launch: beyond it launches are cheap beside what they move.
_ONE_LAUNCH_BYTES = 32 << 20
_PROBES, _RESIDUALS, _OLDEST = "probe_window", "residual_window", "oldest_residual"

# (x, p) of every part of the batch that is computed: of the whole batch, or of single samples.
Inputs = list[tuple[Tensor, Tensor]]


class Measured(NamedTuple):
    """What a step's probe gave.

    Attributes:
        numbers: On the device, (error, gamma) of every sample and, in the last row, of the whole
            batch, [B + 1, 2]. Of all ranks' tokens.
        gamma: On the device, what each sample is combined with, [B].
        y: [B, ...] the tokens filled in by it, if they were asked for and could go along.
        letter: Brings the numbers, and the promise, to the host; `None`: they are to be copied.
    """

    numbers: Tensor
    gamma: Tensor
    y: Tensor | None
    letter: Mailbox | None


def runs_ahead(x: Tensor) -> bool:
    """Whether work on such tokens may be queued while the host does something else."""
    return x.is_cuda


class Trajectory:
    """Dynamic Cache Trajectory Alignment (arXiv 2508.17356) for hidden states of one layout.

    Args:
        rules: Say which statistics are needed, where buffers are kept, and whether every sample has
            steps of its own.
        x: [B, ...] tokens before block 0; gives shape, dtype and device.
        p: [B, ...] tokens after the probe.
        has_third: Whether a third entry of r is kept, for `extrapolate`.
        ranks: Those that have the other tokens of a sequence.

    Attributes:
        runs_ahead: Whether work may be queued while the host does something else.
        is_counted: Whether its size is as it was when `num_bytes` was last asked for.
    """

    @torch.inference_mode(False)  # buffers made inside it could not be rewritten outside
    def __init__(
        self,
        rules: Rules,
        x: Tensor,
        p: Tensor,
        has_third: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._rules, self._ranks = rules, ranks
        self._ops = resolve_backend(rules.backend, x.device)
        if rules.backend == "auto" and (reason := why_slow(x.device)) is not None:
            warn_user(_SLOW.format(x.device.type, reason))  # pip shows nobody what builds print
        self._layout = (x.shape, x.dtype, x.device, p.shape, p.dtype, p.device)
        self._order = _memory_order(p)
        self._back = [self._order.index(dim) for dim in range(p.dim())]
        self._is_permuted = self._order != sorted(self._order)
        self._dense_copy: tuple[Tensor, Tensor] | None = None  # this step's x, and a dense copy
        x, p = self._view(x), self._view(p)
        # Anything is in them: the first record writes them all, and nothing is asked before it.
        tensors = {
            _PROBES: torch.empty((2, *p.shape), dtype=p.dtype, device=p.device),
            _RESIDUALS: torch.empty((2, *x.shape), dtype=x.dtype, device=x.device),
        }
        if has_third:
            tensors[_OLDEST] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for name in rules.error.buffers:
            like = x if name == "previous_x" else p
            tensors[name] = like.new_empty(like.shape)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.newest = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
        self.entry_sums = torch.zeros((x.shape[0], 4), dtype=wide, device=x.device)
        self._workspace = make_workspace(x)
        self._names = tuple(tensors)
        self._previous = rules.error.buffers
        samples = range(x.shape[0]) if rules.by_sample else [None]
        shared = (self._ops, tensors, self.newest, self.entry_sums)
        self._parts = [_Part(*shared, sample) for sample in samples]
        # The model's last dimension, wherever it lies in memory.
        self.store = make_store(rules, tensors, self._back[-1] - p.dim())
        self._packs = self.store.packs
        self.runs_ahead = runs_ahead(x)
        columns = 6 if rules.error.verifies_alignment else 5 + 2 * ("previous_x" in tensors)
        self._results = make_results(x, p, columns, self.runs_ahead)
        self._mailbox = Mailbox(self._results) if self.runs_ahead else None
        self._gamma = self._gamma_of(self._results.result)
        self._stored_probe = False  # whether this step's p and x are in the previous-step buffers
        self._weights: dict[tuple[tuple[float, ...], ...], Tensor] = {}
        self._x_dtype, self._p_dtype = x.dtype, p.dtype
        self._is_small = x.numel() * x.element_size() <= _ONE_LAUNCH_BYTES
        self._take_residuals()
        self.is_counted = False

    def matches(self, x: Tensor, p: Tensor) -> bool:
        """Whether x and p have the shape, dtypes and device that this trajectory was made for."""
        return self._layout == (x.shape, x.dtype, x.device, p.shape, p.dtype, p.device)

    def expect_probe(self) -> None:
        """A probe is going to come: begin with what can be done for it before."""
        self.store.expect(_PROBES, *self._previous)

    @property
    def writes_letters(self) -> bool:
        """Whether the host need not ask for what statistics found. Ranks add it up first."""
        return self._mailbox is not None and not (self._ranks and self._ranks.are_several)

    def measure(
        self, x: Tensor, p: Tensor, promise: Tensor | None = None, fills_in: bool = False
    ) -> Measured:
        """Ask how far this step is from the last ones.

        Args:
            x: [B, ...] tokens before block 0.
            p: [B, ...] tokens after the probe.
            promise: A number on the device that the host wants to read along.
            fills_in: Whether to `combine` as well, where that is one launch.
        """
        x, p = self._dense_x(x), _dense(self._view(p) if self._is_permuted else p)
        y = None
        if self._packs:
            self.store.open(_PROBES, *self._previous)
        mailbox = self._mailbox if self.writes_letters else None
        out = self._results if mailbox is None else mailbox.address(promise)
        if fills_in and self._is_one_launch and mailbox is not None:
            sums, numbers, y = self._ops.probe_and_combine(x, p, *self._both, out=out)
        elif self._previous:
            sums, numbers = self._ops.probe_statistics(x, p, *self._arguments, out=out)
        else:
            sums, numbers = self._ops.alignment_statistics(x, p, *self._arguments, out=out)
        gamma, self._stored_probe = self._gamma, bool(self._previous)
        if mailbox is not None:
            mailbox.sent()
        elif self._ranks is not None and self._ranks.are_several:
            numbers = self._finish(self._ranks.add_up(sums))
            gamma = self._gamma_of(numbers)
        if self._packs:
            self.store.save(*self._previous)  # the previous step's probe is this one's by now
            self.store.empty(_PROBES, *self._previous)
            self.store.expect(_RESIDUALS)
        return Measured(numbers, gamma, None if y is None else self._view_back(y), mailbox)

    def gamma_from(self, numbers: Sequence[Sequence[float]]) -> Tensor:
        """What each sample is combined with [B], by numbers that another rank measured."""
        known = torch.tensor(numbers, dtype=self._gamma_dtype, device="cpu")
        return self._gamma_of(known.to(self.newest.device))

    def combine(self, x: Tensor, gamma: Tensor) -> Tensor:
        """y = x + r_old + gamma (r_new - r_old) [B, ...]; gamma [B] on the device."""
        if gamma.dtype != self._gamma_dtype:
            gamma = gamma.to(self._gamma_dtype)  # it is fp64 where the probe is
        if self._packs:
            self.store.open(_RESIDUALS)
        y = self._ops.combine_residuals(self._dense_x(x), self._residuals, self.newest, gamma)
        if self._packs:
            self.store.empty(_RESIDUALS)
        return self._view_back(y)

    def extrapolate(self, x: Tensor, p: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
        """y = x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (p - x - q_a) [B, ...].

        Args:
            x, p: As for `measure`.
            weights: (w1, w2, w3) of every sample, or one row for all.
        """
        on_device = self._weights_on_device(tuple(tuple(row) for row in weights))
        names = (_RESIDUALS, _OLDEST, _PROBES)
        if self._packs:
            self.store.open(*names)
        dense_p = _dense(self._view(p) if self._is_permuted else p)
        r, oldest, q = (self.store[name] for name in names)
        y = self._ops.extrapolate_residuals(
            self._dense_x(x), dense_p, r, oldest, q, self.newest, on_device
        )
        if self._packs:
            self.store.empty(*names)
        return self._view_back(y)

    def _weights_on_device(self, weights: tuple[tuple[float, ...], ...]) -> Tensor:
        """Weights [B, 3]. A schedule that repeats has few, and none is copied twice."""
        known = self._weights.get(weights)
        if known is None:
            like = self.newest
            wide = self._gamma_dtype
            with torch.inference_mode(False):
                host = torch.tensor(weights, dtype=wide, device="cpu", pin_memory=like.is_cuda)
                known = host.to(like.device, non_blocking=True).expand(like.shape[0], -1)
            if len(self._weights) >= _MOST_WEIGHTS:
                self._weights.clear()
            self._weights[weights] = known
        return known

    @torch.no_grad()
    def park(self, x: Tensor, p: Tensor, samples: Sequence[int] | None = None) -> Inputs:
        """Copies of x and p that live as long as this step: nobody else has to keep them.

        They lie where `record` will write: in the older window entry, or in the previous probe
        and input, which hold this step's values anyway. An entry is invalid while it is a parking
        place. Where a buffer's dtype cannot hold x, or buffers are packed, they do not lie there.

        Args:
            x, p: [B, ...] tokens before block 0 and after the probe.
            samples: Those that are computed; `None` is all of them.
        """
        _refuse_capture(x)
        self._dense_copy = None
        self.store.empty()
        inputs = self.split(x, p, samples)
        if self._packs:
            return [(x.clone(), p.clone()) for x, p in inputs]
        parked = []
        for part, (x, p) in zip(self._chosen(samples), inputs, strict=True):
            if not self._stored_probe:
                part.remember(self._view(x), self._view(p))
            x, p = part.park(self._view(x), self._view(p))
            parked.append((self._view_back(x), self._view_back(p)))
        self._stored_probe = bool(self._previous)
        return parked

    def split(self, x: Tensor, p: Tensor, samples: Sequence[int] | None = None) -> Inputs:
        """The parts of x and p that belong to the samples, as they are."""
        if not self._rules.by_sample:
            return [(x, p)]
        chosen = range(len(self._parts)) if samples is None else samples
        return [(x[sample : sample + 1], p[sample : sample + 1]) for sample in chosen]

    @torch.no_grad()
    def record(self, inputs: Inputs, y: Tensor, samples: Sequence[int] | None = None) -> None:
        """Push this step's residuals into the window.

        Args:
            inputs: From `park` or `split`.
            y: [B, ...] tokens after the last block, of the samples alone.
            samples: As for those.
        """
        _refuse_capture(y)
        self.store.open(*self._names)
        self._convert_residuals(y.dtype)
        outputs = y.split(1) if self._rules.by_sample else (y,)
        for part, (x, p), tokens in zip(self._chosen(samples), inputs, outputs, strict=True):
            if not self._stored_probe:
                part.remember(self._view(x), self._view(p))
            part.record(self._view(x), self._view(p), self._view(tokens), self._workspace)
        self.store.save(*self._names)
        if self.store.rounds:
            self._add_up_rounded_entries()
        self.end_step()

    def drop_entries(self, sample: int | None = None) -> None:
        """Forget the window, of a sample or of all: what is recorded next is its only entry."""
        for part in self._parts if sample is None else [self._parts[sample]]:
            part.has_entry = part._has_kept_oldest = False
        if sample is None:
            self.end_step()

    def end_step(self) -> None:
        """The previous step's probe is now this one's; called when the step was reused, too."""
        self._stored_probe = False
        self._dense_copy = None
        if self._packs:
            self.store.empty()

    @property
    def num_tensors(self) -> int:
        """Number of tensors of the hidden states' size: 4, 5 or, for delta_minus, 6.

        One more where weights are calibrated.
        """
        return sum(2 if BATCH_DIMENSION[name] else 1 for name in self._names)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is kept between steps."""
        self.is_counted = True
        small = (self.newest, self.entry_sums, self._workspace, *self._results[:2])
        return self.store.num_bytes + sum(each.numel() * each.element_size() for each in small)

    def _arguments_of_statistics(self) -> tuple[Any, ...]:
        """What the statistics' operator takes behind x and p."""
        rules, error, store = self._rules, self._rules.error, self.store
        shared = (store[_PROBES], self.newest, self.entry_sums, *rules.gamma_range)
        if error.verifies_alignment:
            return (*shared, error.relative_to_probe, None, self._workspace)
        least_squares = rules.least_squares
        return (*self._before(), *shared, least_squares, None, self._workspace)

    def _arguments_of_both(self) -> tuple[Any, ...]:
        """What the operator of a whole reused step takes behind x and p."""
        rules, error = self._rules, self._rules.error
        shared = (self.store[_PROBES], self._residuals, self.newest, self.entry_sums)
        how = (rules.least_squares, error.relative_to_probe, rules.by_sample)
        return (*self._before(), *shared, *rules.gamma_range, *how, None, self._workspace)

    def _before(self) -> tuple[Tensor | None, Tensor | None]:
        """p and x of the step before, where the error is about them."""
        probe, x = (
            self.store[name] if name in self._previous else None
            for name in ("previous_probe", "previous_x")
        )
        return probe, x

    def _finish(self, sums: Tensor) -> Tensor:
        """(error, gamma) [B + 1, 2] from sums, as the operator of the statistics makes them."""
        rules = self._rules
        if self._previous:
            return self._ops.finish_probe_statistics(sums, *rules.gamma_range)
        relative = rules.error.relative_to_probe
        return self._ops.finish_alignment_statistics(sums, *rules.gamma_range, relative)

    def _gamma_of(self, numbers: Tensor) -> Tensor:
        """gamma [B] out of (error, gamma) [B + 1, 2]: each sample's own, or the batch's for all."""
        batch, start = numbers.shape[0] - 1, numbers.storage_offset()
        if self._rules.by_sample:
            return numbers.as_strided((batch,), (2,), start + 1)
        return numbers.as_strided((batch,), (0,), start + 2 * batch + 1)

    def _chosen(self, samples: Sequence[int] | None) -> Iterable[_Part]:
        return self._parts if samples is None else [self._parts[sample] for sample in samples]

    @torch.inference_mode(False)
    def _convert_residuals(self, dtype: torch.dtype) -> None:
        """Store residuals in the dtype of what the last block returns, which may not be x's."""
        if self._residuals.dtype == dtype:
            return
        self.is_counted = False
        for name in {_RESIDUALS, _OLDEST} & {*self._names}:
            self.store.convert(name, dtype)
            for part in self._parts:
                part.take(name, self.store[name])
        self._take_residuals()
        self._weights.clear()

    def _take_residuals(self) -> None:
        self._residuals = self.store[_RESIDUALS]
        is_wide = torch.float64 in (self._x_dtype, self._residuals.dtype)
        self._gamma_dtype = torch.float64 if is_wide else torch.float32
        self._arguments, self._both = self._arguments_of_statistics(), self._arguments_of_both()
        is_alike = self._x_dtype == self._p_dtype == self._residuals.dtype
        self._is_one_launch = is_alike and self._is_small and not self._packs

    def _add_up_rounded_entries(self) -> None:
        """Sums of q_new - q_old as they are going to be read, which is not as they were written."""
        self.store.reread(_PROBES)
        older, newer = self.store[_PROBES].to(self.entry_sums.dtype)
        difference = (newer - older).unsqueeze(-1).flatten(1)
        self.entry_sums[:, 0] = difference.abs().sum(dim=1)
        self.entry_sums[:, 1] = difference.square().sum(dim=1)

    def _view(self, tensor: Tensor) -> Tensor:
        """A model's tokens in the order of our memory."""
        return tensor.permute(self._order) if self._is_permuted else tensor

    def _view_back(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self._back) if self._is_permuted else tensor

    def _dense_x(self, x: Tensor) -> Tensor:
        """x for an operator; where that takes a copy, one a step."""
        if x.is_contiguous() and not self._is_permuted:
            return x
        if self._dense_copy is not None and self._dense_copy[0] is x:
            return self._dense_copy[1]
        view = self._view(x)
        dense = _dense(view)
        if dense is not view:
            self._dense_copy = (x, dense)
        return dense


class _Part:
    """What is recorded as one: the whole batch, or a sample that has steps of its own.

    Its tensors are views of the trajectory's buffers; statistics and combination go on for the
    whole batch in one launch.

    Args:
        ops: The operators.
        tensors: Buffers of the whole batch, by name.
        newest, entry_sums: The whole batch's.
        sample: Which one; `None` for the whole batch.
    """

    def __init__(
        self,
        ops: Any,
        tensors: dict[str, Tensor],
        newest: Tensor,
        entry_sums: Tensor,
        sample: int | None,
    ) -> None:
        self._ops = ops
        self._rows = slice(None) if sample is None else slice(sample, sample + 1)
        self._newest, self._entry_sums = newest[self._rows], entry_sums[self._rows]
        self._views: dict[str, Tensor] = {}
        self._entries: dict[str, tuple[Tensor, ...]] = {}
        for name, tensor in tensors.items():
            self.take(name, tensor)
        self.has_entry = False
        self._older_slot = 1  # host copy of 1 - newest: no device read to find the slot
        self._has_kept_oldest = False

    def take(self, name: str, tensor: Tensor) -> None:
        """Work on this tensor's samples from now on."""
        dim = BATCH_DIMENSION[name]
        self._views[name] = view = tensor[:, self._rows] if dim else tensor[self._rows]
        self._entries[name] = view.unbind() if dim else ()

    def remember(self, x: Tensor, p: Tensor) -> None:
        """Keep what the next step's error compares with, of a step whose probe was not asked."""
        for name, value in (("previous_probe", p), ("previous_x", x)):
            if name in self._views:
                self._views[name].copy_(value)

    def park(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """See `Trajectory.park`."""
        self._keep_oldest()
        views, slot = self._views, self._older_slot
        if "previous_x" in views:
            x = views["previous_x"]
        elif views[_RESIDUALS].dtype == x.dtype:
            x = self._entries[_RESIDUALS][slot].copy_(x)
        if "previous_probe" in views:
            p = views["previous_probe"]
        else:
            p = self._entries[_PROBES][slot].copy_(p)
        return x, p

    def record(self, x: Tensor, p: Tensor, y: Tensor, workspace: Tensor) -> None:
        """See `Trajectory.record`."""
        views = self._views
        window = (views[_RESIDUALS], views[_PROBES], self._newest, self._entry_sums)
        x, p, y = _dense(x), _dense(p), _dense(y)
        is_first = not self.has_entry
        self._keep_oldest()
        self._ops.record_residuals(x, p, y, *window, first=is_first, workspace=workspace)
        self.has_entry = True
        self._older_slot = 1 - self._older_slot
        self._has_kept_oldest = False
        if is_first and _OLDEST in views:  # a window's first entry stands in all places
            views[_OLDEST].copy_(self._entries[_RESIDUALS][self._older_slot])

    def _keep_oldest(self) -> None:
        """Keep the entry that this step is going to overwrite; once a step."""
        if _OLDEST in self._views and self.has_entry and not self._has_kept_oldest:
            self._views[_OLDEST].copy_(self._entries[_RESIDUALS][self._older_slot])
            self._has_kept_oldest = True


def _refuse_capture(tensor: Tensor) -> None:
    """See that a computed step is not captured: the host chooses the window's entry anew each time.

    Raises:
        RuntimeError: A CUDA graph is being captured.
    """
    if _is_captured(tensor):
        raise RuntimeError(
            "A computed step is being captured into a CUDA graph, which would write to the same "
            "entry of the cache's window whenever it is replayed. Capture the blocks, or a reused "
            "step, without the calls of resume and record."
        )


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


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


_SLOW = (
    "The cache's operators run as plain PyTorch on this {} device, up to 50 times slower than "
    "compiled ones (a reused step's at FLUX's size took 210 ms instead of 4 on a CPU): {}. "
    'DiCacheConfig(backend="reference") asks for it without this warning.'
)
