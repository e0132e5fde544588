"""The machine that executes PTX: opcodes against values worked out by hand, and faults that it
must find.

Every kernel here is written by hand, so that an error of the machine does not hide behind a
compiler.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
import torch
from ptx_machine import (
    BadAccess,
    Deadlock,
    Fault,
    Memory,
    Misaligned,
    Race,
    Unsupported,
    launch,
    parse,
)

SEEDS = range(12)


def kernel(body: str, shared: str = "") -> str:
    """A kernel of two pointers in %rd1 and %rd2, with its thread in %r1 and its block in %r2."""
    return f"""
        .version 8.0
        {shared}
        .visible .entry the_kernel(.param .u64 .ptr .global .align 1 first, .param .u64 second)
        {{
            .reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>;
            .reg .f32 %f<20>; .reg .f64 %fd<20>;
            ld.param.u64 %rd1, [first];  // a comment
            ld.param.u64 %rd2, [second];
            mov.u32 %r1, %tid.x;
            mov.u32 %r2, %ctaid.x;
            mul.wide.u32 %rd3, %r1, 4;
            add.s64 %rd4, %rd1, %rd3;  // this thread's word behind the first pointer
            add.s64 %rd5, %rd2, %rd3;
            {body}
            ret;
        }}
    """


def run(body, first=None, second=None, *, blocks=1, threads=32, seed=0, shared="", **options):
    """Execute a body on two int32 tensors, both writable."""
    memory = Memory()
    given = [memory.pointer(first, True, "first"), memory.pointer(second, True, "second")]
    grid = blocks if isinstance(blocks, tuple) else (blocks,)
    done = launch(parse(kernel(body, shared)), memory, given, grid, threads, seed, **options)
    memory.copy_back()
    return done


def words(*values: int, size: int = 0) -> torch.Tensor:
    return torch.tensor([*values, *[0] * (size - len(values))], dtype=torch.int32)


# ---- opcodes ----


def f32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f64(value: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", value))[0]


NAN, INFINITY, TINY = float("nan"), float("inf"), 2.0**-149
ALL = {16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}
# bf16: 1.0 is 0x3f80, 2.0 is 0x4000, -1.0 is 0xbf80, 1 + 2^-7 is 0x3f81. fp16: 1.0 is 0x3c00.
# (opcode, bits of the operands, bits of the result)
OPCODES = [
    ("add.s32", [0xFFFFFFFF, 2], 1),
    ("add.s64", [ALL[64], 5], 4),
    ("sub.s32", [1, 2], ALL[32]),
    ("sub.s64", [0, 1], ALL[64]),
    ("mul.lo.s32", [0x10001, 0x10001], 0x20001),
    ("mul.lo.s64", [1 << 33, 1 << 31], 0),
    ("mul.wide.s32", [ALL[32], 3], ALL[64] - 2),
    ("mul.wide.u32", [ALL[32], 3], 3 * ALL[32]),
    ("mad.lo.s32", [3, 5, ALL[32]], 14),
    ("mad.lo.s64", [ALL[64], 2, 3], 1),
    ("mad.wide.s32", [ALL[32], 4, 10], 6),
    ("mad.wide.u32", [ALL[32], 4, 10], 4 * ALL[32] + 10),
    ("div.s32", [ALL[32] - 6, 2], ALL[32] - 2),  # -7 / 2 is -3
    ("rem.s32", [ALL[32] - 6, 2], ALL[32]),  # and leaves -1
    ("div.u32", [ALL[32] - 6, 2], 0x7FFFFFFC),
    ("rem.u32", [ALL[32], 16], 15),
    ("div.u64", [1 << 40, 3], (1 << 40) // 3),
    ("neg.s32", [5], ALL[32] - 4),
    ("neg.s64", [5], ALL[64] - 4),
    ("max.s64", [ALL[64], 1], 1),
    ("min.s32", [ALL[32], 1], ALL[32]),
    ("max.u32", [ALL[32], 1], ALL[32]),
    ("and.b16", [0xF0F0, 0xFF00], 0xF000),
    ("and.b32", [12, 10], 8),
    ("or.b64", [12, 1 << 60], 12 | 1 << 60),
    ("xor.b32", [12, 10], 6),
    ("not.b64", [0], ALL[64]),
    ("shl.b32", [3, 31], 1 << 31),
    ("shl.b64", [3, 64], 0),  # more than there are
    ("shr.u32", [1 << 31, 31], 1),
    ("shr.u64", [1 << 63, 60], 8),
    ("shr.s32", [1 << 31, 31], ALL[32]),
    ("shr.s64", [1 << 63, 200], ALL[64]),
    ("bfe.u32", [0xABCD1234, 8, 8], 0x12),
    ("bfe.s32", [0xABCD1234, 24, 8], 0xFFFFFFAB),
    ("mov.b32", [7], 7),
    ("mov.b64", [7], 7),
    ("mov.u16", [7], 7),
    ("mov.f32", [f32(-0.0)], f32(-0.0)),
    ("mov.f64", [f64(NAN)], f64(NAN)),
    ("cvta.to.global.u64", [1 << 40], 1 << 40),
    ("cvt.u64.u32", [ALL[32]], ALL[32]),
    ("cvt.s64.s32", [ALL[32]], ALL[64]),
    ("cvt.u32.u64", [(1 << 40) + 9], 9),
    ("cvt.u16.u32", [0x12345], 0x2345),
    # Floats. 2^24 + 1 is no fp32, and goes to the even neighbour.
    ("add.rn.f32", [f32(2.0**24), f32(1.0)], f32(2.0**24)),
    ("add.rn.f32", [f32(2.0**24 + 2), f32(1.0)], f32(2.0**24 + 4)),
    ("sub.rn.f32", [f32(INFINITY), f32(1.0)], f32(INFINITY)),
    ("mul.rn.f32", [f32(1 + 2.0**-23), f32(1 + 2.0**-23)], f32(1 + 2.0**-22)),
    ("mul.rn.f32", [f32(TINY), f32(0.5)], f32(0.0)),  # half of the smallest: to even
    ("mul.rn.f32", [f32(TINY * 3), f32(0.5)], f32(TINY * 2)),  # subnormal numbers are kept
    # (1 + 2^-12)^2 is a tie, which a product that is rounded first loses.
    ("fma.rn.f32", [f32(1 + 2.0**-12), f32(1 + 2.0**-12), f32(-1.0)], f32(2.0**-11 + 2.0**-24)),
    ("div.rn.f32", [f32(1.0), f32(3.0)], 0x3EAAAAAB),
    ("div.rn.f32", [f32(-1.0), f32(0.0)], f32(-INFINITY)),
    ("sqrt.rn.f32", [f32(2.0)], 0x3FB504F3),
    ("abs.f32", [f32(-2.0)], f32(2.0)),
    ("neg.f32", [f32(0.0)], f32(-0.0)),
    ("add.rn.f64", [f64(2.0**53), f64(1.0)], f64(2.0**53)),
    ("sub.rn.f64", [f64(1.0), f64(2.0**-60)], f64(1.0)),
    ("mul.rn.f64", [f64(0.1), f64(3.0)], f64(0.1 * 3.0)),
    ("div.rn.f64", [f64(1.0), f64(3.0)], 0x3FD5555555555555),
    ("sqrt.rn.f64", [f64(2.0)], 0x3FF6A09E667F3BCD),
    ("abs.f64", [f64(-INFINITY)], f64(INFINITY)),
    ("cvt.f64.f32", [f32(-1.5)], f64(-1.5)),
    ("cvt.rn.f32.f64", [f64(1 + 2.0**-24)], f32(1.0)),
    ("cvt.f32.bf16", [0x3F81], f32(1 + 2.0**-7)),
    ("cvt.f32.f16", [0x0001], f32(2.0**-24)),
    ("cvt.rn.bf16.f32", [0x3F808000], 0x3F80),  # a tie, to even
    ("cvt.rn.bf16.f32", [0x3F818000], 0x3F82),
    ("cvt.rn.bf16.f32", [0x7F7FFFFF], 0x7F80),  # the largest fp32 is infinite
    ("cvt.rn.bf16.f32", [0x7F800001], 0x7FFF),  # NaN, which rounding must not make infinite
    ("cvt.rn.f16.f32", [f32(65519.0)], 0x7BFF),
    ("cvt.rn.f16.f32", [f32(65520.0)], 0x7C00),
    ("cvt.rn.bf16x2.f32", [f32(2.0), f32(1.0)], 0x40003F80),  # the first operand is above
    ("cvt.rn.f16x2.f32", [f32(-1.0), f32(1.0)], 0xBC003C00),
    ("add.rn.f32x2", [f32(2.0) << 32 | f32(1.0), f32(1.0)], f32(2.0) << 32 | f32(2.0)),
    ("sub.rn.f32x2", [f32(2.0) << 32, f32(2.0) << 32 | f32(1.0)], f32(-1.0)),
    ("mul.rn.f32x2", [f32(2.0) << 32 | f32(1.0)] * 2, f32(4.0) << 32 | f32(1.0)),
    (
        "fma.rn.f32x2",
        [f32(2.0) << 32 | f32(1 + 2.0**-12), f32(3.0) << 32 | f32(1 + 2.0**-12)]
        + [f32(1.0) << 32 | f32(-1.0)],
        f32(7.0) << 32 | f32(2.0**-11 + 2.0**-24),
    ),
    ("sub.rn.bf16x2", [0x40003F80, 0x3F803F80], 0x3F800000),
    ("fma.rn.bf16", [0x3F81, 0x3F81, 0xBF80], 0x3C80),  # 2^-6 + 2^-14 is a tie
    # 7 * 37 = 259 is a tie of 258 and 260. Neither 2^-40, which fp32 loses, nor 2^-60, which fp64
    # loses, leaves it one.
    ("fma.rn.bf16", [0x40E0, 0x4214, 0x0000], 0x4382),
    ("fma.rn.bf16", [0x40E0, 0x4214, 0xAB80], 0x4381),
    ("fma.rn.bf16", [0x40E0, 0x4214, 0xA180], 0x4381),
    ("fma.rn.bf16", [0xC0E0, 0x4214, 0x2180], 0xC381),
    ("fma.rn.bf16x2", [0x40003F80, 0x40003F80, 0x3F803F80], 0x40A04000),
    ("fma.rn.f16", [0x3C00, 0x1000, 0x3C01], 0x3C02),  # 1 + 3 * 2^-11: a tie, to even
    ("fma.rn.f16", [0x8001, 0x0001, 0x3C01], 0x3C01),
    ("abs.bf16", [0xBF81], 0x3F81),
    ("abs.f16", [0x8001], 0x0001),
    ("abs.bf16x2", [0xBF81C000], 0x3F814000),
    ("abs.f16x2", [0xBC00BC01], 0x3C003C01),
    ("sub.rn.bf16", [0x4000, 0x3B80], 0x4000),  # 2 - 2^-8: a tie of 2 and 2 - 2^-7, to even
    ("add.rn.bf16", [0x3F80, 0x3B81], 0x3F81),
    ("sub.rn.f16", [0x3C00, 0x4000], 0xBC00),
    ("add.rn.f16", [0x7BFF, 0x7BFF], 0x7C00),
    ("add.rn.bf16x2", [0x40003F80, 0x3F803F80], 0x40404000),
    ("sub.rn.f16x2", [0x40003C00, 0x3C003C00], 0x3C000000),
    ("add.rn.f16x2", [0x40003C00, 0x3C003C00], 0x42004000),
    ("fma.rn.f16x2", [0x40003C00, 0x40003C00, 0x3C003C00], 0x45004000),
    ("add.rn.f32.f16", [0x3C00, f32(0.5)], f32(1.5)),
    ("sub.rn.f32.f16", [0x3C00, f32(0.5)], f32(0.5)),
    ("sub.rn.f32.bf16", [0x4000, f32(0.5)], f32(1.5)),
    ("add.rn.f32.bf16", [0x4000, f32(0.5)], f32(2.5)),
]
# (opcode, operands, whether it holds)
COMPARISONS = [
    ("setp.eq.s32", [5, 5], True),
    ("setp.ne.s32", [5, 5], False),
    ("setp.lt.s32", [ALL[32], 0], True),
    ("setp.gt.u32", [ALL[32], 0], True),
    ("setp.lt.u32", [ALL[32], 0], False),
    ("setp.ge.s64", [ALL[64], 0], False),
    ("setp.gt.s32", [0, 0], False),
    ("setp.gt.u64", [1 << 63, 1], True),
    ("setp.lt.u64", [1 << 63, 1], False),
    ("setp.le.s64", [3, 3], True),
    ("setp.eq.s16", [0x10001, 1], True),
    ("setp.eq.b64", [1 << 40, 0], False),
    ("setp.ne.b32", [1, 2], True),
    ("setp.eq.f32", [f32(0.0), f32(-0.0)], True),
    ("setp.eq.f32", [f32(NAN), f32(NAN)], False),
    ("setp.ne.f32", [f32(NAN), f32(1.0)], False),
    ("setp.ne.f32", [f32(2.0), f32(1.0)], True),
    ("setp.neu.f32", [f32(NAN), f32(1.0)], True),
    ("setp.neu.f64", [f64(1.0), f64(1.0)], False),
    ("setp.lt.f32", [f32(NAN), f32(1.0)], False),
    ("setp.le.f64", [f64(1.0), f64(1.0)], True),
    ("setp.gt.f64", [f64(2.0), f64(1.0)], True),
    ("setp.ge.f32", [f32(-1.0), f32(1.0)], False),
]


def group_of(opcode: str) -> tuple[str, str]:
    """An opcode without its type, and the kind of that: one line speaks for all of them."""
    name, _, kind = opcode.rpartition(".")
    if kind.endswith("x2") or kind in ("f16", "bf16", "pred"):
        return name, kind
    return name, {"u": "unsigned", "s": "signed", "b": "bits", "f": "float"}[kind[0]]


def width_of(opcode: str, operand: int) -> int:
    """Bits of an operand's register."""
    parts = opcode.split(".")
    if parts[0] in ("shl", "shr", "bfe") and operand > 0:
        return 32
    if parts[1] == "wide" and operand == 2:
        return 64
    kind = parts[-1]
    if "f32" in parts[:-1] and parts[0] != "cvt" and operand == 1:
        return 32  # sub.rn.f32.bf16
    return {"f16": 16, "bf16": 16, "f32x2": 64, "bf16x2": 32, "f16x2": 32}.get(
        kind, int("".join(filter(str.isdigit, kind)) or 0)
    )


