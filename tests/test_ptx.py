"""The kernels' compiled code, executed: the PTX of nvcc and of Triton against the C++ bodies.

tests/ptx_machine runs it with random schedules, weak memory and a search for races. `make test`
takes some instantiations, each for one architecture; `make fuzz` all of them for all three, with
calls that are new in every run. What this can show is in docs/design/ptx_machine.md.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import ptx_calls
import ptx_cuda
import ptx_machine
import pytest
import torch
from fuzzing import FACTOR, draws
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ptx_cuda import ARCHITECTURES, FILES, Cuda
from ptx_machine import BadAccess, Fault, Race, kernels
from test_ptx_machine import COMPARISONS, OPCODES, group_of

from dicache import ops
from dicache.sparse_videogen import layout, masks

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DRAWS = settings(
    draws(1),
    max_examples=max(1, FACTOR // 4),
    phases=[Phase.generate],  # a seed has no simpler one
    suppress_health_check=list(HealthCheck),
)
SEEDS = st.integers(0, 2**32)
in_fuzz = pytest.mark.hypothesis  # `make fuzz` runs what has this mark

cuda = pytest.mark.skipif(ptx_cuda.why_not() is not None, reason=str(ptx_cuda.why_not()))
triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed"
)


# ---- CUDA ----

FORMATS = {"bf16": (BF16,), "fp16": (FP16,), "fp32": (FP32,), "fp64": (FP64,)}
FORMATS |= {"mixed": (BF16, FP16, FP32), "mixed fp64": (BF16, FP16, FP32, FP64)}
FLAGS = {
    "probe": ("least_squares", "minus"),
    "probe_and_combine": ("published", "least_squares", "minus"),
    "record": ("first",),
}
# Which tensors' dtypes choose the instantiation.
CHOOSE = {"probe": "xp", "alignment": "xp", "combine": "xy", "extrapolate": "xpy", "record": "xpy"}
CHOOSE |= {"probe_and_combine": "xpy"}

# (operator, format, flags): every instantiation that nvcc makes but those of `finish`.
INSTANTIATIONS = [
    (operator, kind, flags)
    for operator in FILES
    for kind in FORMATS
    for flags in itertools.product((False, True), repeat=len(FLAGS.get(operator, ())))
    if operator != "probe_and_combine"
    or ("mixed" not in kind and (flags[0] or flags == (False, False, False)))
]
SOME = [
    ("alignment", "bf16", ()),
    ("alignment", "mixed fp64", ()),
    ("combine", "fp16", ()),
    ("combine", "bf16", ()),
    ("extrapolate", "bf16", ()),
    ("extrapolate", "mixed", ()),
    ("probe", "bf16", (True, True)),
    ("probe", "fp32", (False, False)),
    ("probe", "mixed", (False, True)),
    ("probe_and_combine", "bf16", (False, False, False)),
    ("probe_and_combine", "fp32", (True, False, True)),
    ("record", "bf16", (False,)),
    ("record", "fp16", (True,)),
    ("record", "fp64", (False,)),
]
# One architecture a file where there is time for one only.
ONE = dict(zip(FILES, (100, 80, 90, 80, 90, 90), strict=True))
CUDA = [(*i, a) for i in INSTANTIATIONS for a in ARCHITECTURES]
CUDA = CUDA if FACTOR else [(*i, ONE[i[0]]) for i in SOME]


def draw_dtypes(rng: random.Random, kind: str, which: str) -> tuple[torch.dtype, ...]:
    """Of x, p and y, so that those named by `which` give this format."""
    while True:
        drawn = {name: rng.choice(FORMATS[kind]) for name in "xpy"}
        chosen = {drawn[name] for name in which}
        mixed = len(chosen) > 1
        if mixed == ("mixed" in kind) and (FP64 in chosen) == ("fp64" in kind):
            # The others are not looked at, but an operator's own rules may be.
            return drawn["x"], drawn["p"], drawn["y"]


@cuda
@pytest.mark.parametrize(("operator", "kind", "flags", "architecture"), CUDA)
@DRAWS
@given(seed=SEEDS)
def test_cuda(operator: str, kind: str, flags: tuple, architecture: int, seed: int) -> None:
    """Stored elements have the C++ bodies' bits, and two schedules give the same sums."""
    rng = random.Random(f"{operator} {kind} {flags} {architecture} {seed}")
    fixed = dict(zip(FLAGS.get(operator, ()), flags, strict=True))
    call = ptx_calls.draw(rng, operator, draw_dtypes(rng, kind, CHOOSE[operator]), **fixed)
    found = [
        call.make(Cuda(architecture, rng.randrange(2**32), rng.choice([1, 3, 8]), weak))
        for weak in (True, rng.random() < 0.5)[: 1 if "out" in ptx_calls.WRITTEN[operator] else 2]
    ]
    ptx_calls.assert_equal(found[0], call.make(ops), ops)
    ptx_calls.assert_same_bits(found[0], found[-1])
    if operator == "probe_and_combine":
        in_two = call.make(ptx_calls.InTwo(Cuda(architecture, rng.randrange(2**32))))
        ptx_calls.assert_same_bits(found[0], in_two)


