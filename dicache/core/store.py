"""Where a trajectory's tensors are between steps: as they are, rounded, or in host memory.

A store holds named buffers. A `PlainStore` keeps them as they are. In a `PackedStore` they are
empty most of the time: what they held is packed in bf16, in fp8 with a scale a row, in pinned host
memory, or in several of these. Before an operator needs a buffer it is opened, which fills it
again, and emptied afterwards. So the blocks of the model, where its memory peaks, never run beside
the cache's buffers. A buffer's tensor stays the same object, so that views of it stay valid.

On a GPU copies from and to the host run on a stream of their own. The residuals of the probe are on
their way while the probe's blocks run, those of the blocks while the decision is taken. Nothing is
copied before something was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .host_memory import HostMemory
from .rules import Rules

# The buffers, and the dimension that is the batch's.
BATCH_DIMENSION = {
    "probe_window": 1,  # [2, B, ...] residuals q of the two last computed steps
    "residual_window": 1,  # [2, B, ...] residuals r
    "oldest_residual": 0,  # [B, ...] r of the computed step before those two
    "previous_probe": 0,  # [B, ...] p of the step before
    "previous_x": 0,  # [B, ...] x of the step before
}

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_FP16_MAX = torch.finfo(torch.float16).max
_SMALLEST = torch.finfo(torch.float32).tiny  # a scale below it may round to 0


class Store(Protocol):
    """Named buffers, and what becomes of them between steps.

    Attributes:
        packs: Whether buffers are empty between steps. Where they are not, none of the calls that
            open and empty them does anything.
        rounds: Whether what is opened is not exactly what was saved.
    """

    packs: bool
    rounds: bool

    def __getitem__(self, name: str) -> Tensor:
        """A buffer's tensor; what is in it is valid between `open` and `empty`."""

    def expect(self, *names: str) -> None:
        """Begin with what opening these will take, beside the device's other work."""

    def open(self, *names: str) -> None:
        """Fill these buffers with what was saved; with anything, NaN included, if nothing was."""

    def save(self, *names: str) -> None:
        """Keep what these buffers hold now."""

    def reread(self, name: str) -> None:
        """Replace what an open buffer holds by what the next `open` will give."""

    def empty(self, *names: str) -> None:
        """Give these buffers' memory back; without names, that of all."""

    def convert(self, name: str, dtype: torch.dtype) -> None:
        """Let an open buffer have another dtype, in a tensor of its own."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept between steps, as much as their memory takes."""


def make_store(rules: Rules, tensors: dict[str, Tensor], token_dim: int) -> Store:
    """The store that the rules ask for.

    Args:
        rules: Their `cache_dtype` and `cache_device`.
        tensors: The buffers by name, with anything in them.
        token_dim: The dimension of a token's elements, counted from the last one.
    """
    if not rules.packs:
        return PlainStore(tensors)
    return PackedStore(tensors, rules.cache_dtype, rules.cache_device, token_dim)


class PlainStore:
    """Buffers that stay as they are; nothing here costs anything."""

    packs, rounds = False, False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def expect(self, *names: str) -> None: ...

    def open(self, *names: str) -> None: ...

    def save(self, *names: str) -> None: ...

    def reread(self, name: str) -> None: ...

    def empty(self, *names: str) -> None: ...

    @torch.inference_mode(False)  # buffers made inside it could not be rewritten outside
    def convert(self, name: str, dtype: torch.dtype) -> None:
        self._tensors[name] = self._tensors[name].to(dtype)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())


class PackedStore:
    """Buffers that are packed while nobody needs them.

    Args:
        tensors: The buffers; they are emptied.
        dtype: Of the packed elements; `None` keeps a buffer's.
        device: Where they are kept; `None` keeps them where the buffer is.
        token_dim: The dimension of a token's elements, counted from the last one.
    """

    packs = True

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        device: str | None,
        token_dim: int,
    ) -> None:
        self._how = (dtype, device, token_dim)
        self._buffers = {name: PackedBuffer(each, *self._how) for name, each in tensors.items()}
        self.rounds = not all(buffer.is_exact for buffer in self._buffers.values())

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name].tensor

    def expect(self, *names: str) -> None:
        for name in names:
            self._buffers[name].fetch()

    def open(self, *names: str) -> None:
        for name in names:
            self._buffers[name].fill()

    def save(self, *names: str) -> None:
        for name in names:
            self._buffers[name].save()

    def reread(self, name: str) -> None:
        self._buffers[name].reread()

    def empty(self, *names: str) -> None:
        for name in names or self._buffers:
            self._buffers[name].empty()

    @torch.inference_mode(False)
    def convert(self, name: str, dtype: torch.dtype) -> None:
        tensor = self._buffers[name].tensor.to(dtype)
        self._buffers[name] = PackedBuffer(tensor, *self._how, is_full=True)
        self.rounds = not all(buffer.is_exact for buffer in self._buffers.values())

    @property
    def num_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self._buffers.values())


