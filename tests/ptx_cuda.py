"""The operators of csrc/cuda by the PTX that nvcc makes of them, executed by tests/ptx_machine.

`Cuda` has the functions of `dicache.ops`. It takes the host's place: structs as in
csrc/include/dicache/arguments.h (a wrong size is refused), the grid from `dicache._build_info`,
and the instantiation that `with_format` would choose.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import Structure, c_bool, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ptx_machine
import torch
from torch import Tensor

from dicache.ops import Results

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)
FILES = ("alignment", "combine", "extrapolate", "probe", "probe_and_combine", "record")
MULTIPROCESSORS = 2  # 8 blocks: enough for the last one to have work
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # as `enum class DType`
FORMATS = ("4SameI13__nv_bfloat16fE", "4SameI6__halffE", "4SameIffE", "4SameIddE")
MIXED_FORMATS = ("5MixedIfE", "5MixedIdE")
STATISTICS = (5, 7, 6)  # columns of each, as `enum class Statistics`
PASSES = [f"NS0_9ProbePassILb{s}ELb{m}EEE" for s in (0, 1) for m in (0, 1)]
# Template arguments behind the format.
ARGUMENTS = {
    "probe": PASSES,
    "probe_and_combine": [*PASSES, "NS0_13AlignmentPassE"],
    "record": ["Lb0E", "Lb1E"],
}


def why_not() -> str | None:
    if shutil.which("nvcc") is None:
        return "no nvcc"
    try:
        import dicache._build_info  # noqa: F401
    except ImportError:
        return "the installation compiled nothing"
    return None


def compiled(file: str, architecture: int, source: Path = ROOT / "csrc") -> str:
    """The PTX of cuda/<file>.cu. ptxas has no part in it, so this takes seconds."""
    return _compiled(file, architecture, source)


@functools.cache
def _compiled(file: str, architecture: int, source: Path) -> str:
    command = ["nvcc", "-std=c++20", "-O3", "--fmad=false", "-DUSE_CUDA", "-ptx"]
    command += [f"-arch=compute_{architecture}", f"-I{source}", f"-I{source / 'include'}"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.ptx"
        command += [str(source / "cuda" / f"{file}.cu"), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target.read_text()


def instantiations(file: str) -> list[str]:
    """Patterns of the names of all kernels in a file, from the templates' arguments."""
    formats = FORMATS if file == "probe_and_combine" else FORMATS + MIXED_FORMATS
    names = [
        f"{file}_kernelINS0_{kind}E{argument}E"
        for kind in formats
        for argument in ARGUMENTS.get(file, [""])
    ]
    if file == "combine":
        names += [f"finish_kernelI{kind}{_statistics(n)}E" for kind in "fd" for n in (5, 6, 7)]
    return names


def _statistics(columns: int) -> str:
    """The template's argument, as it is mangled."""
    return f"LNS_10StatisticsE{STATISTICS.index(columns)}E"


class _Tokens(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("dtype", c_int32)]


class _Window(Structure):
    _fields_ = [("data", c_void_p), ("entry_stride", c_int64), ("batch_stride", c_int64)]
    _fields_ += [("dtype", c_int32)]


class _Samples(Structure):
    _fields_ = [("batch", c_int64), ("size", c_int64), ("is_wide", c_bool)]
    _fields_ += [("newest", c_void_p), ("active", c_void_p)]


class _EntrySums(Structure):
    _fields_ = [("data", c_void_p), ("is_wide", c_bool)]


class _Weights(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("is_wide", c_bool)]


class _Rule(Structure):
    _fields_ = [("low", c_double), ("high", c_double)]
    _fields_ += [("least_squares", c_bool), ("relative_to_probe", c_bool)]


class _Mailbox(Structure):
    _fields_ = [("data", c_void_p), ("serial", c_int32)]
    _fields_ += [("promise", c_void_p), ("promise_bytes", c_int64)]


class _Probe(Structure):
    _fields_ = [("samples", _Samples), ("x", _Tokens), ("p", _Tokens), ("p_prev", _Tokens)]
    _fields_ += [("x_prev", _Tokens), ("with_input", c_bool), ("q", _Window)]
    _fields_ += [("entry_sums", _EntrySums), ("rule", _Rule)]
    _fields_ += [("sums", c_void_p), ("result", c_void_p), ("mailbox", _Mailbox)]


