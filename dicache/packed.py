"""Less memory for the cache between steps: another dtype, or host memory.

A `PackedTrajectory` is a trajectory whose large buffers are empty most of the time. What they held
is packed: in bf16, in fp8 with a scale a row, in pinned host memory, or in several of these. Before
an operator needs a buffer it is filled again, and emptied afterwards. So the blocks of the model,
where its memory peaks, never run beside the cache's buffers.

On a GPU copies from and to the host run on a stream of their own. The residuals of the probe are on
their way while the probe's blocks run, those of the blocks while the decision is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import DiCacheConfig
from .trajectory import Trajectory

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_FP16_MAX = torch.finfo(torch.float16).max
_SMALLEST = torch.finfo(torch.float32).tiny  # a scale below it may round to 0


def make_trajectory(config: DiCacheConfig, x: Tensor, p: Tensor) -> Trajectory:
    """The trajectory that a configuration asks for."""
    return (PackedTrajectory if config.packs else Trajectory)(config, x, p)


class PackedBuffer:
    """A tensor that is packed while nobody needs it.

    With `dtype` fp8 (e4m3) a token's D elements are stored as round(token / scale), scale =
    max|token| / 448 in fp32; a token of zeros has scale 1. Other dtypes round each element.

    Args:
        buffer: Its views stay valid, and are filled and emptied with it.
        dtype: Of the packed elements; `None` keeps the buffer's.
        device: Where they are kept; `None` keeps them where the buffer is.
        dim: The dimension of a token's elements, counted from the last one.
        is_full: Whether the buffer stays as it is for now; else it is emptied.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        buffer: Tensor,
        dtype: torch.dtype | None,
        device: str | None,
        dim: int = -1,
        is_full: bool = False,
    ) -> None:
        self._buffer, self._dim = buffer, dim
        self._num_bytes = buffer.untyped_storage().nbytes()
        pinned = device == "cpu" and buffer.is_cuda
        where = buffer.device if device is None else torch.device(device)
        kind, tokens = dtype or buffer.dtype, list(buffer.shape)
        tokens[dim] = 1
        self._packed = torch.zeros(buffer.shape, dtype=kind, device=where, pin_memory=pinned)
        self._scale: Tensor | None = None
        if kind == torch.float8_e4m3fn:
            self._scale = torch.ones(tokens, dtype=torch.float32, device=where, pin_memory=pinned)
        self._stream = torch.cuda.Stream(buffer.device) if pinned else None
        # Noted before a buffer loses its memory, and after it got it: an interrupt in between must
        # not leave one that is taken for full.
        self.is_full = True
        if not is_full:
            self.empty()

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed elements and scales."""
        tensors = [self._packed] if self._scale is None else [self._packed, self._scale]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def is_exact(self) -> bool:
        """Whether what comes out is what went in."""
        return self._packed.dtype == self._buffer.dtype

    def make_room(self) -> None:
        """Give the buffer its memory, with anything in it."""
        if not self.is_full:
            self._buffer.untyped_storage().resize_(self._num_bytes)
            self.is_full = True

    def fetch(self) -> None:
        """Begin to fill the buffer, where that goes on beside the device's other work."""
        if not self.is_full and self._stream is not None:
            self.make_room()
            self._beside(self._unpack)

    def fill(self) -> None:
        """Fill the buffer, if it is empty."""
        self.fetch()
        if self._stream is not None:
            self._join()
        elif not self.is_full:
            self.make_room()
            self._unpack()

    def save(self) -> None:
        """Pack what is in the buffer."""
        if self._stream is None:
            self._pack()
        else:
            self._beside(self._pack)

    def round(self) -> None:
        """Replace what is in the buffer by what `fill` will give; after `save`."""
        if self._stream is None:
            self._unpack()
        else:
            self._beside(self._unpack)
            self._join()

    def empty(self) -> None:
        """Free the buffer's memory, as soon as the device is done with it."""
        if self.is_full:
            self.is_full = False
            self._buffer.untyped_storage().resize_(0)

    def _beside(self, work: Callable[[], None]) -> None:
        """Queue the work on the stream of its own, behind what is queued so far."""
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(self._buffer.device))
        with torch.cuda.stream(stream):
            work()
        self._buffer.record_stream(stream)  # freed, it is not handed out before the copy is done

    def _join(self) -> None:
        """Let what is queued from here on wait for the stream of its own."""
        if self._stream is not None:
            torch.cuda.current_stream(self._buffer.device).wait_stream(self._stream)

    def _unpack(self) -> None:
        if self._scale is None:
            self._buffer.copy_(self._packed, non_blocking=True)
            if self._buffer.dtype == torch.float16 and not self.is_exact:
                self._buffer.clamp_(-_FP16_MAX, _FP16_MAX)  # bf16 rounds its largest ones up
            return
        device = self._buffer.device
        for buffer, packed, scale in self._parts(self._scale):
            elements = packed.to(device, non_blocking=True).to(torch.float32)
            buffer.copy_(elements.mul_(scale.to(device, non_blocking=True)))

    def _pack(self) -> None:
        if self._scale is None:
            self._packed.copy_(self._buffer, non_blocking=True)
            return
        for buffer, packed, scale in self._parts(self._scale):
            largest = buffer.abs().amax(dim=self._dim, keepdim=True).to(torch.float32)
            step = torch.where(largest > 0, (largest / _FP8_MAX).clamp_(min=_SMALLEST), 1.0)
            elements = (buffer / step).clamp_(-_FP8_MAX, _FP8_MAX)  # NaN stays NaN
            packed.copy_(elements.to(torch.float8_e4m3fn), non_blocking=True)
            scale.copy_(step, non_blocking=True)

    def _parts(self, scale: Tensor) -> list[tuple[Tensor, ...]]:
        """Buffer, packed elements and scales, in parts: their fp32 values need memory, too."""
        whole = (self._buffer, self._packed, scale)
        if not self._buffer.numel():
            return []
        return [whole] if self._buffer.dim() == 1 else list(zip(*whole, strict=True))