@in_fuzz
@cuda
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("columns", [5, 6, 7])
def test_cuda_finish(dtype: torch.dtype, columns: int) -> None:
    """(error, gamma) of sums that were added up over GPUs: the C++ body's bits."""
    for architecture in ARCHITECTURES if FACTOR else [ONE["combine"]]:
        sums = torch.rand(3, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
        sums[1, 3] = 0.0
        name = "alignment" if columns == 6 else "probe"
        finish = f"finish_{name}_statistics"
        found = getattr(Cuda(architecture, 0), finish)(sums, 0.25, 1.5)
        assert ptx_calls.equal_bits(found, getattr(ops, finish)(sums, 0.25, 1.5))


@cuda
@pytest.mark.parametrize("file", FILES)
def test_every_instantiation_is_in_the_list(file: str) -> None:
    """A kernel that nvcc makes and nobody executes would show here."""
    names = kernels(ptx_cuda.compiled(file, ONE[file]))
    patterns = ptx_cuda.instantiations(file)
    assert len(names) == len(patterns)
    for pattern in patterns:
        assert sum(pattern in name for name in names) == 1, pattern
    listed = [i for i in INSTANTIATIONS if i[0] == file]
    assert len(listed) == sum("finish" not in pattern for pattern in patterns)


OTHERS = {"atom", "bar", "bra", "ld", "ldmatrix", "red", "ret", "shfl", "st", "stmatrix"}


def opcodes_of(ptx: str) -> set[str]:
    code = re.sub(r"//[^\n]*", "", ptx[ptx.index(".entry") :])
    return set(re.findall(r"(?m)^[\s{]*(?:@!?%p\d+\s+)?([a-z]\w*(?:\.[\w:]+)+)\s", code))


def assert_worked_out(ptx: str) -> None:
    known = {group_of(opcode) for opcode, *_ in [*OPCODES, *COMPARISONS]}
    for opcode in opcodes_of(ptx):
        name = opcode.split(".")[0]
        if name in OTHERS or name in ("selp", "mov") or opcode.endswith(".pred"):
            continue  # they have tests of their own
        assert group_of(opcode) in known, f"{opcode} has no line in tests/test_ptx_machine.py"


@in_fuzz
@cuda
@pytest.mark.parametrize("file", FILES)
def test_every_opcode_was_worked_out_by_hand(file: str) -> None:
    """tests/test_ptx_machine.py has a line for each kind of it."""
    for architecture in ARCHITECTURES if FACTOR else [ONE[file]]:
        assert_worked_out(ptx_cuda.compiled(file, architecture))


# ---- Triton ----

# (operator, options, dtypes of x, p and y, capability)
TRITON = [
    ("alignment", {}, (BF16, BF16, BF16), 100),
    ("combine", {}, (FP16, FP16, FP16), 80),
    ("extrapolate", {}, (BF16, FP32, BF16), 90),
    ("probe", {"minus": False, "least_squares": True}, (BF16, BF16, BF16), 90),
    ("probe", {"minus": True, "least_squares": False}, (FP32, BF16, BF16), 80),
    ("probe_and_combine", {"published": False}, (BF16, BF16, BF16), 90),
    ("probe_and_combine", {"published": True, "minus": True}, (BF16, FP32, FP16), 100),
    ("record", {"first": False}, (BF16, BF16, BF16), 80),
    ("record", {"first": True}, (FP32, FP32, FP32), 100),
]
MIXTURES = [(FP16,) * 3, (FP32,) * 3, (FP64,) * 3, (FP32, BF16, BF16), (BF16, FP32, FP16)]
if FACTOR:
    kept = [(operator, options) for operator, options, *_ in TRITON]
    kept += [("probe", {"minus": m, "least_squares": s}) for m in (0, 1) for s in (0, 1)]
    kept += [("probe_and_combine", {"published": True, "minus": False})]
    TRITON = [
        (operator, options, dtypes, capability)
        for operator, options in kept
        for dtypes in [(BF16,) * 3, *MIXTURES]
        for capability in ARCHITECTURES
    ]


@triton
@pytest.mark.parametrize(("operator", "options", "dtypes", "capability"), TRITON)
@DRAWS
@given(seed=SEEDS)
def test_triton(operator: str, options: dict, dtypes: tuple, capability: int, seed: int) -> None:
    """Stored elements have the C++ bodies' bits, sums are theirs to rounding."""
    from dicache import kernels

    ptx_triton = importlib_triton()
    rng = random.Random(f"{operator} {options} {dtypes} {capability} {seed}")
    call = ptx_calls.draw(rng, operator, dtypes, **options)
    chosen = ptx_triton.Settings(
        capability, rng.randrange(2**32), rng.choice([1, 3, 8]), rng.random() < 0.8
    )
    in_two = None
    with ptx_triton.on_machine(chosen, rng.choice([2, 6])):
        found = call.make(kernels)
        if operator == "probe_and_combine" and (FACTOR or not options["published"]):
            in_two = call.make(ptx_calls.InTwo(kernels))
    ptx_calls.assert_equal(found, call.make(ops), ops)
    if in_two is not None:
        ptx_calls.assert_same_bits(found, in_two)


def importlib_triton():
    """Imported where it is used: it needs the package triton."""
    import ptx_triton

    return ptx_triton


@in_fuzz
@triton
@pytest.mark.parametrize("columns", [5, 6, 7])
def test_triton_finish(columns: int) -> None:
    from dicache import kernels

    ptx_triton = importlib_triton()
    sums = torch.rand(3, columns, generator=torch.Generator().manual_seed(columns))
    sums[1, 3] = 0.0
    finish = f"finish_{'alignment' if columns == 6 else 'probe'}_statistics"
    expected = getattr(ops, finish)(sums, 0.25, 1.5)
    for capability in ARCHITECTURES if FACTOR else [90]:
        with ptx_triton.on_machine(ptx_triton.Settings(capability, columns)):
            found = getattr(kernels, finish)(sums, 0.25, 1.5)
        assert ptx_calls.equal_bits(found[:-1], expected[:-1])
        torch.testing.assert_close(found[-1], expected[-1], rtol=1e-6, atol=1e-6)


@in_fuzz
@triton
@pytest.mark.parametrize(("width", "dtype"), [(16, BF16), (12, FP32)])
def test_triton_moves_tokens(width: int, dtype: torch.dtype) -> None:
    """The layout kernel of Sparse VideoGen: a grid of two axes, blocks of four warps."""
    import dicache.kernels.layout as kernel

    ptx_triton = importlib_triton()
    generator = torch.Generator().manual_seed(width)
    joined = torch.randn(2, 70, 3 * 2 * width, generator=generator).to(dtype)
    q, k, v = (each.unflatten(2, (2, width)) for each in joined.chunk(3, dim=-1))
    k = k.contiguous()
    temporal = torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8)
    order, _ = masks.token_major(6, 8, 8, 70)
    expected = layout.permute_qkv(q, k, v, temporal, order)
    for capability in ARCHITECTURES if FACTOR else [90]:
        with ptx_triton.on_machine(ptx_triton.Settings(capability, 5)):
            found = kernel.permute_qkv(q, k, v, temporal, order)
        for moved, right in zip(found, expected, strict=True):
            assert torch.equal(moved, right)