def compute(opcode: str, operands: list[int]) -> str:
    """Loads the operands, and leaves the instruction's register names to the caller."""
    names, lines = [], []
    for index, value in enumerate(operands):
        width = width_of(opcode, index)
        register = {16: "%rs", 32: "%r", 64: "%rd"}[width] + str(10 + index)
        lines.append(f"mov.b{width} {register}, {value & ALL[width]};")
        names.append(register)
    return " ".join(lines) + f" {opcode} RESULT, {', '.join(names)};"


def result_width(opcode: str) -> int:
    parts = opcode.split(".")
    if parts[1] == "wide":
        return 64
    kind = parts[-1]
    if parts[0] == "cvt" and len(parts) > 2:
        kind = parts[-2]
    if "f32" in parts[1:-1]:
        return 32
    return {"f16": 16, "bf16": 16, "f32x2": 64, "bf16x2": 32, "f16x2": 32}.get(
        kind, int("".join(filter(str.isdigit, kind)) or 0)
    )


@pytest.mark.parametrize(("opcode", "operands", "expected"), OPCODES)
def test_what_an_opcode_computes(opcode: str, operands: list[int], expected: int) -> None:
    width = result_width(opcode)
    register = {16: "%rs1", 32: "%r20", 64: "%rd20"}[width]
    body = compute(opcode, operands).replace("RESULT", register)
    wide = {16: f"cvt.u64.u16 %rd21, {register};", 32: f"cvt.u64.u32 %rd21, {register};"}
    body += wide.get(width, f"mov.b64 %rd21, {register};") + " st.global.u64 [%rd1], %rd21;"
    out = torch.zeros(1, dtype=torch.int64)
    run(body, out, threads=1)
    assert out.item() & ALL[64] == expected


