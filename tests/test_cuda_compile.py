"""What nvcc makes of csrc/cuda, read in the machine code: no GPU is needed for that.

Loads of sixteen bytes in the main loops, all of them before the first wait, no spills, no local
memory, no fused multiply-add where bits must equal the reference's, and one acquire-release ticket
where a launch adds up.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sass import (
    ARCHITECTURES,
    FILES,
    ROOT,
    VECTOR,
    Kernel,
    compiled,
    disassembler,
    first_wait,
    nvcc_release,
    table,
)

REDUCTIONS = ("alignment", "probe", "record")
# Numbers of a sample that are read beside its vectors: `newest`, and the weights. fp64 kernels have
# a load for fp32 weights and one for fp64, and may have both for either vector.
NUMBERS = {"combine": 2, "extrapolate": 4}

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or disassembler() is None, reason="no nvcc or no cuobjdump"
)


def of_one_dtype(name: str) -> list[Kernel]:
    """Kernels with vectors; those for a mixture of dtypes read single elements by design."""
    return [kernel for kernel in compiled(name)[0] if kernel.format is not None]


@pytest.mark.parametrize("name", [*FILES, "probe_and_combine"])
def test_every_kernel_compiles_without_spills_and_local_memory(name: str) -> None:
    kernels, said = compiled(name)
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", said)
    assert said.count("0 bytes spill stores") == len(kernels)
    for kernel in kernels:
        assert kernel.count(r"\b(LDL|STL)\b") == 0, kernel.name


@pytest.mark.parametrize("name", FILES)
def test_main_loops_load_and_store_sixteen_bytes(name: str) -> None:
    """What loads vectors loads nothing narrower; sizes do not matter, the tail is apart."""
    for kernel in of_one_dtype(name):
        loads = [text for text in kernel.round if re.search(r"\bLDG\.", text)]
        narrow = [text for text in loads if not re.match(VECTOR, text)]
        assert len(loads) - len(narrow) >= kernel.reads, kernel.name
        numbers = NUMBERS.get(name, 0) * (3 if kernel.format == "fp64" else 1)
        assert len(narrow) <= numbers, (kernel.name, loads)
        assert not any("U16" in text for text in narrow), (kernel.name, loads)
        stores = [text for text in kernel.round if re.search(r"\bSTG\.", text)]
        assert all("STG.E.128" in text for text in stores), (kernel.name, stores)


def vectors_at_once(kernel: Kernel) -> int:
    """Of every tensor, as in csrc/cuda; nvcc does not keep it for combine in fp64."""
    if kernel.operator in REDUCTIONS:
        delta_minus = kernel.operator == "probe" and kernel.flags[1]
        return 1 if delta_minus or kernel.format in ("fp32", "fp64") else 2
    return 1 if (kernel.operator, kernel.format) == ("combine", "fp64") else 2


@pytest.mark.parametrize("name", FILES)
def test_vectors_are_asked_for_before_the_first_is_waited_for(name: str) -> None:
    """Loads that are issued before any instruction touches what one of them loads."""
    for kernel in of_one_dtype(name):
        assert kernel.at_once >= vectors_at_once(kernel) * kernel.reads, (
            kernel.name,
            kernel.architecture,
            kernel.at_once,
        )


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


@pytest.mark.parametrize("name", ["combine", "extrapolate"])
def test_vectors_do_not_wait_for_newest_and_weights(name: str) -> None:
    """A block lives for two vectors a thread: such a wait would double it. Only q_a of extrapolate
    has to wait for `newest`, with a third of the vectors on their way at least. Not fp64's, whose
    weights come through a branch."""
    for kernel in [kernel for kernel in of_one_dtype(name) if kernel.format != "fp64"]:
        code = [*kernel.before, *kernel.blocks[kernel.vectors].code]
        vectors = [index for index, text in enumerate(code) if re.match(VECTOR, text)]
        wait = first_wait(code, r"LDG\.E(?!\.128)")
        asked = sum(index < wait for index in vectors)
        least = len(vectors) if name == "combine" else len(vectors) // 3
        assert asked >= least, (kernel.name, kernel.architecture, asked)


@pytest.mark.parametrize("name", ["combine", "extrapolate"])
def test_no_multiplication_is_fused_with_an_addition(name: str) -> None:
    kernels, _ = compiled(name)
    checked = [kernel for kernel in kernels if kernel.operator == name]
    assert len(checked) == 6 * len(ARCHITECTURES)
    for kernel in checked:
        assert kernel.count(r"\b(FFMA|DFMA|HFMA2)\b(?!.*RZ, RZ)") == 0, kernel.name


def test_the_table_of_instructions_is_what_this_code_has() -> None:
    page = (ROOT / "docs" / "design" / "operators.md").read_text()
    if f"nvcc {nvcc_release()}" not in page:
        pytest.skip("the table is another nvcc's")
    for label, cells in table().items():
        assert f"| {label} | now | {' | '.join(cells)} |" in page


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
