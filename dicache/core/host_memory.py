"""Page-locked host memory that is as large as what is asked for, and goes when nobody needs it.

torch's own (`pin_memory=True`) takes the next power of two, and keeps what was freed for others
that ask for as much. So ordinary pages are registered with CUDA here, as long as they are needed.

What torch does for its own is done here, too: a copy may still be on its way when memory is let go
of. Nobody waits for it, as it may hang: behind a rank that failed, say. Such memory is kept until
somebody asks for memory, or lets go of some, or resets a session, after the copy.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .warning import warn_user

_PAGE = mmap.PAGESIZE
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


class HostMemory:
    """Page-locked tensors that are let go of together, with this object.

    Where the system refuses to lock pages, they are ordinary ones, and copies wait for the host.

    Args:
        device: The GPU that they are copied from and to.

    Attributes:
        copied: To be recorded behind every copy from or to them.
        num_bytes: What the host gives for them.
    """

    def __init__(self, device: torch.device) -> None:
        give_back()
        self.copied, self.num_bytes = torch.cuda.Event(), 0
        self._blocks: list[_Block] = []
        self._device = device
        leaving = weakref.finalize(self, _let_go, self._blocks, self.copied, device)
        leaving.atexit = False  # the process's end gives all back, and need not wait

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with anything in it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        size = max(-(-num_bytes // _PAGE), 1) * _PAGE
        memory = torch.empty(size + _PAGE, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % _PAGE
        pages = memory[start : start + size]  # whole ones: nothing else lies in them
        self._blocks.append(_Block(pages, _lock(pages, self._device)))
        self.num_bytes += size
        return pages[:num_bytes].view(dtype).view(shape)


class _Block(NamedTuple):
    pages: Tensor  # uint8; freed with the last tensor that lies in them
    is_locked: bool


# What was let go of, what was recorded behind its copies, and the device of these.
_leaving: deque[tuple[list[_Block], torch.cuda.Event, torch.device]] = deque()


def give_back() -> None:
    """Give back what was let go of, as far as no copy from or to it is on its way."""
    for _ in range(len(_leaving)):
        try:
            blocks, copied, device = _leaving.popleft()
        except IndexError:  # another thread was here
            return
        if not _unlock(blocks, copied, device):
            _leaving.append((blocks, copied, device))


def _let_go(blocks: list[_Block], copied: torch.cuda.Event, device: torch.device) -> None:
    _leaving.append((blocks, copied, device))
    give_back()


def _lock(pages: Tensor, device: torch.device) -> bool:
    """Register pages with CUDA; whether the system allows it."""
    with torch.cuda.device(device):  # CUDA takes memory of its own on a device that it begins with
        place = pages.data_ptr(), pages.numel()
        error = int(torch.cuda.cudart().cudaHostRegister(*place, _FOR_ALL_DEVICES))
        if error:
            # CUDA remembers its last error, and who launches a kernel next takes it for his own.
            with contextlib.suppress(RuntimeError):
                torch.ones((), device=device)
            warn_user(_REFUSED.format(pages.numel() / 1e6, error))
    return not error


def _unlock(blocks: list[_Block], copied: torch.cuda.Event, device: torch.device) -> bool:
    """Unregister pages; whether their time has come."""
    # An error: CUDA failed, or began before this process was forked. Nothing is on its way then.
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing() or not copied.query():
            return False  # to query or to unregister would break a capture off
        for block in blocks:
            if block.is_locked:
                torch.cuda.cudart().cudaHostUnregister(block.pages.data_ptr())
    return True


_REFUSED = (
    "{:.1f} MB of host memory for the cache could not be locked (CUDA error {}), so steps wait for "
    "copies to and from it, and are slower. Allow the process to lock memory, or leave "
    'cache_device="cpu" out.'
)