class PackedBuffer:
    """A tensor that is packed while nobody needs it.

    With `dtype` fp8 (e4m3) a token's D elements are stored as round(token / scale), scale =
    max|token| / 448 in fp32; a token of zeros has scale 1. Other dtypes round each element.

    Args:
        tensor: Its views stay valid, and are filled and emptied with it.
        dtype: Of the packed elements; `None` keeps the tensor's.
        device: Where they are kept; `None` keeps them where the tensor is.
        dim: The dimension of a token's elements, counted from the last one.
        is_full: Whether the tensor stays as it is for now; else it is emptied.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        tensor: Tensor,
        dtype: torch.dtype | None,
        device: str | None,
        dim: int = -1,
        is_full: bool = False,
    ) -> None:
        self.tensor, self._dim = tensor, dim
        self._num_bytes = tensor.untyped_storage().nbytes()
        self._stream: torch.cuda.Stream | None = None
        self._host: HostMemory | None = None
        where = tensor.device if device is None else torch.device(device)
        make: Callable[..., Tensor] = partial(torch.empty, device=where)
        if device == "cpu" and tensor.is_cuda:
            self._stream = torch.cuda.Stream(tensor.device)
            self._host = HostMemory(tensor.device)
            make = self._host.empty
        kind, tokens = dtype or tensor.dtype, list(tensor.shape)
        tokens[dim] = 1
        self._packed = make(tensor.shape, dtype=kind)
        self._scale: Tensor | None = None
        if kind == torch.float8_e4m3fn:
            self._scale = make(tokens, dtype=torch.float32)
        self._is_saved = False
        # Noted before a tensor loses its memory, and after it got it: an interrupt in between must
        # not leave one that is taken for full.
        self.is_full = True
        if not is_full:
            self.empty()

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed elements and scales, or of the host's pages that hold them."""
        if self._host is not None:
            return self._host.num_bytes
        tensors = [self._packed] if self._scale is None else [self._packed, self._scale]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def is_exact(self) -> bool:
        """Whether what comes out is what went in."""
        return self._packed.dtype == self.tensor.dtype

    def fetch(self) -> None:
        """Begin to fill the tensor, where that goes on beside the device's other work."""
        if not self.is_full and self._stream is not None:
            self._make_room()
            self._beside(self._unpack)

    def fill(self) -> None:
        """Fill the tensor, if it is empty."""
        self.fetch()
        if self._stream is not None:
            self._join()
        elif not self.is_full:
            self._make_room()
            self._unpack()

    def save(self) -> None:
        """Pack what is in the tensor."""
        if self._stream is None:
            self._pack()
        else:
            self._beside(self._pack)
        self._is_saved = True

    def reread(self) -> None:
        """Replace what is in the tensor by what `fill` will give; after `save`."""
        if self._stream is None:
            self._unpack()
        else:
            self._beside(self._unpack)
            self._join()

    def empty(self) -> None:
        """Free the tensor's memory, as soon as the device is done with it."""
        if self.is_full:
            self.is_full = False
            self.tensor.untyped_storage().resize_(0)

    def _make_room(self) -> None:
        """Give the tensor its memory, with anything in it."""
        if not self.is_full:
            self.tensor.untyped_storage().resize_(self._num_bytes)
            self.is_full = True

    def _beside(self, work: Callable[[], None]) -> None:
        """Queue the work on the stream of its own, behind what is queued so far."""
        stream, host = self._stream, self._host
        assert stream is not None and host is not None
        stream.wait_stream(torch.cuda.current_stream(self.tensor.device))
        try:
            with torch.cuda.stream(stream):
                work()
        finally:  # freed, neither is handed out before the copies are done, also of a part
            host.copied.record(stream)
            self.tensor.record_stream(stream)

    def _join(self) -> None:
        """Let what is queued from here on wait for the stream of its own."""
        if self._stream is not None:
            torch.cuda.current_stream(self.tensor.device).wait_stream(self._stream)

    def _unpack(self) -> None:
        if not self._is_saved:
            return
        if self._scale is None:
            self.tensor.copy_(self._packed, non_blocking=True)
            if self.tensor.dtype == torch.float16 and not self.is_exact:
                self.tensor.clamp_(-_FP16_MAX, _FP16_MAX)  # bf16 rounds its largest ones up
            return
        device = self.tensor.device
        for tensor, packed, scale in self._parts(self._scale):
            elements = packed.to(device, non_blocking=True).to(torch.float32)
            tensor.copy_(elements.mul_(scale.to(device, non_blocking=True)))

    def _pack(self) -> None:
        if self._scale is None:
            self._packed.copy_(self.tensor, non_blocking=True)
            return
        for tensor, packed, scale in self._parts(self._scale):
            largest = tensor.abs().amax(dim=self._dim, keepdim=True).to(torch.float32)
            step = torch.where(largest > 0, (largest / _FP8_MAX).clamp_(min=_SMALLEST), 1.0)
            elements = (tensor / step).clamp_(-_FP8_MAX, _FP8_MAX)  # NaN stays NaN
            packed.copy_(elements.to(torch.float8_e4m3fn), non_blocking=True)
            scale.copy_(step, non_blocking=True)

    def _parts(self, scale: Tensor) -> list[tuple[Tensor, ...]]:
        """Tensor, packed elements and scales, in parts: their fp32 values need memory, too."""
        whole = (self.tensor, self._packed, scale)
        if not self.tensor.numel():
            return []
        return [whole] if self.tensor.dim() == 1 else list(zip(*whole, strict=True))
