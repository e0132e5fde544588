"""What nvcc makes of csrc/cuda, read in the machine code: no GPU is needed for that.

Loads of sixteen bytes in the main loops, no spills, no local memory, no fused multiply-add where
bits must equal the reference's, and one acquire-release ticket where a launch adds up.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100")
# Tensors that each kernel reads, and how many vectors of each are on their way at once (16 bits).
READS = {"alignment": 4, "combine": 3, "extrapolate": 6, "probe": 4, "record": 3}
REDUCTIONS = ("alignment", "probe", "record")
# Numbers of a sample that a step reads beside its vectors: `newest`, and the weights, which fp64
# kernels read by one load if they are fp32 and by another if they are fp64.
NUMBERS = {"combine": 1 + 2, "extrapolate": 1 + 2 * 3}


def disassembler() -> str | None:
    """cuobjdump, of the toolkit or inside the Triton package."""
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if inside.exists():
            return str(inside)
    return shutil.which("cuobjdump")


pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or disassembler() is None, reason="no nvcc or no cuobjdump"
)


@dataclass
class Kernel:
    """One instantiation's machine code on one architecture."""

    name: str
    architecture: str
    code: list[tuple[int, str]] = field(default_factory=list)  # address, instruction

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, instruction)) for _, instruction in self.code)

    def loops(self) -> list[list[str]]:
        """The instructions between a backward branch's target and the branch."""
        found = []
        for address, instruction in self.code:
            branch = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", instruction)
            if branch and int(branch[1], 16) < address:
                target = int(branch[1], 16)
                found.append([text for at, text in self.code if target <= at <= address])
        return found


