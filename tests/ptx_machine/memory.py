"""Global memory: what a kernel may touch, and how late its stores arrive.

A tensor's storage is copied into an arena with room around it, and a byte may be loaded or stored
only if it is an element of a tensor that the launch was given: not what lies between the rows, nor
behind the last element.

Stores are weak, as on a GPU. A store waits in a buffer, first of the thread alone, behind the next
barrier of its block, and reaches memory at any time and in any order; a release sends off what is
ordered before it. A load may find what its block had loaded earlier (the L1 cache), until some
thread of the block acquires; `ld.cg` passes the cache by.
"""

from __future__ import annotations

import numpy as np
import torch

from .faults import BadAccess, Misaligned
from .numbers import Array

_BASE = 1 << 32  # addresses do not fit into 32 bits, so that one that was cut off is found
_GUARD = 256
_READ, _WRITE = np.uint8(1), np.uint8(2)
BLOCK = -2  # owner of a waiting store that the whole block sees
NOBODY = -1


class Memory:
    """The tensors of a launch."""

    def __init__(self) -> None:
        self.data = np.zeros(_GUARD, np.uint8)
        self.rights = np.zeros(_GUARD, np.uint8)
        self._starts: dict[int, tuple[int, torch.Tensor]] = {}  # storage -> its place, its bytes
        self._names: list[tuple[int, str]] = []

    def pointer(self, tensor: torch.Tensor | None, writes: bool = False, name: str = "") -> int:
        """The address of a tensor's first element, for a kernel; 0 for None."""
        if tensor is None:
            return 0
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._starts:
            self._place(storage, name or f"tensor {len(self._names)}")
        start, _ = self._starts[storage.data_ptr()]
        size = tensor.element_size()
        start += tensor.storage_offset() * size
        elements = np.lib.stride_tricks.as_strided(
            self.rights[start:],
            (*tensor.shape, size),
            (*(stride * size for stride in tensor.stride()), 1),
        )
        elements |= _READ | _WRITE if writes else _READ
        return _BASE + start

    def seen(self, name: str) -> Array:
        """The bytes of the tensor of this name as they are while a launch runs: the host's view."""
        start = next(start for start, given in self._names if given == name)
        size = next(len(content) for at, content in self._starts.values() if at == start)
        return self.data[start : start + size]

    def copy_back(self) -> None:
        """Into the tensors, what the arena holds."""
        for start, content in self._starts.values():
            content.copy_(torch.from_numpy(self.data[start : start + len(content)]))

    def name_of(self, place: int) -> str:
        start, name = max((entry for entry in self._names if entry[0] <= place), default=(0, "?"))
        return f"byte {place - start} of {name}"

    def find(self, address: Array, size: int, right: Array) -> Array:
        """The bytes' places [n, size] in the arena, if the access is allowed."""
        if (address % np.uint64(size)).any():
            bad = int(address[(address % np.uint64(size)) != 0][0])
            where = self.name_of(bad - _BASE)
            raise Misaligned(f"{size} bytes at an address that is no multiple of it: {where}")
        first = address.astype(np.int64) - _BASE
        places = first[:, None] + np.arange(size)
        outside = (places < 0) | (places >= len(self.data))
        allowed = (self.rights[np.where(outside, 0, places)] & right) != 0
        if not allowed.all():
            bad = int(places[~allowed][0])
            verb = "store to" if right == _WRITE else "load of"
            raise BadAccess(f"{verb} {self.name_of(bad)}, which is no element that it may touch")
        return places

    def _place(self, storage: torch.UntypedStorage, name: str) -> None:
        content = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        start = len(self.data)
        room = -(-len(content) // _GUARD) * _GUARD + _GUARD
        # As aligned as the real address, up to what any instruction asks for.
        start += storage.data_ptr() % 128
        self.data = np.concatenate([self.data, np.zeros(room + start - len(self.data), np.uint8)])
        self.rights = np.concatenate(
            [self.rights, np.zeros(len(self.data) - len(self.rights), np.uint8)]
        )
        self.data[start : start + len(content)] = content.numpy()
        self._starts[storage.data_ptr()] = (start, content)
        self._names.append((start, name))


class View:
    """Global memory as one block sees it."""

    def __init__(self, memory: Memory, random: np.random.Generator, weak: bool) -> None:
        self._memory, self._random, self._weak = memory, random, weak
        if weak:
            size = len(memory.data)
            self._cached = np.zeros(size, np.bool_)
            self._cache = np.zeros(size, np.uint8)
            self._owner = np.full(size, NOBODY, np.int32)  # of a store that waits
            self._waiting = np.zeros(size, np.uint8)
            self._pending: list[Array] = []  # places of waiting stores, perhaps repeated

    def load(
        self, thread: Array, address: Array, size: int, passes_cache: bool
    ) -> tuple[Array, Array]:
        """(places [n, size] that a store may change, bytes [n, size])"""
        places = self._memory.find(address, size, _READ)
        found = self._memory.data[places]
        if self._weak:
            if not passes_cache:
                # In part old, in part new: lines come and go at any time.
                old = self._cached[places] & (self._random.random(len(places)) < 0.7)[:, None]
                found = np.where(old, self._cache[places], found)
                self._cache[places], self._cached[places] = found, True
            owner = self._owner[places]
            mine = (owner == BLOCK) | (owner == thread[:, None])
            found = np.where(mine, self._waiting[places], found)
        return places, found

    def store(self, thread: Array, address: Array, content: Array) -> Array:
        places = self._memory.find(address, content.shape[1], _WRITE)
        if self._weak:
            self._owner[places] = np.broadcast_to(thread[:, None], places.shape)
            self._waiting[places] = content
            self._pending.append(places.ravel())
        else:
            self._memory.data[places] = content
        return places

    def barrier(self) -> None:
        """What threads have stored is there for their block."""
        if self._weak:
            waiting = self._gather()
            self._owner[waiting] = BLOCK

    def release(self, thread: int) -> None:
        """Send off what this thread stored, and what others stored before its last barrier."""
        if self._weak:
            waiting = self._gather()
            owner = self._owner[waiting]
            self._send(waiting[(owner == thread) | (owner == BLOCK)])

    def acquire(self) -> None:
        if self._weak:
            self._cached[:] = False

    def atomic(self, address: int, size: int, writes: bool) -> Array:
        """The places of an atomic access; it acts on memory, past caches and buffers."""
        right = _WRITE if writes else _READ
        places = self._memory.find(np.array([address], np.uint64), size, right)[0]
        if self._weak:
            self._send(places[self._owner[places] != NOBODY])
            self._cached[places] = False
        return places

    def drain(self, share: float) -> None:
        """Some waiting stores arrive."""
        if self._weak and self._pending:
            waiting = self._gather()
            # Elements of up to four bytes arrive whole.
            words, word_of = np.unique(waiting // 4, return_inverse=True)
            self._send(waiting[(self._random.random(len(words)) < share)[word_of]])

    def _gather(self) -> Array:
        places = np.concatenate([*self._pending, np.zeros(0, np.int64)]).astype(np.int64)
        places = np.unique(places[self._owner[places] != NOBODY])
        self._pending = [places]
        return places

    def _send(self, places: Array) -> None:
        content = self._waiting[places]
        self._memory.data[places] = content
        self._owner[places] = NOBODY
        self._cache[places] = content


def writable(memory: Memory, places: Array) -> Array:
    """Which lanes touch a byte that some tensor lets the kernel write."""
    return (memory.rights[places] & _WRITE).any(axis=1)