@pytest.mark.parametrize(("opcode", "operands", "expected"), COMPARISONS)
def test_what_a_comparison_says(opcode: str, operands: list[int], expected: bool) -> None:
    body = compute(opcode, operands).replace("RESULT", "%p1")
    out = words(-1)
    run(body + " selp.u32 %r9, 1, 0, %p1; st.global.u32 [%rd1], %r9;", out, threads=1)
    assert out.item() == expected


@pytest.mark.parametrize(
    ("operation", "expected"), [("and", 0b1000), ("or", 0b1110), ("xor", 0b0110)]
)
def test_predicates(operation: str, expected: int) -> None:
    out = words(size=4)
    run(
        f"""and.b32 %r10, %r1, 1; and.b32 %r11, %r1, 2;
        setp.ne.s32 %p1, %r10, 0; setp.ne.s32 %p2, %r11, 0;
        {operation}.pred %p3, %p1, %p2; mov.pred %p4, %p3; not.pred %p5, %p4;
        mov.pred %p6, 0; mov.pred %p7, -1;
        selp.u32 %r12, 3, 1, %p3; @%p5 mov.u32 %r12, 0; @%p6 mov.u32 %r12, 9;
        @!%p7 mov.u32 %r12, 9; st.global.u32 [%rd4], %r12;""",
        out,
        threads=4,
    )
    assert out.tolist() == [3 * (expected >> i & 1) for i in range(4)]