@functools.cache
def compiled(name: str) -> tuple[tuple[Kernel, ...], str]:
    """(kernels of csrc/cuda/<name>.cu on every architecture, what ptxas said)."""
    folder = Path(_FOLDER)
    command = ["nvcc", "-std=c++20", "-O3", "--fmad=false", "-DUSE_CUDA", "-Xptxas=-v", "-c"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", "--threads=2"]
    target = folder / f"{name}.o"
    done = subprocess.run(
        [*command, str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return tuple(disassemble(target)), done.stderr


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
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            kernels[-1].code.append((int(found[1], 16), found[2]))
    return kernels


_FOLDER = ""


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _FOLDER
    _FOLDER = str(tmp_path_factory.mktemp("cubin"))


def vectorised(kernel: Kernel) -> bool:
    """Kernels for tensors of one dtype; `Mixed` reads single elements by design."""
    return "4Same" in kernel.name


@pytest.mark.parametrize("name", [*sorted(READS), "probe_and_combine"])
def test_every_kernel_compiles_without_spills_and_local_memory(name: str) -> None:
    kernels, said = compiled(name)
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", said)
    assert said.count("0 bytes spill stores") == len(kernels)
    for kernel in kernels:
        assert kernel.count(r"\b(LDL|STL)\b") == 0, kernel.name


@pytest.mark.parametrize("name", sorted(READS))
def test_main_loops_load_sixteen_bytes(name: str) -> None:
    """A loop that loads vectors loads nothing narrower; sizes do not matter, the tail is apart."""
    kernels, _ = compiled(name)
    checked = [kernel for kernel in kernels if vectorised(kernel) and "finish" not in kernel.name]
    assert checked
    for kernel in checked:
        wide = [loop for loop in kernel.loops() if any("LDG.E.128" in text for text in loop)]
        assert wide, f"{kernel.name}: no loop with 16-byte loads"
        smallest = min(wide, key=len)
        loads = [text for text in smallest if re.search(r"\bLDG\.", text)]
        narrow = [text for text in loads if "LDG.E.128" not in text]
        assert len(loads) - len(narrow) >= READS[name]
        steps = (len(loads) - len(narrow)) // READS[name]
        assert len(narrow) <= NUMBERS.get(name, 0) * steps, (kernel.name, loads)
        assert not any("U16" in text for text in narrow), (kernel.name, loads)
        stores = [text for text in smallest if re.search(r"\bSTG\.", text)]
        assert all("STG.E.128" in text for text in stores), (kernel.name, stores)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_launch_that_adds_up_takes_one_ticket_with_acquire_and_release(name: str) -> None:
    kernels, _ = compiled(name)
    for kernel in kernels:
        assert kernel.count(r"\bATOMG?\..*INC.*STRONG\.GPU") == 1, kernel.name
        # Release: a barrier of memory before the ticket. Acquire: stale L1 lines are dropped after.
        order = [text for _, text in kernel.code if re.search(r"MEMBAR|ATOMG?\.|CCTL", text)]
        kinds = ["T" if "ATOM" in text else text.split()[0][0] for text in order]
        assert "MT" in "".join(k for k in kinds if k in "MT"), (kernel.name, order)
        assert "C" in kinds[kinds.index("T") :], (kernel.name, order)
        # No other atomics: sums are added in a fixed order.
        assert kernel.count(r"\b(RED|ATOM)") == 1, kernel.name


def main_loop(kernel: Kernel) -> tuple[list[str], list[int]]:
    """The loop that asks for most vectors, and where in it."""
    vectors = lambda loop: [i for i, text in enumerate(loop) if "LDG.E.128" in text]  # noqa: E731
    loop = max(kernel.loops(), key=lambda each: len(vectors(each)))
    return loop, vectors(loop)


def first_wait(loop: list[str], loads: str) -> int:
    """Where a loop first touches a register that such a load writes: it waits for it there."""
    pending: set[int] = set()
    for index, text in enumerate(loop):
        operation, _, operands = re.sub(r"^@\S+ ", "", text).partition(" ")
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        if pending.intersection(registers):
            return index
        if re.match(loads, operation):
            width = 4 if ".128" in operation else 2 if ".64" in operation else 1
            pending.update(range(registers[0], registers[0] + width))
    return len(loop)


def asked_before_use(kernel: Kernel) -> tuple[int, int]:
    """(vectors that are on their way when the first one is waited for, all of the loop)."""
    loop, vectors = main_loop(kernel)
    first = first_wait(loop, r"LDG\.E\.128")
    return sum(at < first for at in vectors), len(vectors)


def is_sixteen_bits(kernel: Kernel) -> bool:
    return "4SameI13__nv_bfloat16" in kernel.name or "4SameI6__half" in kernel.name


@pytest.mark.parametrize("name", REDUCTIONS)
def test_sixteen_bit_kernels_keep_two_vectors_of_every_tensor_on_their_way(name: str) -> None:
    """Where 64 registers hold them: of four tensors. Of five, least squares asks for all before it
    uses one on sm_100 alone, elsewhere for five to seven of ten; delta_minus has one vector each.
    """
    kernels, _ = compiled(name)
    checked = [kernel for kernel in kernels if is_sixteen_bits(kernel)]
    assert checked
    for kernel in checked:
        asked, all_of_them = asked_before_use(kernel)
        kind = re.search(r"ProbePassILb(\d)ELb(\d)E", kernel.name)
        if kind is None or kind.groups() == ("0", "0"):
            assert asked == all_of_them >= 2 * READS[name], (kernel.name, asked)
        elif kind[2] == "1" or kernel.architecture == "100":
            assert asked == all_of_them >= READS[name] + 1, (kernel.name, asked)
        else:
            assert asked >= READS[name] + 1, (kernel.name, asked)


def test_combine_asks_for_its_vectors_before_it_waits_for_anything() -> None:
    """A block lives for two vectors a thread: waiting for gamma or newest first would double it."""
    kernels, _ = compiled("combine")
    for kernel in [k for k in kernels if is_sixteen_bits(k)]:
        loop, vectors = main_loop(kernel)
        assert len(vectors) == 2 * READS["combine"]
        wanted = READS["combine"] + 1 if kernel.architecture == "80" else len(vectors)
        assert sum(at < first_wait(loop, r"LDG") for at in vectors) >= wanted, kernel.name


def test_extrapolate_asks_for_all_its_vectors_before_it_uses_one() -> None:
    """The last of them may wait for `newest`, with half of them on their way."""
    kernels, _ = compiled("extrapolate")
    for kernel in [k for k in kernels if vectorised(k)]:
        loop, vectors = main_loop(kernel)
        assert len(vectors) == READS["extrapolate"]
        assert first_wait(loop, r"LDG\.E\.128") > vectors[-1], kernel.name
        if "4SameIdd" not in kernel.name:
            assert first_wait(loop, r"LDG\.E(?!\.128)") > vectors[2], kernel.name


@pytest.mark.parametrize("name", ["combine", "extrapolate"])
def test_no_multiplication_is_fused_with_an_addition(name: str) -> None:
    kernels, _ = compiled(name)
    checked = [kernel for kernel in kernels if f"{name}_kernel" in kernel.name]
    assert len(checked) == 6 * len(ARCHITECTURES)
    for kernel in checked:
        assert kernel.count(r"\b(FFMA|DFMA|HFMA2)\b(?!.*RZ, RZ)") == 0, kernel.name


def test_the_host_side_compiles_against_this_torch() -> None:
    """csrc/cuda/operators.cpp has no device code; it needs the CUDA headers beside nvcc."""
    from torch.utils.cpp_extension import include_paths

    listed = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    home = re.search(r"_HERE_=(\S+)", listed)
    assert home is not None
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-fvisibility=hidden", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    folders = [ROOT / "csrc", ROOT / "csrc" / "include", *include_paths()]
    folders.append(Path(home[1]).parent / "include")
    command += [f"-I{folder}" for folder in folders]
    source = ROOT / "csrc" / "cuda" / "operators.cpp"
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