@in_fuzz
@triton
def test_every_opcode_of_triton_was_worked_out_by_hand() -> None:
    """Of what the tests above have compiled."""
    for text, _ in importlib_triton()._COMPILED.values():
        assert_worked_out(text)


@triton
@pytest.mark.parametrize("reason", ["too many blocks in cooperative launch", "misaligned address"])
def test_triton_makes_two_launches_where_one_is_refused(reason: str, monkeypatch) -> None:
    """Of a part of a GPU, say; what else goes wrong is told."""
    from dicache import kernels
    from dicache.kernels import launch

    kernel = importlib.import_module("dicache.kernels.probe_and_combine")
    run, asked = launch.run, []

    def refusing(which, *arguments):
        asked.append(which)
        if which is kernel._probe_and_combine_kernel:
            raise RuntimeError(f"Triton Error [CUDA]: {reason}")
        run(which, *arguments)

    ptx_triton = importlib_triton()
    call = plain_call("probe_and_combine", 61, published=False)
    monkeypatch.setattr(kernel, "_refused", set())
    monkeypatch.setattr(launch, "run", refusing)
    with ptx_triton.on_machine(ptx_triton.Settings(90, 1)):
        if "cooperative" not in reason:
            with pytest.raises(RuntimeError, match=reason):
                call.make(kernels)
            return
        for _ in range(2):
            ptx_calls.assert_equal(call.make(kernels), call.make(ops), ops)
    assert len(asked) == 5  # it is asked for once