class PackedTrajectory(Trajectory):
    """A trajectory with packed buffers, `DiCacheConfig.cache_dtype` and `cache_device`."""

    _packs = False  # a sample's trajectory works on views; its batch's packs and unpacks

    @torch.inference_mode(False)
    def __init__(self, config: DiCacheConfig, x: Tensor, p: Tensor) -> None:
        super().__init__(config, x, p)
        # The model's last dimension, wherever it lies in memory.
        how = (config.cache_dtype, config.cache_device, self._back[-1] - p.dim())
        self._how = how
        self._packed_probes = [PackedBuffer(self.probe_window, *how)]
        for previous in (self.previous_probe, self.previous_x):
            if previous is not None:
                self._packed_probes.append(PackedBuffer(previous, *how))
        self._packed_residuals = PackedBuffer(self.residual_window, *how)
        self._packs = True
        self._changed = False  # whether the buffers hold what was not packed yet

    @property
    def _packed(self) -> list[PackedBuffer]:
        return [*self._packed_probes, self._packed_residuals]

    def fetch(self) -> None:
        """Begin to bring back what `statistics` is going to need."""
        for packed in self._packed_probes:
            packed.fetch()

    @torch.no_grad()
    def statistics(self, x: Tensor, p: Tensor) -> Tensor:
        for packed in self._packed_probes:
            packed.fill()
        result = super().statistics(x, p)
        for packed in self._packed_probes[1:]:  # the previous step's probe is this one's by now
            packed.save()
        for packed in self._packed_probes:
            packed.empty()
        self._packed_residuals.fetch()
        return result

    @torch.no_grad()
    def combine(self, x: Tensor, gamma: Tensor) -> Tensor:
        self._packed_residuals.fill()
        y = super().combine(x, gamma)
        self._packed_residuals.empty()
        return y

    def release(self) -> None:
        super().release()
        if self._packs:
            self._empty_all()

    def hold(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of x and p: the buffers, where they might have been parked, are empty."""
        return x.clone(), p.clone()

    @torch.no_grad()
    def record(self, x: Tensor, p: Tensor, y: Tensor) -> None:
        if self._packs:
            self._fill_all()
        super().record(x, p, y)

    def fit(self, dtype: torch.dtype) -> None:
        """See `Trajectory.fit`; samples may be recorded one by one from here on."""
        if self._packs:
            self._fill_all()
        if self.residual_window.dtype != dtype:
            super().fit(dtype)
            self._packed_residuals = PackedBuffer(self.residual_window, *self._how, is_full=True)

    def split(self) -> None:
        """See `Trajectory.split`; views are made of buffers that have their memory."""
        for packed in self._packed:
            packed.make_room()
        super().split()
        self._empty_all()
        for sample in self.samples:
            assert isinstance(sample, PackedTrajectory)  # a copy of this one
            sample._packs = sample._changed = False

    def drop_entries(self) -> None:
        """See `Trajectory.drop_entries`; what an error left half done is dropped with them."""
        if self._packs:
            self._changed = False
            self._empty_all()
        super().drop_entries()

    def end_step(self) -> None:
        super().end_step()
        if self._changed:
            self._changed = False
            self._pack_all()
        elif self._packs:
            self._packed_residuals.empty()

    @property
    def num_bytes(self) -> int:
        small = (self.newest, self.entry_sums, self._workspace)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in small)
        return num_bytes + sum(packed.num_bytes for packed in self._packed)

    def _fill_all(self) -> None:
        """For a record; `end_step` packs what it left."""
        self._changed = True
        for packed in self._packed:
            packed.fill()

    def _empty_all(self) -> None:
        for packed in self._packed:
            packed.empty()

    def _pack_all(self) -> None:
        """Pack and empty all buffers, and add up the entries as they are going to be read."""
        for packed in self._packed:
            packed.save()
        if not self._packed_probes[0].is_exact:
            self._packed_probes[0].round()
            older, newer = self.probe_window.to(self.entry_sums.dtype)
            difference = (newer - older).unsqueeze(-1).flatten(1)
            self.entry_sums[:, 0] = difference.abs().sum(dim=1)
            self.entry_sums[:, 1] = difference.square().sum(dim=1)
        self._empty_all()
