"""What the Triton compiler makes of the kernels, for three GPU generations and without any GPU.

The launchers run on CPU tensors with a recorder in the kernel's place; what they would launch is
compiled, and PTX and SASS are read: 16-byte accesses, no local memory, a publishing ticket, no
fused multiply-add. Kernels are compiled as the launch would specialize them, so a lost alignment
hint or an extra specialized argument shows here.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton_recorder import Recorder  # noqa: E402

from dicache.kernels import alignment, combine, extrapolate, launch, probe, record  # noqa: E402

fused = importlib.import_module("dicache.kernels.probe_and_combine")  # the function has its name

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = [
    pytest.mark.skipif(
        not isinstance(combine._combine_kernel, JITFunction),
        reason="TRITON_INTERPRET is set: there is nothing to compile",
    ),
    pytest.mark.skipif(
        not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")),
        reason="this Triton carries no compiler for NVIDIA",
    ),
]

CAPABILITIES = (80, 90, 100)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# (x, p, y): what the paper's models have, plain ones, and a mixture with wider hidden states.
DTYPES = {
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "fp32": (FP32, FP32, FP32),
    "mixed": (FP32, BF16, BF16),
    "fp64": (FP64, FP64, FP64),
}


class Compiled:
    """PTX, SASS and resources of one kernel."""

    def __init__(self, recorder, capability, folder):
        target = GPUTarget("cuda", capability, 32)
        self.module = triton.compile(recorder.source(), target=target, options=recorder.options)
        self.ptx = self.module.asm["ptx"]
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(self.module.asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", cubin)
        self.registers, self.stack, self.local = (
            int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")
        )
        self.sass = run_tool("nvdisasm", "-c", cubin)


def run_tool(name, *args):
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def make_tensors(dtypes, batch=2, size=3 * 2048 + 37, row=3 * 2048 + 48, offset=0):
    """Tensors [B, size] in rows of `row` elements, `offset` elements behind an aligned address."""

    def draw(dtype, *lead):
        rows = torch.zeros(*lead, batch, row + offset, dtype=dtype)
        return rows[..., offset : offset + size]

    x, p, y = (draw(dtype) for dtype in dtypes)
    return {
        "x": x, "p": p, "y": y, "p_prev": draw(p.dtype), "x_prev": draw(x.dtype),
        "probe_window": draw(p.dtype, 2), "residual_window": draw(y.dtype, 2),
        "newest": torch.zeros(batch, dtype=torch.int32),
        "entry_sums": torch.zeros(batch, 4, dtype=FP64 if FP64 in dtypes else FP32),
        "oldest": draw(y.dtype), "gamma": torch.ones(1).expand(batch),
        "weights": torch.ones(1, 3).expand(batch, 3),
    }  # fmt: skip


def call_probe(tensors, x_prev=None, least_squares=False):
    names = ("x", "p", "p_prev", "probe_window", "newest", "entry_sums")
    x, p, p_prev, *others = (tensors[name] for name in names)
    probe.probe_statistics(x, p, p_prev, x_prev, *others, 1.0, 1.5, least_squares)


def call_alignment(tensors):
    names = ("x", "p", "probe_window", "newest", "entry_sums")
    alignment.alignment_statistics(*(tensors[name] for name in names), 1.0, 1.5)


def call_both(tensors, p_prev=None, x_prev=None, least_squares=False):
    names = ("probe_window", "residual_window", "newest", "entry_sums")
    shared = [tensors[name] for name in names]
    x, p = tensors["x"], tensors["p"]
    fused.probe_and_combine(x, p, p_prev, x_prev, *shared, 1.0, 1.5, least_squares)


def call_combine(tensors):
    names = ("x", "residual_window", "newest", "gamma")
    # Over x where its dtype allows it, so that the output has x's layout.
    out = tensors["x"] if tensors["x"].dtype == tensors["y"].dtype else None
    combine.combine_residuals(*(tensors[name] for name in names), out=out)


def call_extrapolate(tensors):
    names = ("x", "p", "residual_window", "oldest", "probe_window", "newest", "weights")
    out = tensors["x"] if tensors["x"].dtype == tensors["y"].dtype else None
    extrapolate.extrapolate_residuals(*(tensors[name] for name in names), out=out)


def call_record(tensors, first=False):
    names = ("x", "p", "y", "residual_window", "probe_window", "newest", "entry_sums")
    record.record_residuals(*(tensors[name] for name in names), first)


# name: (module, kernel, call, tensors that a block loads, tensors that it stores). x, p and y stand
# for every tensor of their dtype.
KERNELS = {
    "delta_y": (probe, "_probe_kernel", call_probe, "xppp", "p"),
    "delta_minus": (
        probe, "_probe_kernel", lambda t: call_probe(t, x_prev=t["x_prev"]), "xxppp", "xp",
    ),
    "delta_y least squares": (
        probe, "_probe_kernel", lambda t: call_probe(t, least_squares=True), "xpppp", "p",
    ),
    "alignment": (alignment, "_alignment_kernel", call_alignment, "xppp", ""),
    "alignment and combine": (
        fused, "_probe_and_combine_kernel", call_both, "xppp xyy", "",
    ),
    "delta_y and combine": (
        fused, "_probe_and_combine_kernel",
        lambda t: call_both(t, t["p_prev"], least_squares=True), "xpppp xyy", "p",
    ),
    "delta_minus and combine": (
        fused, "_probe_and_combine_kernel",
        lambda t: call_both(t, t["p_prev"], t["x_prev"], True), "xxpppp xyy", "xp",
    ),
    "combine": (combine, "_combine_kernel", call_combine, "xyy", "y"),
    "extrapolate": (extrapolate, "_extrapolate_kernel", call_extrapolate, "xpyyyp", "y"),
    "record": (record, "_record_kernel", call_record, "xppy", "py"),
    "record first": (
        record, "_record_kernel", lambda t: call_record(t, first=True), "xpy", "ppyy",
    ),
}  # fmt: skip
FUSED = [name for name in KERNELS if name.endswith("and combine")]  # y [2, size]: odd addresses
ELEMENTWISE = ("combine", "extrapolate")
TWO = ("delta_y least squares", "delta_y and combine")  # with elements of more than 16 bits
SUMMING = [name for name in KERNELS if name not in ELEMENTWISE]
# Everything on one generation; on the other two the models' dtype, and the widest registers.
CASES = [
    (name, dtypes, 90)
    for name in KERNELS
    for dtypes in DTYPES
    if dtypes != "fp64" and (name not in FUSED or dtypes == "bf16")
]
CASES += [(name, "fp64", 90) for name in ("alignment", *ELEMENTWISE)]
CASES += [(name, "bf16", capability) for name in KERNELS for capability in (80, 100)]
CASES += [
    (name, "fp32", capability)
    for name in ("alignment", "extrapolate", "record")
    for capability in (80, 100)
]
CASES += [(name, "fp32", 100) for name in FUSED]


class Compiler:
    """Compiles each kernel once for all tests of this file."""

    def __init__(self, folder):
        self.folder = folder
        self.done = {}

    def __call__(self, name, dtypes, capability, **layout):
        key = (name, dtypes, capability, *layout.items())
        if key not in self.done:
            self.done[key] = self.compile(KERNELS[name], DTYPES[dtypes], capability, layout)
        return self.done[key]

    def compile(self, kernel, dtypes, capability, layout):
        module, kernel_name, call, *_ = kernel
        recorder = Recorder(getattr(module, kernel_name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(self.folder / "cache"))
            patch.setattr(module, kernel_name, recorder)
            patch.setattr(launch, "has_cooperative_launch", lambda device: True)
            call(make_tensors(dtypes, **layout))
            return Compiled(recorder, capability, self.folder)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("triton"))


def vectors(tensors, dtypes):
    """16-byte accesses a thread for one block of the named tensors."""
    types = dict(zip("xpy", DTYPES[dtypes], strict=True))
    elements = 4 if FP64 in types.values() else 8
    return sum(elements * types[tensor].itemsize // 16 for tensor in tensors.replace(" ", ""))


def wide_accesses(code, instruction):
    return len(re.findall(rf"\b{instruction}\.global\S*\.(?:v4\.b32|v2\.b64) ", code))


@pytest.mark.parametrize(("name", "dtypes", "capability"), CASES)
def test_blocks_are_loaded_and_stored_16_bytes_at_a_time(compiled, name, dtypes, capability):
    """Exactly the main loop's accesses, for a size that is no multiple of 16 and two samples."""
    *_, loads, stores = KERNELS[name]
    kernel = compiled(name, dtypes, capability)
    if name in ELEMENTWISE and dtypes == "mixed":
        stores = ""  # its new output [2, size] has rows at odd addresses
    assert wide_accesses(kernel.ptx, "ld") == vectors(loads, dtypes)
    assert wide_accesses(kernel.ptx, "st") == vectors(stores, dtypes)
    assert len(re.findall(r"\bLDG\.E\.\S*128\b", kernel.sass)) == vectors(loads, dtypes)


