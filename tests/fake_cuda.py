"""The part of torch.cuda that a cache in host memory needs, on the CPU.

Copies are made at once, in the order in which they are queued, and the fake keeps a list of what
was asked for. Tensors of the class `OnGpu` say that they are on a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dicache.core import host_memory, store


class OnGpu(Tensor):
    """A tensor of the CPU that says it is on a GPU; what is computed from it does not."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl
    log: Any = None  # the fake's

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        self.log.append(("fills",))
        return super().copy_(source, non_blocking)

    def record_stream(self, stream: Any) -> None:
        self.log.append(("keeps", self.untyped_storage().nbytes() > 0))


class FakeCuda:
    """Stands for torch.cuda and its runtime.

    Attributes:
        locked: Bytes that are registered, by their address.
        log: What was asked for.
        is_busy: Whether copies are on their way.
        is_capturing: Whether a graph is being captured.
        error: What registering gives.
        is_broken: Whether everything raises.
        mistakes: What would have gone wrong; finalizers cannot raise it.
        leaves_error: Whether the next kernel launch raises what registering gave.
    """

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.log: list[tuple[Any, ...]] = []
        self.is_busy = self.is_capturing = self.is_broken = self.leaves_error = False
        self.error = 0
        self.mistakes: list[str] = []

    @property
    def num_bytes(self) -> int:
        return sum(self.locked.values())

    # --- the runtime ---

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 1 and "device" in self.log[-1]  # for all devices, on the tensors' own
        self.leaves_error = bool(self.error)
        if not self.error:
            known = self.locked.copy()  # the collector may unregister some meanwhile
            overlaps = any(a < address + size and address < a + n for a, n in known.items())
            assert not overlaps
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self._disturbs_captures()
        if address not in self.locked:
            self.mistakes.append(f"{address:#x} is not registered")
        self.locked.pop(address, None)
        return 0

    # --- torch.cuda ---

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self._work()
        self.log.append(("device", device))
        yield

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(("enters", stream.name))
        try:
            yield
        finally:
            self.log.append(("leaves", stream.name))

    def _disturbs_captures(self) -> None:
        if self.is_capturing:
            self.mistakes.append("a capture broke off")

    def _work(self) -> None:
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(("waits", self.name, other.name))


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.is_recorded = cuda, False

    def record(self, stream: FakeStream) -> None:
        self.cuda.log.append(("records", stream.name))
        self.is_recorded = True

    def query(self) -> bool:
        self.cuda._disturbs_captures()
        self.cuda._work()
        return not (self.is_recorded and self.cuda.is_busy)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A fake of torch.cuda; tensors that a store is made of say that they are on a GPU."""
    fake = FakeCuda()
    main, side = FakeStream(fake, "main"), FakeStream(fake, "side")
    for name, value in {
        "cudart": lambda: fake,
        "device": fake.device,
        "stream": fake.stream,
        "Stream": lambda device: side,
        "current_stream": lambda device: main,
        "is_current_stream_capturing": lambda: fake.is_capturing,
        "Event": lambda: FakeEvent(fake),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    made: Callable[..., None] = store.PackedBuffer.__init__

    def on_gpu(buffer: store.PackedBuffer, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        tensor = tensor.as_subclass(OnGpu)
        tensor.log = fake.log
        made(buffer, tensor, *args, **kwargs)

    monkeypatch.setattr(store.PackedBuffer, "__init__", on_gpu)
    finalizers: list[weakref.finalize[Any, Any]] = []
    made_finalize = weakref.finalize

    def finalize(*args: Any) -> Any:
        finalizers.append(finalizer := made_finalize(*args))
        return finalizer

    monkeypatch.setattr(host_memory.weakref, "finalize", finalize)
    monkeypatch.setattr(host_memory, "_leaving", deque())
    yield fake
    for each in finalizers:  # a session is garbage that the collector finds, in a later test
        each.detach()
    assert not fake.mistakes
