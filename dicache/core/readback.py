"""Small numbers brought to the host with one wait.

`tensor.item()` and `.tolist()` wait for all that is queued on a GPU, and copy into memory that the
driver has to stage. A `Mailbox` is memory that a launch writes to while the host looks on, so that
nothing is copied. A `Readback` begins copies into pinned memory when it is made. Either wait ends
as soon as the numbers are there: what the caller queued in between goes on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from time import sleep
from typing import Any

import torch
from torch import Tensor

from ..workspace import MAILBOX_PROMISE, MAILBOX_RESULT, Results

_LAST_SERIAL = 2**31 - 1


class Mailbox:
    """What a launch of statistics leaves for the host: (error, gamma), and a number to go along.

    Args:
        results: With a mailbox. Of one stream, and of one launch at a time.
    """

    def __init__(self, results: Results) -> None:
        assert results.mailbox is not None
        self._results, self._letter = results, results.mailbox
        self._serial = ctypes.c_int32.from_address(self._letter.data_ptr())
        self._numbers = self._letter[MAILBOX_RESULT:].view(results.result.dtype).view(-1, 2)
        self._promises: dict[torch.dtype, Tensor] = {}
        self._event = torch.cuda.Event() if results.result.is_cuda else None

    def address(self, promise: Tensor | None) -> Results:
        """What the next launch is given: its results go to a letter of a serial of its own."""
        serial = self._results.serial % _LAST_SERIAL + 1
        self._results = self._results._replace(serial=serial, promise=promise)
        return self._results

    def sent(self) -> None:
        """The launch is queued, and nothing behind it."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._results.result.device))

    def wait(self, is_early: bool) -> tuple[list[list[float]], float | int | None]:
        """(error, gamma) of every sample and the batch [B + 1, 2], and the promised number.

        Args:
            is_early: The launch goes on behind its letter, so that its end is not waited for.

        Raises:
            RuntimeError: The launch failed.
        """
        expected, event = self._results.serial, self._event
        if event is not None and not is_early:
            event.synchronize()
        while self._serial.value != expected:
            if (event is None or event.query()) and self._serial.value != expected:
                raise RuntimeError("A launch of statistics ended and left no letter.")
            sleep(0)  # other threads go on
        return self._numbers.tolist(), self._promised()

    def _promised(self) -> float | int | None:
        promise = self._results.promise
        if promise is None:
            return None
        view = self._promises.get(promise.dtype)
        if view is None:
            place = slice(MAILBOX_PROMISE, MAILBOX_PROMISE + promise.element_size())
            view = self._promises[promise.dtype] = self._letter[place].view(promise.dtype)
        return view.item()


class Readback:
    """Copies of small tensors on their way to the host.

    Args:
        *tensors: Read as they are when the work queued so far is done; on any device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies: Sequence[Tensor] = tensors
        self._events: list[torch.cuda.Event] = []
        for tensor in tensors:
            if tensor.is_cuda:
                self._begin(tensors)
                return

    def _begin(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [_begin_copy(each) if each.is_cuda else each for each in tensors]
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._events = [_record_event(device) for device in devices]

    def wait(self) -> list[Any]:
        """What `tolist` gives for each tensor: a number, or a list."""
        for event in self._events:
            event.synchronize()
        return list(map(Tensor.tolist, self._copies))


def as_number(timestep: Tensor | float | None) -> float | None:
    """A step's timestep on the host; a tensor on a device is waited for.

    Some models take one a sample or token. Conditioned frames have 0, so the largest one counts.
    """
    if not isinstance(timestep, Tensor):
        return timestep
    if timestep.is_cuda:
        return float(Readback(one_number(timestep)).wait()[0])
    return (timestep if timestep.numel() == 1 else timestep.max()).item()


def one_number(timestep: Tensor) -> Tensor:
    """What `as_number` gives, as a tensor without dimensions on its device."""
    return timestep.reshape(()) if timestep.numel() == 1 else timestep.max()


def _begin_copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _record_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