def test_registers_are_packed_and_unpacked() -> None:
    out = words(size=4)
    run(
        """mov.b32 %r10, 0x11223344; mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r11, {%rs2, %rs1};
        mov.b64 %rd10, {%r11, %r10}; mov.b64 {%r12, _}, %rd10; { mov.b32 %f1, {0, %rs1}; }
        mov.f32 %f2, 0f3F800000; st.global.v4.u32 [%rd1], {%r11, %r12, %f1, %f2};""",
        out,
        threads=1,
    )
    assert [word & ALL[32] for word in out.tolist()] == [0x33441122] * 2 + [0x33440000, f32(1.0)]


def test_loads_extend_what_they_load() -> None:
    first = torch.tensor([0x80, 0x81, 0x82, 0x83], dtype=torch.uint8)
    out = torch.zeros(2, dtype=torch.int64)
    run(
        """ld.global.u8 %rs1, [%rd1+1]; ld.global.s16 %r10, [%rd1+2];
        cvt.u64.u16 %rd10, %rs1; cvt.u64.u32 %rd11, %r10;
        st.global.v2.u64 [%rd2], {%rd10, %rd11};""",
        first,
        out,
        threads=1,
    )
    assert out.tolist() == [0x81, 0xFFFF8382]


def test_a_loop_of_a_length_of_each_threads_own() -> None:
    """Sums 1 + ... + tid; the threads part at the branch, in every order."""
    for seed in SEEDS:
        out = words(size=64)
        run(
            """mov.u32 %r10, 0; mov.u32 %r11, %r1;
            $again: setp.eq.s32 %p1, %r11, 0; @%p1 bra $done;
            add.s32 %r10, %r10, %r11; sub.s32 %r11, %r11, 1; bra.uni $again;
            $done: st.global.u32 [%rd4], %r10;""",
            out,
            threads=64,
            seed=seed,
        )
        assert out.tolist() == [n * (n + 1) // 2 for n in range(64)]


def test_blocks_know_where_they_are_in_a_grid_of_two_axes() -> None:
    out = words(size=6)
    run(
        """mov.u32 %r10, %ctaid.y; mov.u32 %r11, %nctaid.x; mov.u32 %r12, %ntid.x;
        mad.lo.s32 %r13, %r10, %r11, %r2; mul.wide.u32 %rd10, %r13, 4; add.s64 %rd11, %rd1, %rd10;
        mul.lo.s32 %r14, %r10, 10; add.s32 %r14, %r14, %r2; mad.lo.s32 %r14, %r12, 100, %r14;
        st.global.u32 [%rd11], %r14;""",
        out,
        blocks=(3, 2),
        threads=1,
    )
    assert out.tolist() == [100, 101, 102, 110, 111, 112]


@pytest.mark.parametrize(
    ("mode", "by", "source"),
    [("down", 8, lambda i: i + 8 if i < 24 else i), ("bfly", 5, lambda i: i ^ 5)],
)
def test_shuffles(mode: str, by: int, source) -> None:
    out, found = words(size=32), words(size=32)
    run(
        f"""mul.lo.s32 %r10, %r1, 3; shfl.sync.{mode}.b32 %r11|%p1, %r10, {by}, 31, -1;
        selp.u32 %r12, 1, 0, %p1; st.global.u32 [%rd4], %r11; st.global.u32 [%rd5], %r12;""",
        out,
        found,
    )
    assert out.tolist() == [3 * source(i) for i in range(32)]
    assert found.tolist() == [int(mode == "bfly" or i < 24) for i in range(32)]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_to_shared_memory_and_back(transposed: bool) -> None:
    """Lane i holds elements (i / 4, 2 (i mod 4)) and the next; transposed, their mirror images."""
    out = words(size=32)
    run(
        f"""mov.u32 %r9, tile; mul.lo.s32 %r10, %r1, 2; mul.lo.s32 %r10, %r10, 65537;
        add.s32 %r10, %r10, 65536;  // elements 2 i and 2 i + 1
        shl.b32 %r11, %r1, 4; and.b32 %r11, %r11, 127; add.s32 %r12, %r9, %r11;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r12], {{%r10}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1{".trans" if transposed else ""}.shared.b16 {{%r13}}, [%r12];
        st.global.u32 [%rd4], %r13;""",
        out,
        shared=".shared .align 16 .b8 tile[128];",
    )
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        pair = [(row, column), (row, column + 1)]
        low, high = ((8 * c + r if transposed else 8 * r + c) for r, c in pair)
        assert out[lane].item() == low | high << 16


@pytest.mark.parametrize(
    "instruction",
    [
        "add.f32 %f1, %f2, %f3",  # ptxas may fuse it
        "div.full.f32 %f1, %f2, %f3",
        "add.rn.ftz.f32 %f1, %f2, %f3",
        "fma.rn.f64 %fd1, %fd2, %fd3, %fd4",
        "cvt.rn.f16.f64 %rs1, %fd1",
        "atom.global.gpu.add.u32 %r9, [%rd1], 1",
        "atom.global.cta.acq_rel.add.u32 %r9, [%rd1], 1",
        "ld.volatile.global.u32 %r9, [%rd1]",
        "bar.sync 1",
        "bar.sync 0, 32",
        "red.global.add.f32 [%rd1], %f1",
        "popc.b32 %r9, %r10",
    ],
)
def test_what_the_machine_does_not_know_it_refuses(instruction: str) -> None:
    with pytest.raises(Unsupported):
        run(instruction + ";", words(0))


# ---- what a launch may touch ----


def rows(gap: int = 2) -> torch.Tensor:
    """Two rows of four words, with some between that belong to nobody."""
    return torch.zeros(2, 4 + gap, dtype=torch.int32)[:, :4]


@pytest.mark.parametrize(("offset", "kind"), [(16, "u32"), (40, "u32"), (-4, "u32"), (8, "v4.u32")])
def test_only_elements_of_tensors_may_be_touched(offset: int, kind: str) -> None:
    register = "{%r9, %r10, %r11, %r12}" if "v4" in kind else "%r9"
    for access in (
        f"ld.global.{kind} {register}, [%rd1+{offset}]",
        f"st.global.{kind} [%rd1+{offset}], {register}",
    ):
        fault = Misaligned if (offset, kind) == (8, "v4.u32") else BadAccess
        with pytest.raises(fault):
            run(access + ";", rows(), threads=1)


def test_a_vector_that_reaches_into_the_gap_is_found() -> None:
    tensor = torch.zeros(2, 8, dtype=torch.int32)[:, :6]
    body = "ld.global.v4.u32 {{%r9, %r10, %r11, %r12}}, [%rd1+{}];"
    run(body.format(32), tensor, threads=1)
    with pytest.raises(BadAccess, match="byte 24 of first"):
        run(body.format(16), tensor, threads=1)


def test_what_may_only_be_read_is_not_written() -> None:
    memory, tensor = Memory(), words(3)
    given = [memory.pointer(tensor), 0]
    program = parse(kernel("ld.global.u32 %r9, [%rd1]; st.global.u32 [%rd1], %r9;"))
    with pytest.raises(BadAccess, match="store to byte 0"):
        launch(program, memory, given, (1,), 1, 0)


def test_null_is_nobodys() -> None:
    with pytest.raises(BadAccess):
        run("ld.global.u32 %r9, [%rd2];", words(0), None, threads=1)


def test_shared_memory_ends() -> None:
    shared = ".shared .align 4 .b8 room[8];"
    run("mov.u32 %r9, room; st.shared.u32 [%r9+4], %r9;", shared=shared, threads=1)
    with pytest.raises(BadAccess):
        run("mov.u32 %r9, room; st.shared.u32 [%r9+8], %r9;", shared=shared, threads=1)


def test_nothing_is_zero_before_it_is_written() -> None:
    """Registers and shared memory hold anything: a kernel that counts on zeros is found out."""
    seen = set()
    for seed in SEEDS:
        out = words(0, 0)
        run(
            "mov.u32 %r9, room; ld.shared.u32 %r10, [%r9]; st.global.v2.u32 [%rd1], {%r10, %r30};",
            out,
            shared=".shared .align 4 .b8 room[4];",
            threads=1,
            seed=seed,
        )
        seen.update(out.tolist())
    assert len(seen) == 2 * len(SEEDS)


# ---- who is ordered, and who races ----


def raced(body: str, seeds: Iterable[int] = SEEDS, **options) -> int:
    """In how many schedules a race was found."""
    count = 0
    for seed in seeds:
        try:
            run(body, words(size=80), words(size=80), seed=seed, **options)
        except Race:
            count += 1
    return count


NEIGHBOUR = """
    st.{space}.u32 [{own}], %r1;
    {between}
    xor.b32 %r10, %r1, 32; mul.lo.s32 %r11, %r10, 4; add.s32 %r12, %r11, room_;
    mul.wide.u32 %rd10, %r10, 4; add.s64 %rd11, %rd1, %rd10;
    ld.{space}.u32 %r13, [{other}];
    {behind}
    st.global.u32 [%rd5], %r13;
"""


@pytest.mark.parametrize("space", ["global", "shared"])
def test_a_barrier_orders_the_threads_of_a_block(space: str) -> None:
    """Every thread stores a word and loads that of the other warp."""
    own, other = ("%rd4", "%rd11") if space == "global" else ("%r21", "%r12")
    start = "mov.u32 %r20, room; mul.lo.s32 %r21, %r1, 4; add.s32 %r21, %r21, %r20; "
    body = start + NEIGHBOUR.replace("room_", "%r20")
    options = {"threads": 64, "shared": ".shared .align 4 .b8 room[256];"}
    texts = {"space": space, "own": own, "other": other, "behind": ""}
    assert raced(body.format(between="bar.sync 0;", **texts), **options) == 0
    assert raced(body.format(between="", **texts), **options) == len(SEEDS)
    # Read before it is written again.
    texts["behind"] = f"bar.sync 0; st.{space}.u32 [{own}], %r13;"
    assert raced(body.format(between="bar.sync 0;", **texts), **options) == 0
    texts["behind"] = f"st.{space}.u32 [{own}], %r13;"
    assert raced(body.format(between="bar.sync 0;", **texts), **options) == len(SEEDS)


def test_a_shuffle_orders_no_memory() -> None:
    body = """st.global.u32 [%rd4], %r1; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;
        mul.wide.u32 %rd10, %r9, 4; add.s64 %rd11, %rd1, %rd10; ld.global.u32 %r10, [%rd11];"""
    assert raced(body) == len(SEEDS)


def test_a_store_that_many_have_read() -> None:
    """All threads of two blocks read a word that one thread of a third then overwrites."""
    body = """setp.eq.s32 %p1, %r2, 2; setp.eq.s32 %p2, %r1, 0; and.pred %p3, %p1, %p2;
        @%p3 st.global.u32 [%rd1], %r1; @!%p1 ld.global.u32 %r10, [%rd1];"""
    assert raced(body, blocks=3) == len(SEEDS)
    assert (
        raced(
            body.replace("st.global", "ld.global").replace("[%rd1], %r1", "%r1, [%rd1]"), blocks=3
        )
        == 0
    )


def test_a_store_that_is_ordered_behind_one_reader_and_not_behind_another() -> None:
    """Block 0 reads and tells block 2, which then stores; block 1 reads and tells nobody."""
    body = """setp.eq.s32 %p1, %r2, 2; @%p1 bra $writer;
        ld.global.u32 %r9, [%rd1]; setp.eq.s32 %p2, %r2, 1; @%p2 bra $end;
        st.release.gpu.global.u32 [%rd2], 1; bra.uni $end;
        $writer: ld.acquire.gpu.global.u32 %r10, [%rd2]; setp.eq.s32 %p3, %r10, 0;
        @%p3 bra $writer; st.global.u32 [%rd1], 1; $end:"""
    assert raced(body, blocks=3, threads=1) == len(SEEDS)
    alone = body.replace("ld.global", "setp.eq.s32 %p4, %r2, 1; @%p4 bra $end; ld.global", 1)
    assert raced(alone, blocks=3, threads=1) == 0


def test_lanes_of_one_instruction_that_store_to_one_word() -> None:
    """A race in global memory. In shared memory compilers do it, with equal values."""
    assert raced("st.global.u32 [%rd1], 5;") == len(SEEDS)
    shared = ".shared .align 4 .b8 room[4];"
    assert raced("mov.u32 %r9, room; st.shared.u32 [%r9], 5;", shared=shared) == 0
    assert raced("mov.u32 %r9, room; st.shared.u32 [%r9], %r1;", shared=shared) == len(SEEDS)


MESSAGE = """
    setp.ne.s32 %p1, %r1, 0; @%p1 bra $end;
    setp.ne.s32 %p2, %r2, 0; @%p2 bra $reader;
    st.global.u32 [%rd1], 41; {before} {send}; bra.uni $end;
    $reader: {receive}; setp.eq.s32 %p3, %r10, 0; @%p3 bra $reader;
    {behind} ld.global{cache}.u32 %r11, [%rd1]; add.s32 %r11, %r11, 1; st.global.u32 [%rd2+4], %r11;
    $end:
"""
# (before, send, receive, behind, whether that orders the message)
RELEASE, ACQUIRE = "st.release.gpu.global.u32 [%rd2], 1", "ld.acquire.gpu.global.u32 %r10, [%rd2]"
STORE, LOAD = "st.relaxed.gpu.global.u32 [%rd2], 1", "ld.relaxed.gpu.global.u32 %r10, [%rd2]"
EXCHANGE = "atom.global.{}.gpu.exch.u32 %r9, [%rd2], 1"
MESSAGES = {
    "release and acquire": ("", RELEASE, ACQUIRE, "", True),
    "atomics": (
        "",
        EXCHANGE.format("acq_rel"),
        "atom.global.acq_rel.gpu.add.u32 %r10, [%rd2], 0",
        "",
        True,
    ),
    "an atomic without a result": (
        "",
        "red.global.gpu.release.add.u32 [%rd2], 1",
        ACQUIRE,
        "",
        True,
    ),
    "a relaxed one": ("", "red.relaxed.gpu.global.add.u32 [%rd2], 1", ACQUIRE, "", False),
    "fences": ("fence.acq_rel.gpu;", STORE, LOAD, "membar.gl;", True),
    "no fence at the reader": ("fence.acq_rel.gpu;", STORE, LOAD, "", False),
    "no fence at the writer": ("", STORE, LOAD, "fence.acq_rel.gpu;", False),
    "a relaxed reader": ("", RELEASE, LOAD, "", False),
    "a relaxed writer": ("", EXCHANGE.format("relaxed"), ACQUIRE, "", False),
}


def message(name: str, cache: str = "") -> str:
    before, send, receive, behind, _ = MESSAGES[name]
    texts = {"before": before, "send": send, "receive": receive, "behind": behind}
    return MESSAGE.format(cache=cache, **texts)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_from_block_to_block(name: str) -> None:
    found = raced(message(name), blocks=2)
    assert found == (0 if MESSAGES[name][-1] else len(SEEDS))


@pytest.mark.parametrize("name", MESSAGES)
def test_stores_arrive_late_where_nothing_orders_them(name: str) -> None:
    """Without looking for races: the reader sees an old value in some schedule, or in none."""
    # The reader has loaded the word before, so that an old copy of it may be in its cache.
    body = message(name).replace("$reader:", "$reader: ld.global.u32 %r12, [%rd1];")
    seen = set()
    for seed in range(60):
        second = words(0, 0)
        run(body, words(0), second, blocks=2, threads=1, seed=seed, finds_races=False)
        seen.add(second[1].item())
    assert seen == ({42} if MESSAGES[name][-1] else {1, 42})


def test_a_release_hands_on_what_the_block_stored_before_its_barrier() -> None:
    """As the ticket of a reduction does: 64 threads store, one releases, another block reads."""
    body = """
        setp.ne.s32 %p2, %r2, 0; @%p2 bra $reader;
        st.global.u32 [%rd4], %r1; {barrier}
        setp.ne.s32 %p1, %r1, 0; @%p1 bra $end;
        st.release.gpu.global.u32 [%rd2], 1; bra.uni $end;
        $reader: setp.ne.s32 %p1, %r1, 0; @%p1 bra $wait;
        $again: ld.acquire.gpu.global.u32 %r10, [%rd2]; setp.eq.s32 %p3, %r10, 0; @%p3 bra $again;
        $wait: {other} ld.global.u32 %r11, [%rd4]; setp.ne.s32 %p4, %r11, %r1;
        @%p4 st.global.u32 [%rd5+16], 1;
        $end:
    """
    both = {"barrier": "bar.sync 0;", "other": "bar.sync 0;"}
    assert raced(body.format(**both), blocks=2, threads=64) == 0
    for missing in both:
        texts = {**both, missing: ""}
        assert raced(body.format(**texts), blocks=2, threads=64) == len(SEEDS)


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses() -> None:
    count = "atom.global.relaxed.gpu.add.u32 %r9, [%rd1], 1;"
    out = words(0)
    run(count, out, blocks=5, threads=64)
    assert out.item() == 320
    for plain in ("st.global.u32 [%rd1], 0;", "ld.global.u32 %r9, [%rd1];"):
        body = f"""setp.ne.s32 %p1, %r1, 0; @%p1 bra $end; setp.eq.s32 %p2, %r2, 0;
            @%p2 bra $plain; {count} bra.uni $end; $plain: {plain} $end:"""
        assert raced(body, blocks=3) == len(SEEDS)


def test_a_counter_that_wraps() -> None:
    out, seen = words(0), words(size=4)
    run(
        """atom.inc.acq_rel.gpu.global.u32 %r9, [%rd1], 2; mul.wide.u32 %rd9, %r9, 4;
        add.s64 %rd10, %rd2, %rd9; atom.global.relaxed.gpu.add.u32 %r10, [%rd10], 1;""",
        out,
        seen,
        blocks=5,
        threads=1,
    )
    assert (out.tolist(), seen.tolist()) == ([2], [2, 2, 1, 0])


# ---- who waits ----


def test_threads_that_wait_for_others_which_ended() -> None:
    with pytest.raises(Deadlock):
        run("setp.eq.s32 %p1, %r1, 5; @%p1 ret; bar.sync 0;")
    with pytest.raises(Deadlock):
        run("setp.eq.s32 %p1, %r1, 5; @%p1 ret; shfl.sync.down.b32 %r9, %r1, 1, 31, -1;")


def test_threads_of_a_warp_at_different_barriers() -> None:
    with pytest.raises(Fault, match="different barriers"):
        run("setp.lt.s32 %p1, %r1, 5; @%p1 bra $a; bar.sync 0; bra.uni $b; $a: bar.sync 0; $b:")


def test_a_block_that_is_not_resident_cannot_be_waited_for() -> None:
    """A barrier over the grid hangs if not all of it fits: here it is not even scheduled."""
    body = """atom.global.acq_rel.gpu.add.u32 %r9, [%rd1], 1;
        mov.u32 %r12, 0;
        $wait: ld.acquire.gpu.global.u32 %r10, [%rd1]; setp.lt.u32 %p1, %r10, 3; @%p1 bra $wait;"""
    run(body, words(0), blocks=3, threads=1, resident=3)


def test_a_launch_that_waits_for_ever() -> None:
    with pytest.raises(Deadlock, match="still running"):
        run(
            "$wait: ld.acquire.gpu.global.u32 %r10, [%rd1]; bra.uni $wait;",
            words(0),
            threads=1,
            most_steps=5000,
        )


# ---- schedules ----


def test_schedules_differ_and_repeat() -> None:
    """Blocks and warps come in many orders, and a seed's is the same."""
    body = """atom.global.relaxed.gpu.add.u32 %r9, [%rd1], 1;
        mad.lo.s32 %r10, %r2, 64, %r1; mul.wide.u32 %rd10, %r10, 4; add.s64 %rd11, %rd2, %rd10;
        st.global.u32 [%rd11], %r9;"""

    def order(seed: int) -> torch.Tensor:
        places = words(size=128)
        run(body, words(0), places, blocks=2, threads=64, seed=seed)
        return places

    orders = torch.stack([order(seed) for seed in range(40)])
    assert torch.equal(orders[3], order(3))
    first = orders.argmin(1)
    assert {int(n) // 64 for n in first} == {0, 1}  # either block is first,
    assert {int(n) // 32 for n in first} == {0, 1, 2, 3}  # any warp,


def test_threads_of_one_warp_need_not_stay_together() -> None:
    """Each draws two numbers: some draw their second before others have drawn their first."""
    body = """atom.global.relaxed.gpu.add.u32 %r9, [%rd1], 1; st.global.u32 [%rd5], %r9;
        atom.global.relaxed.gpu.add.u32 %r10, [%rd1], 1; st.global.u32 [%rd5+128], %r10;"""
    apart = 0
    for seed in range(60):
        drawn = words(size=64)
        run(body, words(0), drawn, seed=seed)
        assert sorted(drawn.tolist()) == list(range(64))
        apart += drawn[32:].min() < drawn[:32].max()
    assert 0 < apart < 60


def test_a_thread_finds_what_it_stored_itself() -> None:
    for seed in SEEDS:
        out = words(size=32)
        run(
            "st.global.u32 [%rd4], %r1; ld.global.u32 %r9, [%rd4]; st.global.u32 [%rd5], %r9;",
            words(size=32),
            out,
            seed=seed,
        )
        assert out.tolist() == list(range(32))