# ---- mutants: a fault in the compiled code is found ----


def wrong(call: ptx_calls.Call, functions, seeds: int = 3) -> type[BaseException] | None:
    """How the call by `functions(seed)` was found to be wrong, in one of some schedules."""
    for seed in range(seeds):
        try:
            found = call.make(functions(seed))
            ptx_calls.assert_equal(found, call.make(ops), ops)
        except (Fault, AssertionError) as fault:
            return type(fault)
    return None


def plain_call(operator: str, size: int = 4133, batch: int = 2, **options) -> ptx_calls.Call:
    """Two samples in bf16 and several blocks, with a last one that is not full."""
    call = ptx_calls.draw(random.Random(1), operator, (BF16, BF16, BF16))
    call.case.batch, call.case.shape, call.case.active = batch, (size,), None
    call.case.layouts = {}
    call.scale, call.special = 1.0, 0.0
    defaults = {"first": False, "parked": False, "out": "new", "minus": False}
    call.options |= {"relative_to_probe": False, "wide_sums": False, **defaults, **options}
    return call


RECORD = "record_kernelINS0_4SameI13__nv_bfloat16fEELb0EEE"
ALIGNMENT = "alignment_kernelINS0_4SameI13__nv_bfloat16fEEEE"
FUSED = "probe_and_combine_kernelINS0_4SameI13__nv_bfloat16fEENS0_13AlignmentPassEEE"
FILLED = 5  # the barrier between a mailbox's content and its serial


def entry(kernel: str, ptx: str) -> str:
    """The text of one kernel."""
    start = re.search(rf"\.entry \S*{re.escape(kernel)}\S*\(", ptx).end()
    return ptx[start : ptx.find(".entry", start)]