class _Alignment(Structure):
    _fields_ = [("samples", _Samples), ("x", _Tokens), ("p", _Tokens), ("q", _Window)]
    _fields_ += [("entry_sums", _EntrySums), ("rule", _Rule)]
    _fields_ += [("sums", c_void_p), ("result", c_void_p), ("mailbox", _Mailbox)]


class _Finish(Structure):
    _fields_ = [("batch", c_int64), ("kind", c_int32), ("is_wide", c_bool), ("rule", _Rule)]
    _fields_ += [("sums", c_void_p), ("result", c_void_p)]


class _Combine(Structure):
    _fields_ = [("samples", _Samples), ("x", _Tokens), ("r", _Window), ("y", _Tokens)]
    _fields_ += [("gamma", _Weights), ("fills", c_bool)]


class _Extrapolate(Structure):
    _fields_ = [("samples", _Samples), ("x", _Tokens), ("p", _Tokens), ("r", _Window)]
    _fields_ += [("r_c", _Tokens), ("q", _Window), ("y", _Tokens), ("weights", _Weights)]
    _fields_ += [("fills", c_bool)]


class _Record(Structure):
    _fields_ = [("samples", _Samples), ("x", _Tokens), ("p", _Tokens), ("y", _Tokens)]
    _fields_ += [("r", _Window), ("q", _Window), ("entry_sums", _EntrySums), ("first", c_bool)]


@dataclass
class Cuda:
    """The operators on one architecture, scheduled by one seed."""

    architecture: int
    seed: int
    resident: int = 4
    weak: bool = True
    change: Callable[[str], str] = str  # for mutants
    watch: Callable[[ptx_machine.Memory], None] | None = None
    source: Path = ROOT / "csrc"
    launched: list[str] = field(default_factory=list)

    def probe_statistics(
        self, x, p, p_prev, x_prev, window, newest, entry_sums, low, high,
        least_squares=False, active=None, workspace=None, out=None,
    ):  # fmt: skip
        call = _Call(self, x, newest, active, wide=_wide(x, p))
        out = call.results(7 if x_prev is not None else 5, out)
        arguments = call.probe(
            x, p, p_prev, x_prev, window, entry_sums, low, high, least_squares, out
        )
        kind = f"INS0_{_format(x, p)}E{_pass(p_prev, x_prev, least_squares)}E"
        call.reduce("probe", kind, "probe_statistics", [bytes(arguments)])
        return out.sums, out.result

    def alignment_statistics(
        self, x, p, window, newest, entry_sums, low, high, relative_to_probe=False, active=None,
        workspace=None, out=None,
    ):  # fmt: skip
        call = _Call(self, x, newest, active, wide=_wide(x, p))
        out = call.results(6, out)
        arguments = call.alignment(x, p, window, entry_sums, low, high, relative_to_probe, out)
        kind = f"INS0_{_format(x, p)}EE"
        call.reduce("alignment", kind, "alignment_statistics", [bytes(arguments)])
        return out.sums, out.result

    def probe_and_combine(
        self, x, p, p_prev, x_prev, probe_window, residual_window, newest, entry_sums, low, high,
        least_squares=False, relative_to_probe=False, by_sample=False, active=None, workspace=None,
        out=None,
    ):  # fmt: skip
        call = _Call(self, x, newest, active, wide=_wide(x, p))
        rule = (probe_window, entry_sums, low, high)
        if p_prev is None:
            out = call.results(6, out)
            statistics = call.alignment(x, p, *rule, relative_to_probe, out)
        else:
            out = call.results(7 if x_prev is not None else 5, out)
            statistics = call.probe(x, p, p_prev, x_prev, *rule, least_squares, out)
        y = torch.full(x.shape, -7.0, dtype=residual_window.dtype)
        first = 1 if by_sample else 2 * call.batch + 1
        combination = _Combine(
            call.samples(), call.tokens("x", x), call.window("r", residual_window),
            call.tokens("y", y, True),
            _Weights(
                call.pointer("result", out.result, True) + first * out.result.element_size(),
                2 if by_sample else 0, call.wide,
            ),
            True,
        )  # fmt: skip
        kind = f"INS0_{_format(x, p, residual_window)}E{_pass(p_prev, x_prev, least_squares)}E"
        given = [bytes(statistics), bytes(combination)]
        call.reduce("probe_and_combine", kind, "probe_statistics", given, together=True)
        return out.sums, out.result, y

    def finish_probe_statistics(self, sums, low, high):
        return self._finish(sums, _Rule(low, high, False, False))

    def finish_alignment_statistics(self, sums, low, high, relative_to_probe=False):
        return self._finish(sums, _Rule(low, high, True, relative_to_probe))

    def _finish(self, sums, rule):
        batch, columns = sums.shape
        call = _Call(self, sums, None, None, wide=_wide(sums))
        result = torch.full((batch + 1, 2), -7.0, dtype=sums.dtype)
        arguments = _Finish(
            batch, STATISTICS.index(columns), _wide(sums), rule,
            call.pointer("sums", sums), call.pointer("result", result, True),
        )  # fmt: skip
        kernel = f"finish_kernelI{'d' if _wide(sums) else 'f'}{_statistics(columns)}E"
        call.launch("combine", kernel, [bytes(arguments)], (1,), 1)
        return result

    def combine_residuals(self, x, window, newest, gamma, active=None, out=None):
        call = _Call(self, x, newest, active, wide=_wide(x, window))
        y = torch.full(x.shape, -7.0, dtype=window.dtype) if out is None else out
        arguments = _Combine(
            call.samples(), call.tokens("x", x), call.window("r", window),
            call.tokens("y", y, True), call.weights("gamma", gamma), out is None,
        )  # fmt: skip
        call.elementwise("combine", _format(x, window), "combine_residuals", arguments)
        return y

    def extrapolate_residuals(
        self, x, p, window, oldest, probe_window, newest, weights, active=None, out=None
    ):
        call = _Call(self, x, newest, active, wide=_wide(x, p, window))
        y = torch.full(x.shape, -7.0, dtype=window.dtype) if out is None else out
        arguments = _Extrapolate(
            call.samples(), call.tokens("x", x), call.tokens("p", p), call.window("r", window),
            call.tokens("oldest", oldest), call.window("q", probe_window),
            call.tokens("y", y, True), call.weights("weights", weights), out is None,
        )  # fmt: skip
        call.elementwise("extrapolate", _format(x, p, window), "extrapolate_residuals", arguments)
        return y

    def record_residuals(
        self, x, p, y, window, probe_window, newest, entry_sums, first, active=None
    ):
        call = _Call(self, x, newest, active, wide=_wide(x, p, y), turns=True)
        arguments = _Record(
            call.samples(), call.tokens("x", x), call.tokens("p", p), call.tokens("y", y),
            call.window("r", window, True), call.window("q", probe_window, True),
            call.entry_sums(entry_sums, True), first,
        )  # fmt: skip
        flag = f"Lb{int(first)}E"
        kind = f"INS0_{_format(x, p, y)}E{flag}E"
        call.reduce("record", kind, "record_residuals", [bytes(arguments)])


