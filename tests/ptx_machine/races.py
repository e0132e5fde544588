"""Which accesses are ordered, and which race: vector clocks.

Every thread counts its time, which goes on at every barrier and release. A thread's vector of what
it has *seen*, the time of every thread of the launch, grows where PTX gives an order: a barrier
joins the threads of a block, and who acquires joins what was released to the same address. A past
access by thread u at u's time c is ordered before thread t if t has seen u's time c, or if t is u.
Two accesses to a byte that are not ordered, at least one of them a store, race, whatever order
they happened in: one run says it for all runs that take the same branches.
"""

from __future__ import annotations

import numpy as np

from .faults import Race
from .numbers import Array


class Clocks:
    """Every thread's time, and what it has seen of the others'."""

    def __init__(self, blocks: int, threads: int) -> None:
        count = blocks * threads
        self.threads = threads
        self.now = np.ones(count, np.int64)
        self._of_block = np.zeros(
            (blocks, count), np.int64
        )  # what all threads of a block have seen
        self._of_thread: dict[int, Array] = {}  # of those that acquired since their last barrier
        self._released: dict[int, Array] = {}  # address -> what a reader acquires
        self._before_fence: dict[int, Array] = {}  # thread -> what it read, but did not acquire
        self._behind_fence: dict[int, Array] = {}  # thread -> what its later stores release

    def members(self, block: int) -> slice:
        return slice(block * self.threads, (block + 1) * self.threads)

    def seen(self, thread: int) -> Array:
        shared = self._of_block[thread // self.threads]
        return self._of_thread.get(thread, shared)

    def ordered(self, block: int, thread: Array, other: Array, when: Array) -> Array:
        """Whether `other`'s access at its time `when` lies before what `thread` of `block` does."""
        result = (when <= self._of_block[block][other]) | (other == thread)
        if self._of_thread:
            for special, seen in self._of_thread.items():
                mine = thread == special
                result |= mine & (when <= seen[other])
        return result

    def barrier(self, block: int) -> None:
        members = self.members(block)
        seen = self._of_block[block]
        for thread in range(members.start, members.stop):
            if thread in self._of_thread:
                np.maximum(seen, self._of_thread.pop(thread), out=seen)
        seen[members] = self.now[members]
        self.now[members] += 1

    def atomic(self, thread: int, address: int, order: str, reads: bool, writes: bool) -> None:
        """An atomic access at `address`, as C++ has it: relaxed ones order only with a fence."""
        incoming = self._released.get(address) if reads else None
        if incoming is not None:
            if order in ("acquire", "acq_rel"):
                self._learn(thread, incoming)
            else:
                known = self._before_fence.get(thread, incoming)
                self._before_fence[thread] = np.maximum(known, incoming)
        if writes:
            if order in ("release", "acq_rel"):
                outgoing = self._all_of(thread)
            else:
                outgoing = self._behind_fence.get(thread)
            # A read-modify-write hands on what it found; a plain store ends that chain.
            if outgoing is None or incoming is None:
                outgoing = incoming if outgoing is None else outgoing
            else:
                outgoing = np.maximum(outgoing, incoming)
            if outgoing is None:
                self._released.pop(address, None)
            else:
                self._released[address] = outgoing
            self.now[thread] += 1

    def fence(self, thread: int) -> None:
        if thread in self._before_fence:
            self._learn(thread, self._before_fence.pop(thread))
        self._behind_fence[thread] = self._all_of(thread)
        self.now[thread] += 1

    def _learn(self, thread: int, seen: Array) -> None:
        self._of_thread[thread] = np.maximum(self.seen(thread), seen)

    def _all_of(self, thread: int) -> Array:
        seen = self.seen(thread).copy()
        seen[thread] = self.now[thread]
        return seen


class Shadow:
    """For every byte of a memory: who stored and who loaded it last, and when.

    Of loads there may be several that nothing orders. The first is kept in place; where there are
    more, a row of the times of all threads.
    """

    def __init__(self, size: int, clocks: Clocks, name_of, forgive_equal: bool = False) -> None:
        self._clocks = clocks
        self._name_of = name_of
        self._forgive_equal = forgive_equal
        self._writer = np.zeros(size, np.int32)
        self._written = np.zeros(size, np.int64)  # 0: never
        self._reader = np.zeros(size, np.int32)
        self._read = np.zeros(size, np.int64)
        self._row = np.full(size, -1, np.int32)
        self._rows = np.zeros((0, len(clocks.now)), np.int64)
        self._atomics: dict[int, dict[int, int]] = {}  # byte -> thread -> time of an atomic store

    def load(self, block: int, thread: Array, where: Array) -> None:
        """`thread` [n] of a block loads the bytes `where` [n, k]."""
        who = thread[:, None]
        self._check(block, who, where, self._writer, self._written, "load", "store")
        self._check_atomics(block, who, where, "load")
        first = self._clocks.ordered(block, who, self._reader[where], self._read[where])
        first &= self._row[where] < 0
        now = np.broadcast_to(self._clocks.now[who], where.shape)
        who = np.broadcast_to(who, where.shape)
        more = ~first
        if more.any():
            self._add_rows(np.unique(where[more]))
            self._rows[self._row[where[more]], who[more]] = now[more]
        self._reader[where[first]] = who[first]
        self._read[where[first]] = now[first]
        # Lanes of one instruction that load the same byte: those that were not kept.
        lost = first & (self._reader[where] != who)
        if lost.any():
            self._add_rows(np.unique(where[lost]))
            self._rows[self._row[where[lost]], who[lost]] = now[lost]

    def store(self, block: int, thread: Array, where: Array, same: Array | None = None) -> None:
        """`thread` [n] stores to `where` [n, k]; `same` [n, k]: the byte has this value already."""
        who = thread[:, None]
        forgiven = same if self._forgive_equal else None
        self._check(block, who, where, self._writer, self._written, "store", "store", forgiven)
        self._check(block, who, where, self._reader, self._read, "store", "load")
        self._check_atomics(block, who, where, "store")
        self._check_rows(block, who, where)
        all_who = np.broadcast_to(who, where.shape)
        self._writer[where] = all_who
        self._written[where] = self._clocks.now[all_who]
        self._read[where] = 0
        self._row[where] = -1
        if self._atomics:
            for byte in np.intersect1d(where, list(self._atomics)):
                del self._atomics[int(byte)]

    def fail_in_one_instruction(self, byte: int) -> None:
        raise Race(f"two lanes of one instruction store to {self._name_of(byte)}")

    def clashes(self, thread: Array, where: Array) -> Array:
        """Which bytes other lanes of the same instruction have stored, too."""
        return self._writer[where] != thread[:, None]

    def atomic(self, block: int, thread: int, where: Array, writes: bool) -> None:
        """An atomic access: it races with plain ones, not with other atomics."""
        one = np.array([thread])
        self._check(block, one, where[None], self._writer, self._written, "atomic access", "store")
        if writes:
            self._check(block, one, where[None], self._reader, self._read, "atomic store", "load")
            self._check_rows(block, one, where[None])
            for byte in where:
                self._atomics.setdefault(int(byte), {})[thread] = int(self._clocks.now[thread])

    def _check(self, block, who, where, others, times, what, before, forgiven=None) -> None:
        other, when = others[where], times[where]
        bad = (when > 0) & ~self._clocks.ordered(block, who, other, when)
        if forgiven is not None:
            bad &= ~forgiven
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            self._raise(np.broadcast_to(who, where.shape)[at], where[at], other[at], what, before)

    def _check_rows(self, block: int, who: Array, where: Array) -> None:
        rows, who = self._row[where], np.broadcast_to(who, where.shape)
        for lane, column in np.argwhere(rows >= 0):
            thread = int(who[lane, column])
            late = self._rows[rows[lane, column]] > self._clocks.seen(thread)
            late[thread] = False
            if late.any():
                self._raise(thread, where[lane, column], int(np.argmax(late)), "store", "load")

    def _check_atomics(self, block: int, who: Array, where: Array, what: str) -> None:
        if not self._atomics:
            return
        who = np.broadcast_to(who, where.shape)
        for lane, column in np.argwhere(np.isin(where, list(self._atomics))):
            thread, byte = int(who[lane, column]), int(where[lane, column])
            for other, when in self._atomics[byte].items():
                if other != thread and when > self._clocks.seen(thread)[other]:
                    self._raise(thread, byte, other, what, "atomic store")

    def _add_rows(self, bytes_: Array) -> None:
        new = bytes_[self._row[bytes_] < 0]
        if not len(new):
            return
        rows = np.zeros((len(new), len(self._clocks.now)), np.int64)
        rows[np.arange(len(new)), self._reader[new]] = self._read[new]
        self._row[new] = np.arange(len(self._rows), len(self._rows) + len(new))
        self._rows = np.concatenate([self._rows, rows])

    def _raise(self, thread, byte, other, what: str, before: str) -> None:
        me, them = (divmod(int(t), self._clocks.threads) for t in (thread, other))
        raise Race(
            f"{what} of {self._name_of(int(byte))} by thread {me[1]} of block {me[0]}, "
            f"and a {before} by thread {them[1]} of block {them[0]}: nothing orders them"
        )
