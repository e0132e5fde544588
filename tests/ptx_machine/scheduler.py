"""Who runs next: threads, warps and blocks interleave at random.

A step is taken by a random set of threads that stand at the same instruction: a whole block, a
warp, or a single thread. They go on for a random number of instructions and are then left where
they are. So a warp's threads need not stay together (as on GPUs since Volta), any warp may be
ahead of any other, and blocks start in random order, a few of them at a time. numpy computes a
set's lanes at once, which is what makes whole launches affordable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .decode import Frame, Step, decoded
from .faults import BadAccess, Deadlock, Fault, Misaligned
from .memory import Memory, View, writable
from .numbers import UNSIGNED, Array
from .parser import Program
from .races import Clocks, Shadow

WARP = 32
RUNNING, AT_BARRIER, IN_WARP, ENDED = range(4)
_MANY = 1000  # not for ever: they may be waiting for others in a loop


class Launch:
    """One launch of one kernel."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        arguments: Sequence[int | float | bytes],
        grid: tuple[int, ...],
        threads: int,
        seed: int,
        resident: int = 4,
        weak: bool = True,
        finds_races: bool = True,
        watch: Callable[[Memory], None] | None = None,
        most_steps: int = 300_000,
    ) -> None:
        """`arguments` are the parameters in order: numbers, or the bytes of a struct.

        `resident` blocks are there at the same time, `weak` is described in memory.py, and without
        `finds_races` a race is let pass, so that a test can see what it does. `watch` looks at
        memory while the launch runs, as a host does. A launch that takes more than `most_steps`
        is taken to wait for what does not come.
        """
        self.most_steps = most_steps
        self.watch = watch
        self.decoder = decoded(program)
        self.program, self.memory, self.weak = program, memory, weak
        self.grid = (*grid, 1, 1)[:3]
        self.size = threads
        self.random = np.random.default_rng(seed)
        self.parameters = _packed(program, arguments)
        self.clocks = Clocks(int(np.prod(self.grid)), threads)
        self.shadow = Shadow(len(memory.data), self.clocks, memory.name_of) if finds_races else None
        self.resident = resident
        self.steps = 0  # instructions, whatever the number of lanes that took each together

    def run(self) -> Launch:
        waiting = list(self.random.permutation(int(np.prod(self.grid))))
        live: list[Block] = []
        ended: list[Block] = []
        with np.errstate(all="ignore"):  # infinities and NaN are numbers like others here
            while waiting or live:
                while waiting and len(live) < self.resident:
                    live.append(Block(self, int(waiting.pop())))
                able = [block for block in live if block.can_run()]
                if not able:
                    raise Deadlock("; ".join(block.where() for block in live))
                for block in live:
                    block.asleep = max(0, block.asleep - 1)
                awake = [block for block in able if not block.asleep] or able
                block = awake[self.random.integers(len(awake))]
                block.advance()
                if self.steps > self.most_steps:
                    raise Deadlock(f"still running after {self.steps} instructions")
                if self.watch is not None:
                    self.watch(self.memory)
                if block.has_ended():
                    live.remove(block)
                    ended.append(block)
                if self.random.random() < 0.3:
                    some = (live + ended)[self.random.integers(len(live) + len(ended))]
                    some.view.drain(self.random.choice([0.1, 0.5, 1.0]))
            for block in self.random.permutation(np.array(ended, object)):
                block.view.drain(1.0)
            if self.watch is not None:
                self.watch(self.memory)
        return self


def launch(*arguments, **options) -> Launch:
    """Run a kernel over its whole grid: the arguments of `Launch`."""
    return Launch(*arguments, **options).run()


