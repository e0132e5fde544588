"""Instructions into steps that run: each a function of the lanes (threads) that take it together.

Steps that only compute or touch memory are done by `run`. Those that decide who goes on where
(bra, ret, bar.sync and what a whole warp does together) have a `control`, and scheduler.py does
the rest.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .faults import Unsupported
from .numbers import SIGNED, UNSIGNED, Array, from_bits, to_bits, width_of
from .opcodes import meaning
from .parser import WIDTHS, Instruction, Program

if TYPE_CHECKING:
    from .scheduler import Block

Lanes = Array | slice


@dataclass
class Frame:
    """Threads of one block that take a step together."""

    block: Block
    lanes: Lanes  # indices of threads; slice(None) for all of them

    @property
    def threads(self) -> Array:
        """Their numbers in the launch."""
        return self.block.threads[self.lanes]

    def only(self, mask: Array) -> Frame:
        """Those of them for which `mask` holds."""
        lanes = np.arange(len(self.block.threads))[self.lanes]
        return Frame(self.block, lanes[np.broadcast_to(mask, lanes.shape)])

    def lane_numbers(self) -> Array:
        return np.arange(len(self.block.threads))[self.lanes]


Read = Callable[[Frame], Array]


@dataclass
class Step:
    text: str
    run: Callable[[Frame], None] | None = None
    guard: Read | None = None  # who takes part
    control: str = ""  # branch, exit, barrier or collective
    target: int = 0  # of a branch


class Decoder:
    """Of one program: gives every register its place in a block's file of registers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.places: dict[str, int] = {}
        self.widths: list[int] = []
        self.steps = [self._step(instruction) for instruction in program.instructions]

    # ---- operands ----

    def place(self, register: str) -> int:
        if register not in self.places:
            self.places[register] = len(self.widths)
            self.widths.append(self.program.width_of(register))
        return self.places[register]

    def reader(self, operand: str, kind: str) -> Read:
        if operand.startswith("%"):
            place = self.place(operand)
            return lambda frame: from_bits(frame.block.registers[place][frame.lanes], kind)
        constant = from_bits(np.array([self._number(operand, kind)], np.uint64), kind)
        return lambda frame: constant

    def writer(self, operand: str, kind: str) -> Callable[[Frame, Array], None]:
        if operand == "_":
            return lambda frame, value: None
        place = self.place(operand)
        width = self.widths[place]

        def write(frame: Frame, value: Array) -> None:
            bits = to_bits(value, kind)
            if kind[0] == "s" and width > width_of(kind):  # a load of a signed byte extends it
                bits = bits.view(SIGNED[width_of(kind)])
            frame.block.registers[place][frame.lanes] = bits.astype(UNSIGNED[width], copy=False)

        return write

    def address(self, operand: str) -> Read:
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if match is None:
            raise Unsupported(f"address {operand}")
        base, offset = self.reader(match[1], "u64"), np.int64(match[2] or 0)
        return lambda frame: (base(frame).view(np.int64) + offset).view(np.uint64)

    def _number(self, operand: str, kind: str) -> int:
        if operand in self.program.shared:
            return self.program.shared[operand]
        if operand in self.program.parameters:
            return self.program.parameters[operand].offset
        if re.match(r"0[fFdD][0-9a-fA-F]{8}", operand):
            return int(operand[2:], 16)
        try:
            return int(operand, 0) & ((1 << max(width_of(kind), 1)) - 1)
        except ValueError:
            raise Unsupported(f"operand {operand}") from None

    @staticmethod
    def _list(operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{} ").split(",")]

    # ---- steps ----

    def _step(self, instruction: Instruction) -> Step:
        try:
            step = self._unguarded(instruction)
        except Unsupported as fault:
            raise Unsupported(f"{fault}, in: {instruction.text}") from None
        if instruction.guard is not None:
            reads = self.reader(instruction.guard, "pred")
            negated = instruction.guard_is_negated
            step.guard = (lambda frame: ~reads(frame)) if negated else reads
        return step

    def _unguarded(self, instruction: Instruction) -> Step:
        opcode, operands, text = instruction.opcode, instruction.operands, instruction.text
        name = opcode[0]
        if name == "bra":
            return Step(text, control="branch", target=self.program.labels[operands[0]])
        if name in ("ret", "exit"):
            return Step(text, control="exit")
        if name in ("bar", "barrier"):
            if opcode not in (("bar", "sync"), ("barrier", "sync")) or operands != ("0",):
                raise Unsupported("a barrier other than number 0 of all threads")
            return Step(text, control="barrier")
        if name in ("shfl", "ldmatrix", "stmatrix"):
            run = self._shuffle if name == "shfl" else self._matrix
            return Step(text, run(opcode, operands), control="collective")
        if name in ("atom", "red", "fence", "membar") or "acquire" in opcode or "release" in opcode:
            return Step(text, self._ordered(opcode, operands))
        if name in ("ld", "st"):
            return Step(text, self._access(opcode, operands))
        if name == "mov" and "{" in operands[0] + operands[1]:
            return Step(text, self._repack(opcode, operands))
        return Step(text, self._computation(opcode, operands))

    def _computation(self, opcode: tuple[str, ...], operands: tuple[str, ...]):
        means = meaning(opcode)
        if len(operands) != 1 + len(means.operands):
            raise Unsupported(f"{len(operands)} operands")
        pairs = zip(operands[1:], means.operands, strict=True)
        reads = [self.reader(operand, kind) for operand, kind in pairs]
        write, function = self.writer(operands[0], means.result), means.function
        return lambda frame: write(frame, function(*[read(frame) for read in reads]))

    def _repack(self, opcode: tuple[str, ...], operands: tuple[str, ...]):
        """mov between one register and several smaller ones."""
        width = width_of(opcode[-1])
        to, source = self._list(operands[0]), self._list(operands[1])
        part = width // max(len(to), len(source))
        shifts = [np.uint64(part * i) for i in range(width // part)]
        if len(to) == 1:
            reads = [self.reader(name, f"u{part}") for name in source]
            write = self.writer(to[0], f"u{width}")

            def join(frame: Frame) -> None:
                value = np.zeros(1, np.uint64)
                for read, shift in zip(reads, shifts, strict=True):
                    value = value | (read(frame).astype(np.uint64) << shift)
                write(frame, value)

            return join
        read = self.reader(source[0], f"u{width}")
        writes = [self.writer(name, f"u{part}") for name in to]

        def split(frame: Frame) -> None:
            value = read(frame).astype(np.uint64)
            for write, shift in zip(writes, shifts, strict=True):
                write(frame, value >> shift)

        return split

    def _access(self, opcode: tuple[str, ...], operands: tuple[str, ...]):
        """ld and st of global and shared memory and of parameters."""
        name, *how, kind = opcode
        count = next((int(step[1:]) for step in how if step in ("v2", "v4")), 1)
        space = next((step for step in how if step in ("global", "shared", "param")), None)
        known = ("global", "shared", "param", "v2", "v4", "cg", "relaxed", "gpu", "sys")
        if space is None or set(how) - set(known) or (name, space) == ("st", "param"):
            raise Unsupported(f"opcode {'.'.join(opcode)}")
        where, registers = operands if name == "st" else operands[::-1]
        address, names = self.address(where), self._list(registers)
        if len(names) != count:
            raise Unsupported(f"{len(names)} registers")
        if "relaxed" in how:
            return self._ordered(opcode, operands)
        size = WIDTHS[kind] // 8
        dtype = UNSIGNED[8 * size]
        # A register pads what is loaded; an f32 may lie in one of 32 bits or of 64.
        bits = f"{'s' if kind[0] == 's' else 'u'}{8 * size}"
        if name == "ld":
            writes = [self.writer(register, bits) for register in names]
            cached = "cg" not in how

            def load(frame: Frame) -> None:
                places = _of_lanes(address(frame), frame)
                content = frame.block.load(space, frame.threads, places, size * count, not cached)
                values = np.ascontiguousarray(content).view(dtype)
                for index, write in enumerate(writes):
                    write(frame, values[:, index])

            return load
        reads = [self.reader(register, bits) for register in names]

        def store(frame: Frame) -> None:
            places = _of_lanes(address(frame), frame)
            values = np.empty((len(places), count), dtype)
            for index, read in enumerate(reads):
                values[:, index] = read(frame).view(dtype)
            frame.block.store(space, frame.threads, places, values.view(np.uint8))

        return store

    def _ordered(self, opcode: tuple[str, ...], operands: tuple[str, ...]):
        """Atomics, and loads and stores that acquire, release or are relaxed; fences."""
        name, kind = opcode[0], opcode[-1]
        if name in ("fence", "membar"):
            if opcode not in (("fence", "acq_rel", "gpu"), ("membar", "gl")):
                raise Unsupported(f"opcode {'.'.join(opcode)}")
            return _one_by_one(lambda frame, thread: frame.block.fence(thread))
        orders = [s for s in opcode if s in ("relaxed", "acquire", "release", "acq_rel")]
        operation = next((s for s in opcode if s in ("add", "inc", "exch")), "")
        scope = "sys" if "sys" in opcode else "gpu"  # the host sees memory as other blocks do
        known = {name, "global", scope, kind, *orders} | ({operation} if operation else set())
        if set(opcode) != known or len(orders) != 1 or width_of(kind) != 32:
            raise Unsupported(f"opcode {'.'.join(opcode)}")
        if (name in ("atom", "red")) != bool(operation):
            raise Unsupported(f"opcode {'.'.join(opcode)}")
        order, gives = orders[0], name in ("ld", "atom")
        address = self.address(operands[1 if gives else 0])
        write = self.writer(operands[0], "u32") if gives else None
        value = self.reader(operands[-1], "u32") if name != "ld" else None
        updates = {
            "": lambda old, given: given,
            "exch": lambda old, given: given,
            "add": lambda old, given: (old + given) % 2**32,
            "inc": lambda old, given: 0 if old >= given else old + 1,
        }

        def access(frame: Frame, thread: int) -> None:
            where = int(_of_lanes(address(frame), frame)[0])
            change = None
            if value is not None:
                given, update = int(value(frame)[0]), updates[operation]
                change = lambda old: update(old, given)  # noqa: E731
            old = frame.block.atomic(thread, where, order, name != "st", change)
            if write is not None:
                write(frame, np.array([old], np.uint32))

        return _one_by_one(access)

    def _shuffle(self, opcode: tuple[str, ...], operands: tuple[str, ...]):
        """A value from another lane. `run` gets one whole warp, and so does _matrix's."""
        if opcode[1] != "sync" or opcode[2] not in ("down", "bfly") or opcode[3] != "b32":
            raise Unsupported(f"opcode {'.'.join(opcode)}")
        value, by = self.reader(operands[1], "u32"), self.reader(operands[2], "u32")
        bound, mask = self.reader(operands[3], "u32"), self.reader(operands[4], "u32")
        register, _, predicate = operands[0].partition("|")
        write = self.writer(register, "u32")
        write_found = self.writer(predicate or "_", "pred")

        def run(frame: Frame) -> None:
            if (bound(frame) != 31).any() or (mask(frame) != 0xFFFFFFFF).any():
                raise Unsupported("a shuffle of part of a warp")
            distances = np.unique(by(frame))
            if len(distances) != 1:
                raise Unsupported("a shuffle by a distance of each lane's own")
            lane, distance = np.arange(32), int(distances[0])
            source = lane + distance if opcode[2] == "down" else lane ^ distance
            found = source < 32
            source = np.where(found, source, lane)  # from beyond the warp: its own
            values = _of_lanes(value(frame), frame)
            write(frame, values[source])
            write_found(frame, found)

        return run

    def _matrix(self, opcode: tuple[str, ...], operands: tuple[str, ...]):
        """ldmatrix and stmatrix: 8 x 8 matrices of 16 bits, a row at an address of its own.

        Lane 8 j + i gives the address of row i of matrix j. Lane i holds elements 2 (i mod 4) and
        one more of row i / 4, or, transposed, of that column.
        """
        name, *how = opcode
        count = {"x1": 1, "x2": 2, "x4": 4}.get(next((s for s in how if s[0] == "x"), ""), 0)
        known = {"sync", "aligned", "m8n8", f"x{count}", "shared", "b16"}
        transposed = "trans" in how
        if set(how) - {"trans"} != known or (name == "stmatrix" and transposed):
            raise Unsupported(f"opcode {'.'.join(opcode)}")
        where, registers = operands if name == "stmatrix" else operands[::-1]
        address, names = self.address(where), self._list(registers)
        lane = np.arange(32)
        row, column = lane // 4, 2 * (lane % 4)

        def rows(frame: Frame, matrix: int) -> Array:
            """The addresses of a matrix's rows."""
            return _of_lanes(address(frame), frame)[8 * matrix : 8 * matrix + 8]

        if name == "ldmatrix":
            writes = [self.writer(register, "u32") for register in names]

            def load(frame: Frame) -> None:
                for matrix, write in enumerate(writes):
                    halves = []
                    for second in (0, 1):
                        r, c = (column + second, row) if transposed else (row, column + second)
                        places = rows(frame, matrix)[r] + (2 * c).astype(np.uint64)
                        content = frame.block.load(
                            "shared", frame.threads, places, 2, passes_cache=False
                        )
                        halves.append(np.ascontiguousarray(content).view(np.uint16)[:, 0])
                    low, high = (half.astype(np.uint32) for half in halves)
                    write(frame, low | (high << np.uint32(16)))

            return load
        reads = [self.reader(register, "u32") for register in names]

        def store(frame: Frame) -> None:
            for matrix, read in enumerate(reads):
                places = rows(frame, matrix)[row] + (2 * column).astype(np.uint64)
                values = np.ascontiguousarray(_of_lanes(read(frame), frame))
                content = values.reshape(-1, 1).view(np.uint8)
                frame.block.store("shared", frame.threads, places, content)

        return store


_DECODED: weakref.WeakKeyDictionary[Program, Decoder] = weakref.WeakKeyDictionary()


def decoded(program: Program) -> Decoder:
    """Once for all launches of a program."""
    if program not in _DECODED:
        _DECODED[program] = Decoder(program)
    return _DECODED[program]


def _of_lanes(value: Array, frame: Frame) -> Array:
    """A constant is the same for every lane."""
    return np.broadcast_to(value, frame.threads.shape)


def _one_by_one(action: Callable[[Frame, int], None]) -> Callable[[Frame], None]:
    """Lanes in random order, each as if alone."""

    def run(frame: Frame) -> None:
        for lane in frame.block.launch.random.permutation(frame.lane_numbers()):
            one = Frame(frame.block, np.array([lane]))
            action(one, int(one.threads[0]))

    return run
