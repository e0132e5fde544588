"""Small tensors brought to the host with one wait.

`tensor.item()` and `.tolist()` wait for all that is queued on a GPU, and copy into memory that the
driver has to stage. A `Readback` begins its copies into pinned memory when it is made, and `wait`
ends as soon as these are done: what the caller queued in between goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