def _packed(program: Program, arguments: Sequence[int | float | bytes]) -> Array:
    """The parameters as they lie in the constant bank."""
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{len(arguments)} arguments for {len(program.parameters)} parameters")
    packed = np.zeros(program.parameter_bytes, np.uint8)
    for value, parameter in zip(arguments, program.parameters.values(), strict=True):
        if isinstance(value, float):
            value = np.array([value], f"<f{parameter.size}").tobytes()
        elif not isinstance(value, bytes):
            value = (int(value) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
        if len(value) != parameter.size:
            raise ValueError(f"{len(value)} bytes for a parameter of {parameter.size}")
        packed[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(
            value, np.uint8
        )
    return packed


class Block:
    """The threads of one block: where each of them is, its registers, and shared memory."""

    def __init__(self, launch: Launch, index: int) -> None:
        self.launch, self.index = launch, index
        size, random = launch.size, launch.random
        self.threads = np.arange(size) + index * size
        self.position = np.zeros(size, np.int64)
        self.state = np.full(size, RUNNING)
        self.asleep = 0  # turns that it lets pass
        self._found: dict[int, tuple[int, int]] = {}  # thread -> its last atomic access
        # Registers hold anything before they are written, and so does shared memory.
        self.registers = [
            random.integers(0, 2, size).astype(np.bool_)
            if width == 1
            else random.integers(0, 1 << 63, size, np.uint64).astype(UNSIGNED[width])
            for width in launch.decoder.widths
        ]
        for register, value in self._special().items():
            if register in launch.decoder.places:
                self.registers[launch.decoder.places[register]][:] = value
        self.shared = random.integers(0, 256, launch.program.shared_bytes, np.uint8)
        self.shared_shadow = (
            Shadow(len(self.shared), launch.clocks, _shared_name, forgive_equal=True)
            if launch.shadow is not None
            else None
        )
        self.view = View(launch.memory, random, launch.weak)

    def _special(self) -> dict[str, Array | int]:
        x, y, _ = self.launch.grid
        index = (self.index % x, self.index // x % y, self.index // (x * y))
        values: dict[str, Array | int] = {"%tid.x": np.arange(self.launch.size)}
        values |= {"%tid.y": 0, "%tid.z": 0}
        values |= {"%ntid.x": self.launch.size, "%ntid.y": 1, "%ntid.z": 1}
        for axis, at, count in zip("xyz", index, self.launch.grid, strict=True):
            values |= {f"%ctaid.{axis}": at, f"%nctaid.{axis}": count}
        return values

    # ---- who goes on ----

    def can_run(self) -> bool:
        return bool((self.state == RUNNING).any())

    def has_ended(self) -> bool:
        return bool((self.state == ENDED).all())

    def where(self) -> str:
        names = {
            AT_BARRIER: "wait at a barrier",
            IN_WARP: "wait for their warp",
            ENDED: "have ended",
        }
        counts = [f"{(self.state == s).sum()} threads {what}" for s, what in names.items()]
        return f"block {self.index}: {', '.join(counts)}"

    def advance(self) -> None:
        """A random set of threads takes a random number of steps."""
        random = self.launch.random
        able = np.flatnonzero(self.state == RUNNING)
        one = able[random.integers(len(able))]
        lanes = able[self.position[able] == self.position[one]]
        how_many = random.random()
        if how_many < 0.3:
            lanes = lanes[lanes // WARP == one // WARP]
        if how_many < 0.1:
            lanes = lanes[random.random(len(lanes)) < 0.5]
            lanes = np.union1d(lanes, [one])
        self._walk(lanes, int(random.choice([1, 10, 100, _MANY], p=[0.1, 0.2, 0.3, 0.4])))

    def _walk(self, lanes: Array, budget: int) -> None:
        at = int(self.position[lanes[0]])
        steps = self.launch.decoder.steps
        frame = self._frame(lanes)
        while budget > 0:
            if at >= len(steps):
                raise Fault("threads run past the kernel's last instruction")
            budget -= 1
            self.launch.steps += 1
            step = steps[at]
            if not step.control:
                taking = frame
                if step.guard is not None:
                    taking = frame.only(step.guard(frame))
                if len(taking.threads):
                    self._take(step, taking)
                at += 1
                continue
            self.position[lanes] = at
            lanes = self._turn(step, frame, lanes, at)
            if not len(lanes) or self.asleep:
                return
            at, frame = int(self.position[lanes[0]]), self._frame(lanes)
        self.position[lanes] = at

    def _take(self, step: Step, frame: Frame) -> None:
        assert step.run is not None
        try:
            step.run(frame)
        except Fault as fault:
            fault.args = (f"{fault}\n  at: {step.text}\n  in: {self.launch.program.name}",)
            raise

    def _frame(self, lanes: Array) -> Frame:
        return Frame(self, slice(None) if len(lanes) == len(self.threads) else lanes)

    def _turn(self, step: Step, frame: Frame, lanes: Array, at: int) -> Array:
        """A branch, an exit or a wait: which of these threads go on together."""
        takes = np.ones(len(lanes), np.bool_)
        if step.guard is not None:
            takes = np.broadcast_to(step.guard(frame), takes.shape)
        taking, passing = lanes[takes], lanes[~takes]
        self.position[passing] = at + 1
        if step.control == "branch":
            self.position[taking] = step.target
            if len(taking) and len(passing):
                return taking if self.launch.random.random() < 0.5 else passing
            return lanes
        if step.control == "exit":
            self.state[taking] = ENDED
            return passing
        if step.guard is not None:
            raise Fault(f"only some threads wait: {step.text}")
        if step.control == "barrier":
            self.state[lanes] = AT_BARRIER
            self._barrier()
        else:
            self.state[lanes] = IN_WARP
            self._collective(step, np.unique(lanes // WARP), at)
        return lanes[:0]

    def _barrier(self) -> None:
        if (self.state == AT_BARRIER).any() and (self.state == ENDED).any():
            if ((self.state == AT_BARRIER) | (self.state == ENDED)).all():
                raise Deadlock(f"{self.where()}: a barrier is for all threads of a block")
        if not (self.state == AT_BARRIER).all():
            return
        for start in range(0, len(self.threads), WARP):
            if len(np.unique(self.position[start : start + WARP])) != 1:
                raise Fault(f"threads of one warp of block {self.index} are at different barriers")
        self.view.barrier()
        self.launch.clocks.barrier(self.index)
        self.state[:] = RUNNING
        self.position += 1

    def _collective(self, step: Step, warps: Array, at: int) -> None:
        """Done when all threads of a warp are there; it orders no memory."""
        for warp in warps:
            members = slice(warp * WARP, (warp + 1) * WARP)
            here = (self.state[members] == IN_WARP) & (self.position[members] == at)
            if here.sum() == WARP:
                self._take(step, Frame(self, np.arange(warp * WARP, (warp + 1) * WARP)))
                self.state[members] = RUNNING
                self.position[members] = at + 1

    # ---- memory ----

    def load(
        self, space: str, thread: Array, address: Array, size: int, passes_cache: bool
    ) -> Array:
        """The bytes [lanes, size] at these addresses."""
        if space == "param":
            return self.launch.parameters[
                _within(address, size, self.launch.parameters, "parameters")
            ]
        if space == "shared":
            places = _within(address, size, self.shared, "shared memory")
            if self.shared_shadow is not None:
                self.shared_shadow.load(self.index, thread, places)
            return self.shared[places]
        places, content = self.view.load(thread, address, size, passes_cache)
        shadow = self.launch.shadow
        if shadow is not None:
            # What nobody may write cannot race.
            lanes = writable(self.launch.memory, places)
            if lanes.any():
                shadow.load(self.index, thread[lanes], places[lanes])
        return content

    def store(self, space: str, thread: Array, address: Array, content: Array) -> None:
        if space == "shared":
            places = _within(address, content.shape[1], self.shared, "shared memory")
            same = self.shared[places] == content
            shadow = self.shared_shadow
            self.shared[places] = content
            # Lanes that store different values to one byte in one instruction.
            clash = self.shared[places] != content
        else:
            places = self.view.store(thread, address, content)
            shadow, same = self.launch.shadow, np.zeros(places.shape, np.bool_)
            clash = None
        if shadow is None:
            return
        shadow.store(self.index, thread, places, same)
        if clash is None:
            clash = shadow.clashes(thread, places)
        if clash.any():
            shadow.fail_in_one_instruction(int(places[clash][0]))

    def atomic(self, thread: int, address: int, order: str, reads: bool, change) -> int:
        """Old value of 32 bits at `address`; `change` gives the new one, if there is any."""
        writes = change is not None
        if order in ("release", "acq_rel"):
            self.view.release(thread)
        places = self.view.atomic(address, 4, writes)
        old = int(self.launch.memory.data[places].copy().view(np.uint32)[0])
        if writes:
            new = np.array([change(old)], np.uint32)
            self.launch.memory.data[places] = new.view(np.uint8)
        if order in ("acquire", "acq_rel"):
            self.view.acquire()
        if self.launch.shadow is not None:
            self.launch.shadow.atomic(self.index, thread, places, writes)
        self.launch.clocks.atomic(thread, address, order, reads, writes)
        self._doze(thread, address, old, change)
        return old

    def _doze(self, thread: int, address: int, found: int, change) -> None:
        """A thread that finds the same again and changes nothing waits for another block: let the
        others go on for a while."""
        is_idle = change is None or change(found) == found
        if is_idle and self._found.get(thread) == (address, found):
            self.asleep = int(self.launch.random.integers(2, 60))
        self._found[thread] = (address, found)

    def fence(self, thread: int) -> None:
        self.view.release(thread)
        self.view.acquire()
        self.launch.clocks.fence(thread)


def _within(address: Array, size: int, memory: Array, name: str) -> Array:
    places = address.astype(np.int64)[:, None] + np.arange(size)
    if (places < 0).any() or (places >= len(memory)).any():
        raise BadAccess(f"{size} bytes outside of the {len(memory)} bytes of {name}")
    if name != "parameters" and (address % np.uint64(size)).any():
        raise Misaligned(f"{size} bytes of {name} at an address that is no multiple of it")
    return places


def _shared_name(place: int) -> str:
    return f"byte {place} of shared memory"
