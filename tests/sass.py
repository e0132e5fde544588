"""The machine code that nvcc makes of csrc/cuda, for tests and the table of
docs/design/operators.md.

    python tests/sass.py [SOURCES]    prints the table; SOURCES is a folder like csrc

No GPU is needed. Instructions are counted along the shortest way through a kernel: all samples
active, all tensors aligned, a tile that is full.
"""

from __future__ import annotations

import functools
import heapq
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100")
FILES = ("alignment", "combine", "extrapolate", "probe", "record")
FORMATS = {"I13__nv_bfloat16fE": "bf16", "I6__halffE": "fp16", "IffE": "fp32", "IddE": "fp64"}
VECTOR = r"LDG\.E\.128"
END = -1  # the address behind a kernel


def disassembler() -> str | None:
    """cuobjdump, of the toolkit or inside the Triton package."""
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if inside.exists():
            return str(inside)
    return shutil.which("cuobjdump")


def nvcc_release() -> str:
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]  # type: ignore[index]


@dataclass
class Kernel:
    """One instantiation's machine code on one architecture."""

    name: str
    architecture: str
    registers: int = 0
    code: list[tuple[int, str]] = field(default_factory=list)  # address, instruction

    @property
    def operator(self) -> str:
        """alignment, ..., or finish, which has no vectors."""
        return re.search(r"([a-z]+)_kernelI", self.name)[1]  # type: ignore[index]

    @property
    def format(self) -> str | None:
        """The dtype of all tensors; `None` where they may differ, or hold no elements."""
        found = re.search(r"4Same(I\w+?E)", self.name)
        return FORMATS[found[1]] if found else None

    @property
    def flags(self) -> tuple[bool, ...]:
        """The template's: least squares and input of probe, first of record."""
        return tuple(flag == "1" for flag in re.findall(r"Lb([01])E", self.name))

    @property
    def reads(self) -> int:
        """Tensors that are read by vectors."""
        count = {"alignment": 4, "combine": 3, "extrapolate": 6, "probe": 4, "record": 4}
        more = sum(self.flags) if self.operator == "probe" else -sum(self.flags)
        return count[self.operator] + more

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, instruction)) for _, instruction in self.code)

    @functools.cached_property
    def blocks(self) -> dict[int, Block]:
        """Basic blocks by address."""
        code = [(at, text) for at, text in self.code if text != "NOP"]
        starts = {0}
        for (_, text), (after, _) in zip(code, [*code[1:], (-1, "")], strict=True):
            if leaves(text):
                starts.add(after)
                starts.update(targets(text))
        found: dict[int, Block] = {}
        for at, text in code:
            if at in starts:
                block = found[at] = Block()
            block.code.append(text)
        order = sorted(found)
        for at, after in zip(order, [*order[1:], -1], strict=True):
            last = found[at].code[-1]
            found[at].next = [target for target in targets(last) if target in found]
            if not leaves(last) or goes_on(last):
                found[at].next.append(after)
            if "EXIT" in last:
                found[at].next.append(END)
        return found

    @functools.cached_property
    def vectors(self) -> int:
        """The block that asks for most vectors."""
        return max(
            self.blocks, key=lambda at: sum(bool(re.match(VECTOR, t)) for t in self.blocks[at].code)
        )

    def way(self, start: Iterable[int], end: int | None) -> list[str]:
        """The instructions on the shortest way to a block (without its own), or to the end."""
        queue: list[tuple[int, int, tuple[int, ...]]] = [(0, at, ()) for at in start]
        seen = set()
        while queue:
            length, at, path = heapq.heappop(queue)
            if at == (END if end is None else end):
                return [text for each in path for text in self.blocks[each].code]
            if at in seen or at == END:
                continue
            seen.add(at)
            block = self.blocks[at]
            for after in block.next:
                heapq.heappush(queue, (length + len(block.code), after, (*path, at)))
        raise AssertionError(f"{self.name}: no way to {end}")

    @functools.cached_property
    def before(self) -> list[str]:
        """What a thread executes before the block with the vectors."""
        return self.way([0], self.vectors)

    @functools.cached_property
    def round(self) -> list[str]:
        """What it executes for the vectors of that block: until it comes back, or to its end."""
        block = self.blocks[self.vectors]
        if self.operator in ("combine", "extrapolate"):
            return self.way([self.vectors], None)
        return [*block.code, *self.way(block.next, self.vectors)]

    @property
    def at_once(self) -> int:
        """Vectors that are asked for before the first of them is waited for."""
        loop = self.blocks[self.vectors].code
        return sum(bool(re.match(VECTOR, text)) for text in loop[: first_wait(loop, VECTOR)])

    def per_vector(self) -> float:
        """Instructions for one vector of every tensor, without what comes before."""
        vectors = sum(bool(re.match(VECTOR, text)) for text in self.blocks[self.vectors].code)
        return len(self.round) * self.reads / vectors


@dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    code: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


def operation(text: str) -> str:
    return re.sub(r"^@\S+ ", "", text)


def leaves(text: str) -> bool:
    """Whether an instruction may go elsewhere. Warps that fall apart (BRA.DIV) do not."""
    return bool(re.match(r"(BRA(?!\.DIV)|CALL|EXIT|RET)\b", operation(text)))


def targets(text: str) -> list[int]:
    found = re.search(r"(0x[0-9a-f]+)\s*$", text)
    return [int(found[1], 16)] if leaves(text) and found else []


def goes_on(text: str) -> bool:
    """Whether the instruction behind a branch may be the next one."""
    return text.startswith("@") or bool(re.match(r"(BRA\S*|EXIT) !?U?P\d", text))


def first_wait(code: list[str], loads: str) -> int:
    """Where instructions first touch a register that such a load writes: they wait for it there."""
    pending: set[int] = set()
    for index, text in enumerate(code):
        name, _, operands = operation(text).partition(" ")
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        if pending.intersection(registers):
            return index
        if re.match(loads, name):
            width = 4 if ".128" in name else 2 if ".64" in name else 1
            pending.update(range(registers[0], registers[0] + width))
    return len(code)


def compiled(name: str, sources: Path = ROOT / "csrc") -> tuple[tuple[Kernel, ...], str]:
    """(kernels of cuda/<name>.cu on every architecture, what ptxas said)."""
    return _compiled(name, sources)


@functools.cache
def _compiled(name: str, sources: Path) -> tuple[tuple[Kernel, ...], str]:
    command = ["nvcc", "-std=c++20", "-O3", "--fmad=false", "-DUSE_CUDA", "-Xptxas=-v", "-c"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += [f"-I{sources}", f"-I{sources / 'include'}", "--threads=2"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.o"
        done = subprocess.run(
            [*command, str(sources / "cuda" / f"{name}.cu"), "-o", str(target)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        kernels = disassemble(target)
    used = r"'(\S+)' for 'sm_(\d+)'(?:(?!Compiling)[\s\S])*?Used (\d+) registers"
    registers = {(n, a): int(count) for n, a, count in re.findall(used, done.stderr)}
    for kernel in kernels:
        kernel.registers = registers[kernel.name, kernel.architecture]
    return tuple(kernels), done.stderr


def disassemble(target: Path) -> list[Kernel]:
    tool = disassembler()
    assert tool is not None
    text = subprocess.run([tool, "--dump-sass", target], check=True, capture_output=True, text=True)
    kernels: list[Kernel] = []
    architecture = ""
    for line in text.stdout.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            kernels.append(Kernel(found[1], architecture))
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            kernels[-1].code.append((int(found[1], 16), found[2]))
    return kernels


LABELS = {
    ("probe", (False, False)): "probe",
    ("probe", (True, False)): "probe, least squares",
    ("probe", (False, True)): "probe, delta_minus",
    ("record", (False,)): "record",
    ("alignment", ()): "alignment",
    ("combine", ()): "combine",
    ("extrapolate", ()): "extrapolate",
}


def table(sources: Path = ROOT / "csrc") -> dict[str, list[str]]:
    """Of the bf16 kernels, on each architecture: what one vector of eight elements takes and what
    comes before the first, registers, vectors on their way of those that are asked for."""
    rows: dict[str, list[str]] = {}
    kernels = {
        (k.operator, k.flags, k.architecture): k
        for name in FILES
        for k in compiled(name, sources)[0]
        if k.format == "bf16"
    }
    for (operator, flags), label in LABELS.items():
        rows[label] = []
        for architecture in ARCHITECTURES:
            kernel = kernels[operator, flags, architecture]
            instructions = f"{kernel.per_vector():.0f} + {len(kernel.before)}"
            rows[label].append(f"{instructions}, {kernel.registers}, {kernel.at_once}")
    return rows


if __name__ == "__main__":
    for label, cells in table(*map(Path, sys.argv[1:])).items():
        print(f"| {label} | {' | '.join(cells)} |")