def change_all(kernel: str, pattern: str, to: str, ptx: str) -> str:
    """`ptx` with all occurrences of a pattern in one kernel replaced."""
    text = entry(kernel, ptx)
    return ptx.replace(text, re.sub(pattern, to, text))


def change_one(kernel: str, pattern: str, to: str, which: int, ptx: str) -> str:
    """`ptx` with one occurrence of a pattern in one kernel replaced."""
    text = entry(kernel, ptx)
    start = ptx.index(text)
    found = list(re.finditer(pattern, text))[which]
    return ptx[: start + found.start()] + to + ptx[start + found.end() :]


class Host:
    """Who reads the mailbox as soon as it sees the serial, while the launch still runs."""

    def __init__(self) -> None:
        self.read: np.ndarray | None = None
        self.last: np.ndarray | None = None

    def __call__(self, memory: ptx_machine.Memory) -> None:
        self.last = memory.seen("mailbox").copy()
        if self.read is None and self.last[:4].view(np.int32)[0] == 9:
            self.read = self.last

    def was_told_the_truth(self) -> bool:
        assert self.read is not None and self.last is not None
        return bool((self.read == self.last).all())


# A launch that adds up has four barriers: before thread 0 adds the warps, behind the ticket, and
# two where the last block takes eight samples at once; of nine, one is left for a second time. Two
# more are there for a mailbox, and one where a grid waits for itself.
BARRIERS = {"record": (RECORD, 4), "probe_and_combine": (FUSED, 7)}
WHICH = [(name, which) for name, (_, n) in BARRIERS.items() for which in (None, *range(n))]


@cuda
@pytest.mark.parametrize(("operator", "which"), WHICH)
def test_a_missing_barrier_is_found(operator: str, which: int | None) -> None:
    kernel, count = BARRIERS[operator]
    barriers = re.findall(r"bar\.sync", entry(kernel, ptx_cuda.compiled(operator, 90)))
    assert len(barriers) == count
    change = str
    if which is not None:
        change = functools.partial(change_one, kernel, r"bar\.sync\s+0;", "", which)
    call, host = plain_call(operator, 61, batch=9, published=False), Host()
    watch = host if operator == "probe_and_combine" else None
    found = wrong(call, lambda seed: Cuda(90, seed, change=change, watch=watch))
    if which == FILLED and operator == "probe_and_combine":
        assert found is None and not host.was_told_the_truth()
    else:
        assert found is (None if which is None else Race)
        assert watch is None or which is not None or host.was_told_the_truth()


# (what is there in the machine code, what is put there)
WEAKER = {
    "the round is let go without a release": (r"st\.release\.gpu", "st.relaxed.gpu", Race),
    "the round is seen without an acquire": (r"ld\.acquire\.gpu", "ld.relaxed.gpu", Race),
    "the ticket takes nothing over": (r"inc\.acq_rel", "inc.relaxed", Race),
}


@cuda
@pytest.mark.parametrize("name", WEAKER)
def test_a_grid_that_waits_in_too_weak_an_order_is_found(name: str) -> None:
    pattern, put, expected = WEAKER[name]
    change = functools.partial(change_all, FUSED, pattern, put)
    call = plain_call("probe_and_combine", 4133, published=False)
    assert wrong(call, lambda seed: Cuda(90, seed, change=change)) is expected


@cuda
@pytest.mark.parametrize("order", ["release", "relaxed"])
def test_a_letter_that_is_sealed_in_too_weak_an_order_is_found(order: str) -> None:
    change = functools.partial(change_one, ALIGNMENT, r"st\.release\.sys", f"st.{order}.sys", 0)
    x, p, window = torch.randn(2, 61), torch.randn(2, 61), torch.randn(2, 2, 61)
    x, p, window = x.bfloat16(), p.bfloat16(), window.bfloat16()
    given = (torch.zeros(2, dtype=torch.int32), torch.ones(2, 4), 0.0, 2.0)
    told = []
    for seed in range(6):
        host, out = Host(), ops.make_results(x, p, 6)._replace(serial=9)
        cuda = Cuda(90, seed, change=change, watch=host)
        cuda.alignment_statistics(x, p, window, *given, out=out)
        told.append(host.was_told_the_truth())
    assert all(told) == (order == "release")