@pytest.mark.parametrize(("name", "dtypes", "capability"), CASES)
def test_registers_suffice(compiled, name, dtypes, capability):
    """No spill, and as many programs fit on a multiprocessor as the launch plan expects."""
    kernel = compiled(name, dtypes, capability)
    assert (kernel.stack, kernel.local) == (0, 0)
    assert not re.search(r"\b(STL|LDL)\b", kernel.sass)
    wide = {FP32, FP64} & set(DTYPES[dtypes])
    resident = 2 if "minus" in name or (wide and name in TWO) else 3 if wide else 4
    registers = -(-kernel.registers // 8) * 8  # allocated by eights, from 65536
    assert resident * 32 * launch.NUM_WARPS * registers <= 65536
    if name in SUMMING:
        per_multiprocessor = []
        with pytest.MonkeyPatch.context() as patch:
            ask = lambda device, resident: per_multiprocessor.append(resident) or 64  # noqa: E731
            patch.setattr(launch, "max_programs", ask)
            patch.setattr(launch, "_known", {})
            module, kernel_name, call, *_ = KERNELS[name]
            patch.setattr(launch, "has_cooperative_launch", lambda device: True)
            patch.setattr(module, kernel_name, Recorder(getattr(module, kernel_name)))
            call(make_tensors(DTYPES[dtypes]))
        assert set(per_multiprocessor) == {resident}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", SUMMING)
def test_ticket_publishes_the_partial_sums(compiled, name, capability):
    """All stores, barrier, ticket, barrier, and only then loads, which pass by the first cache."""
    ptx = compiled(name, "bf16", capability).ptx
    ticket = re.search(r"atom\.global\.(gpu\.acq_rel|acq_rel\.gpu)\.add\.\w+", ptx)
    assert ticket, "no ticket with acquire and release for the whole device"
    before, after = ptx[: ticket.start()], ptx[ticket.end() :]
    assert "bar.sync" in before[before.rindex("st.global") :]
    partials = [load.start() for load in re.finditer(r"ld\.global\.cg\.b32", after)]
    assert partials
    assert "bar.sync" in after[: partials[0]]
    assert not re.search(r"ld\.global\.cg", before)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_no_multiply_add_is_fused(compiled, name, dtypes):
    """The reference rounds the product before it adds it."""
    kernel = compiled(name, dtypes, 90)
    assert not re.search(r"\bfma\.", kernel.ptx)
    assert not re.search(r"\b(FFMA|DFMA)\b", kernel.sass)


@pytest.mark.parametrize("name", ["delta_minus", "alignment", "combine", "extrapolate", "record"])
@pytest.mark.parametrize("layout", [{"offset": 1}, {"row": 3 * 2048 + 37}], ids=["start", "rows"])
def test_unaligned_tensors_are_not_taken_for_aligned(compiled, name, layout):
    """A 16-byte access at another address faults."""
    kernel = compiled(name, "bf16", 90, **layout)
    assert wide_accesses(kernel.ptx, "ld") == wide_accesses(kernel.ptx, "st") == 0


def test_one_sample_of_odd_size_is_aligned(compiled):
    """Only the second window entry starts at an odd address then: x, one entry and y do not."""
    kernel = compiled("combine", "bf16", 90, batch=1, row=3 * 2048 + 37)
    assert wide_accesses(kernel.ptx, "ld") == 2
    assert wide_accesses(kernel.ptx, "st") == 1


@pytest.mark.parametrize("name", FUSED)
def test_what_a_fused_launch_fills_in_is_stored_16_bytes_at_a_time(compiled, name):
    kernel = compiled(name, "bf16", 90, size=3 * 2048 + 48)
    *_, stores = KERNELS[name]
    assert wide_accesses(kernel.ptx, "st") == vectors(stores + "y", "bf16")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", FUSED)
def test_a_grid_waits_for_its_last_program(compiled, name, capability):
    """The round is read before the ticket, and counted by a release that the others acquire."""
    kernel = compiled(name, "bf16", capability)
    assert kernel.module.metadata.launch_cooperative_grid
    ptx = kernel.ptx
    ticket = re.search(r"atom\.global\.(gpu\.acq_rel|acq_rel\.gpu)\.add\.\w+", ptx)
    before, after = ptx[: ticket.start()], ptx[ticket.end() :]
    assert re.search(r"(ld|atom)\.\S*relaxed", before)
    opened = re.search(r"(red|atom)\.\S*release", after)
    assert "bar.sync" in after[: opened.start()][after[: opened.start()].rindex("st.global") :]
    assert re.search(r"(ld|atom)\.\S*acquire", after)