class _Call:
    """One call: its memory, its structs and its launch."""

    def __init__(self, cuda, x, newest, active, wide, turns=False) -> None:
        self.cuda, self.wide = cuda, wide
        self.batch = x.shape[0]
        self.size = x.numel() // max(self.batch, 1)
        self.newest, self.active, self.turns = newest, active, turns
        self.memory = ptx_machine.Memory()

    def pointer(self, name: str, tensor: Tensor | None, writes: bool = False) -> int:
        return self.memory.pointer(tensor, writes, name)

    def samples(self) -> _Samples:
        newest = self.pointer("newest", self.newest, self.turns)
        active = self.pointer("active", self.active)
        return _Samples(self.batch, self.size, self.wide, newest, active)

    def tokens(self, name: str, tensor: Tensor, writes: bool = False) -> _Tokens:
        dtype = DTYPES.index(tensor.dtype)
        return _Tokens(self.pointer(name, tensor, writes), tensor.stride(0), dtype)

    def window(self, name: str, tensor: Tensor, writes: bool = False) -> _Window:
        where = self.pointer(name, tensor, writes)
        return _Window(where, tensor.stride(0), tensor.stride(1), DTYPES.index(tensor.dtype))

    def entry_sums(self, tensor: Tensor, writes: bool = False) -> _EntrySums:
        return _EntrySums(self.pointer("entry_sums", tensor, writes), _wide(tensor))

    def weights(self, name: str, tensor: Tensor) -> _Weights:
        return _Weights(self.pointer(name, tensor), tensor.stride(0), _wide(tensor))

    def results(self, columns: int, out: Results | None) -> Results:
        if out is not None:
            return out
        dtype = torch.float64 if self.wide else torch.float32
        sums = torch.full((self.batch, columns), -7.0, dtype=dtype)
        return Results(sums, torch.full((self.batch + 1, 2), -7.0, dtype=dtype))

    def out(self, out: Results) -> tuple[int, int, _Mailbox]:
        promise = out.promise
        mailbox = _Mailbox(
            self.pointer("mailbox", out.mailbox, True), out.serial,
            self.pointer("promise", promise), 0 if promise is None else promise.element_size(),
        )  # fmt: skip
        sums, result = (
            self.pointer("sums", out.sums, True),
            self.pointer("result", out.result, True),
        )
        return sums, result, mailbox

    def probe(
        self, x, p, p_prev, x_prev, window, entry_sums, low, high, least_squares, out
    ) -> _Probe:
        empty = _Tokens(None, 0, DTYPES.index(torch.float32))
        return _Probe(
            self.samples(), self.tokens("x", x), self.tokens("p", p),
            self.tokens("p_prev", p_prev, True),
            empty if x_prev is None else self.tokens("x_prev", x_prev, True), x_prev is not None,
            self.window("q", window), self.entry_sums(entry_sums),
            _Rule(low, high, least_squares, False), *self.out(out),
        )  # fmt: skip

    def alignment(self, x, p, window, entry_sums, low, high, relative_to_probe, out) -> _Alignment:
        return _Alignment(
            self.samples(), self.tokens("x", x), self.tokens("p", p), self.window("q", window),
            self.entry_sums(entry_sums), _Rule(low, high, True, relative_to_probe), *self.out(out),
        )  # fmt: skip

    def plan(self, operator: str) -> Any:
        from dicache import _build_info

        return _build_info.launch_plan(operator, self.batch, self.size, MULTIPROCESSORS)

    def reduce(
        self, file: str, kind: str, operator: str, given: list, together: bool = False
    ) -> None:
        """`together`: all blocks are resident, as in a cooperative launch."""
        plan = self.plan(operator)
        # Partial sums that nobody wrote are NaN, and the count of rounds is any number; the ticket
        # alone is zero before and after.
        workspace = torch.full((plan["workspace_bytes"],), 0xFF, dtype=torch.uint8)
        workspace[:4] = 0
        given = [*given, plan["blocks"] // self.batch]
        given.append(self.pointer("workspace", workspace, True))
        resident = plan["blocks"] if together else None
        name = f"{file}_kernel{kind}"
        self.launch(file, name, given, (plan["blocks"],), plan["threads"], resident)
        assert not workspace[:4].any(), "the ticket is not zero behind the launch"

    def elementwise(self, file: str, kind: str, operator: str, arguments: Structure) -> None:
        plan = self.plan(operator)
        grid = (plan["blocks"] // self.batch, self.batch)
        self.launch(file, f"{file}_kernelINS0_{kind}EE", [bytes(arguments)], grid, plan["threads"])

    def launch(
        self,
        file: str,
        name: str,
        given: list,
        grid: tuple[int, ...],
        threads: int,
        resident: int | None = None,
    ) -> None:
        cuda = self.cuda
        program = _program(file, name, cuda.architecture, cuda.change, cuda.source)
        cuda.launched.append(program.name)
        options = {"resident": resident or cuda.resident, "weak": cuda.weak, "watch": cuda.watch}
        ptx_machine.launch(program, self.memory, given, grid, threads, cuda.seed, **options)
        self.memory.copy_back()


@functools.cache
def _program(file, name, architecture, change, source) -> ptx_machine.Program:
    return ptx_machine.parse(change(compiled(file, architecture, source)), re.escape(name))


def _pass(p_prev: Tensor | None, x_prev: Tensor | None, least_squares: bool) -> str:
    """The template's argument for what is added up."""
    if p_prev is None:
        return "NS0_13AlignmentPassE"
    return PASSES[2 * least_squares + (x_prev is not None)]


def _wide(*tensors: Tensor) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _format(first: Tensor, *others: Tensor) -> str:
    if any(other.dtype != first.dtype for other in others):
        return MIXED_FORMATS[_wide(first, *others)]
    return FORMATS[DTYPES.index(first.dtype)]