@cuda
@pytest.mark.parametrize("file", ["alignment", "probe", "probe_and_combine"])
def test_a_letter_is_sealed_for_the_host(file: str) -> None:
    """The machine has one memory; on a GPU a release for the device is none for the host."""
    for name in kernels(ptx_cuda.compiled(file, ONE[file])):
        sealed = re.findall(r"st\.release\.(\w+)", entry(name, ptx_cuda.compiled(file, ONE[file])))
        assert sealed == (["sys", "gpu"] if file == "probe_and_combine" else ["sys"])


@cuda
@pytest.mark.parametrize("order", ["relaxed", "acquire", "release"])
def test_a_ticket_of_too_weak_an_order_is_found(order: str) -> None:
    change = functools.partial(change_one, RECORD, r"inc\.acq_rel", f"inc.{order}", 0)
    call = plain_call("record")
    assert wrong(call, lambda seed: Cuda(90, seed, change=change)) is Race


@cuda
def test_a_block_that_takes_itself_for_the_last_one_too_early_is_found() -> None:
    """It adds up rows that other blocks are still storing."""
    change = functools.partial(change_one, RECORD, r"inc\.acq_rel", "add.acq_rel", 0)
    call = plain_call("record")
    assert wrong(call, lambda seed: Cuda(90, seed, change=change)) is Race


# (operator, file under csrc, what is there, what is put there, how it shows)
SOURCES = {
    "a bound one too far": (
        "extrapolate",
        "cuda/vector.cuh",
        "index < tile.count; index += kGpuThreads",
        "index <= tile.count; index += kGpuThreads",
        BadAccess,
    ),
    "another column for gamma": (
        "alignment",
        "include/dicache/elements.h",
        "row[3] = entry_sums[kDD];",
        "row[3] = entry_sums[kAbsD];",
        AssertionError,
    ),
}


@cuda
@pytest.mark.parametrize("name", SOURCES)
def test_a_mutant_of_the_source_is_found(name: str, tmp_path: Path) -> None:
    operator, file, there, put, expected = SOURCES[name]
    source = tmp_path / "csrc"
    shutil.copytree(ptx_cuda.ROOT / "csrc", source)
    text = (source / file).read_text()
    assert there in text
    (source / file).write_text(text.replace(there, put))
    found = wrong(plain_call(operator, 61), lambda seed: Cuda(90, seed, source=source))
    assert found is expected


class OnMachine:
    """`dicache.kernels` by the machine, for `wrong`."""

    def __init__(self, seed: int, change=str, watch=None) -> None:
        self.settings = importlib_triton().Settings(80, seed, change=change, watch=watch)

    def __getattr__(self, name: str):
        from dicache import kernels

        def call(*arguments):
            with importlib_triton().on_machine(self.settings):
                return getattr(kernels, name)(*arguments)

        return call


def without_a_barrier_before_the_ticket(ptx: str) -> str:
    """That of `is_last`, and the one that Triton may put there by itself."""
    ticket = ptx.index("atom.global")
    stored = ptx.rindex("st.global", 0, ticket)
    return ptx[:stored] + ptx[stored:ticket].replace("bar.sync", "//") + ptx[ticket:]


def with_a_relaxed_ticket(ptx: str) -> str:
    return re.sub(r"(atom\.\S*)acq_rel", r"\1relaxed", ptx)


@triton
@pytest.mark.parametrize(
    ("change", "expected"),
    [(str, None), (without_a_barrier_before_the_ticket, Race), (with_a_relaxed_ticket, Race)],
)
def test_a_mutant_of_tritons_ptx_is_found(change, expected) -> None:
    assert wrong(plain_call("record"), lambda seed: OnMachine(seed, change)) is expected


# (what is there in Triton's PTX, what is put there)
TRITON_WEAKER = {
    "the round is let go without a release": (r"((?:red|atom)\S*gpu\S*)release", r"\1relaxed"),
    "the round is seen without an acquire": (r"(ld\S*)acquire", r"\1relaxed"),
    "the ticket takes nothing over": (r"(atom\S*)acq_rel", r"\1relaxed"),
}


@triton
@pytest.mark.parametrize("name", [None, *TRITON_WEAKER])
def test_a_grid_of_triton_that_waits_in_too_weak_an_order_is_found(name: str | None) -> None:
    def change(ptx: str) -> str:
        if name is None:
            return ptx
        changed, count = re.subn(*TRITON_WEAKER[name], ptx)
        assert count == 1 or "combine" not in ptx[ptx.index(".entry") :].split("(")[0]
        return changed

    call = plain_call("probe_and_combine", published=False)
    found = wrong(call, lambda seed: OnMachine(seed, change))
    assert found is (None if name is None else Race)


@triton
@pytest.mark.parametrize("mutant", [None, "order", "barrier"])
def test_a_letter_of_triton_that_is_sealed_too_early_is_found(mutant: str | None) -> None:
    """Without a release, and without a barrier between the content and the serial."""

    def change(ptx: str) -> str:
        at = re.search(r"atom\.global\.sys\.release\.exch", ptx)
        before, seal, behind = ptx[: at.start()], at[0], ptx[at.end() :]
        if mutant == "order":
            seal = seal.replace("release", "relaxed")
        elif mutant == "barrier":
            stored = before.rindex("st.global")
            before = before[:stored] + before[stored:].replace("bar.sync", "//")
        return before + seal + behind

    call, told = plain_call("probe_and_combine", 61, published=False), []
    for seed in range(6):
        host = Host()
        assert wrong(call, lambda _, seed=seed, host=host: OnMachine(seed, change, host), 1) is None
        told.append(host.was_told_the_truth())
    assert all(told) == (mutant is None)


# (operator, module, function, what is there, what is put there, how it shows)
TRITON_SOURCES = {
    "no barrier before the last rows": (
        "alignment", "alignment", "conclude", "    tl.debug_barrier()", "    pass", Race,
    ),
    "a bound one too far": (
        "combine", "combine", "_combine_kernel", "lanes < rest, ACC", "lanes <= rest, ACC",
        BadAccess,
    ),
    "another column for gamma": (
        "alignment", "alignment", "add_share", "tl.load(row + 1)", "tl.load(row)", AssertionError,
    ),
    "nobody waits": (
        "probe_and_combine", "probe_and_combine", "_probe_and_combine_kernel",
        "        wait_for_the_last(workspace, generation)", "        pass", Race,
    ),
}  # fmt: skip


@triton
@pytest.mark.parametrize("name", TRITON_SOURCES)
def test_a_mutant_of_a_triton_kernel_is_found(name: str) -> None:
    from triton.runtime.jit import JITFunction

    ptx_triton = importlib_triton()
    operator, module, function, there, put, expected = TRITON_SOURCES[name]
    kernel = getattr(importlib.import_module(f"dicache.kernels.{module}"), function)
    callers = [getattr(module, name) for module, name in ptx_triton.KERNELS]
    callers += [each for m, _ in ptx_triton.KERNELS for each in vars(m).values()]
    source = kernel.src
    assert there in source
    try:
        for text in (source.replace(there, put), source):
            kernel._unsafe_update_src(text)
            for each in callers:  # they know the hash of what they call
                if isinstance(each, JITFunction):
                    each.hash = None
            if text != source:
                assert wrong(plain_call(operator, published=False), OnMachine, 8) is expected
    finally:
        kernel._unsafe_update_src(source)
