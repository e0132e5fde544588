"""What the instructions mean that only compute: registers in, one value out.

An opcode is found by its name and its types. To add one: a line in `_SIMPLE` if all its operands
and its result are of the opcode's last type, a case in `meaning` if not; and a line of
tests/test_ptx_machine.py with values that were worked out by hand. What is not here raises
`Unsupported` when a kernel is loaded, so nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .faults import Fault, Unsupported
from .numbers import FLOATS, UNSIGNED, Array, from_bits, fused_multiply_add, to_bits, width_of


@dataclass(frozen=True)
class Meaning:
    """`function` of operands of these kinds; the result is of the kind `result`."""

    operands: tuple[str, ...]
    result: str
    function: Callable[..., Array]


def _truncated_division(a: Array, b: Array) -> Array:
    if not b.all():
        raise Fault("integer division by zero, whose result is unspecified")
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


# Kinds: i integer or bits, f float, p predicate.
_SIMPLE: dict[tuple[str, str], tuple[int, Callable[..., Array]]] = {
    ("add", "if"): (2, np.add),
    ("sub", "if"): (2, np.subtract),
    ("mul", "f"): (2, np.multiply),
    ("fma", "f"): (3, fused_multiply_add),
    ("div", "f"): (2, np.divide),
    ("div", "i"): (2, _truncated_division),
    ("rem", "i"): (2, lambda a, b: a - b * _truncated_division(a, b)),
    ("sqrt", "f"): (1, np.sqrt),
    ("abs", "f"): (1, np.abs),
    ("neg", "if"): (1, np.negative),
    ("max", "i"): (2, np.maximum),
    ("min", "i"): (2, np.minimum),
    ("and", "ip"): (2, np.bitwise_and),
    ("or", "ip"): (2, np.bitwise_or),
    ("xor", "ip"): (2, np.bitwise_xor),
    ("not", "i"): (1, np.invert),
    ("not", "p"): (1, np.logical_not),
    ("mov", "ifp"): (1, lambda a: a),
}
# With .rn alone: .approx and .full are not exact, and what says nothing may be fused by ptxas.
_ROUNDED = ("add", "sub", "mul", "fma", "div", "sqrt")

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # false with a NaN; neu is true
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,
}


def meaning(opcode: tuple[str, ...]) -> Meaning:
    """Of an instruction that only computes."""
    name, kind, rest = opcode[0], opcode[-1], opcode[1:-1]
    if kind.endswith("x2"):
        return _pairwise(meaning((*opcode[:-1], kind[:-2])), kind[:-2])
    group = "p" if kind == "pred" else "f" if kind in FLOATS else "i"
    for (known, groups), (count, function) in _SIMPLE.items():
        if name != known or group not in groups:
            continue
        if rest in ((), ("rn",)):
            if (group == "f" and name in _ROUNDED) != (rest == ("rn",)):
                break
            if (name, kind) == ("fma", "f64"):
                break
            return Meaning((kind,) * count, kind, function)
        # Of a 16-bit number and one of fp32, in fp32 (sm_100).
        if rest == ("rn", "f32") and count == 2 and kind in ("f16", "bf16"):
            return Meaning((kind, "f32"), "f32", function)
    if name == "setp" and len(rest) == 1 and rest[0] in _COMPARISONS:
        compare = _COMPARISONS[rest[0]] if group == "f" or rest[0] != "ne" else np.not_equal
        return Meaning((kind, kind), "pred", compare)
    if name == "selp" and not rest:
        bits = f"b{width_of(kind)}"
        return Meaning((bits, bits, "pred"), bits, _select)
    if name == "cvt":
        return _conversion(opcode)
    if group == "i" and name in ("shl", "shr") and not rest:
        shift = np.left_shift if name == "shl" else np.right_shift
        return Meaning(
            (kind, "u32"), kind, lambda a, b: shift(a, np.minimum(b, 64).astype(a.dtype))
        )
    if group == "i" and name in ("mul", "mad") and rest in (("lo",), ("wide",)):
        wide = f"{kind[0]}{2 * width_of(kind)}" if rest == ("wide",) else kind
        return Meaning((kind, kind, wide)[: 2 if name == "mul" else 3], wide, _product(wide))
    if name == "bfe" and not rest:
        return Meaning((kind, "u32", "u32"), kind, _bit_field)
    if name == "cvta" and rest[-1:] == ("global",):
        return Meaning((kind,), kind, lambda a: a)  # global addresses are what they are
    raise Unsupported(f"opcode {'.'.join(opcode)}")


def _pairwise(of_one: Meaning, kind: str) -> Meaning:
    """The same for both halves of a register."""
    width = width_of(kind)
    whole, half, shift = f"b{2 * width}", UNSIGNED[width], UNSIGNED[2 * width](width)

    def function(*values: Array) -> Array:
        halves = []
        for part in (np.zeros_like(shift), shift):
            numbers = [from_bits((value >> part).astype(half), kind) for value in values]
            halves.append(to_bits(of_one.function(*numbers), kind).astype(shift.dtype))
        return halves[0] | (halves[1] << shift)

    return Meaning((whole,) * len(of_one.operands), whole, function)


def _conversion(opcode: tuple[str, ...]) -> Meaning:
    rest, to, kind = opcode[1:-2], opcode[-2], opcode[-1]
    if to in ("f16x2", "bf16x2") and kind == "f32" and rest == ("rn",):

        def pack(upper: Array, lower: Array) -> Array:
            low, high = (to_bits(value, to[:-2]).astype(np.uint32) for value in (lower, upper))
            return low | (high << np.uint32(16))

        return Meaning((kind, kind), "b32", pack)
    floats = (to in FLOATS) + (kind in FLOATS)
    widens = floats == 2 and FLOATS[to] > FLOATS[kind] and not rest
    narrows = floats == 2 and FLOATS[to] < FLOATS[kind] and rest == ("rn",)
    # fp64 does not go to 16 bits in one instruction here; it would be rounded twice.
    if widens or (narrows and kind == "f32") or (narrows and to == "f32"):
        return Meaning((kind,), to, lambda a: a)
    if floats == 0 and not rest:
        signed = "s" if kind[0] == "s" else "u"
        # The value is extended by its own sign, whatever the result's is.
        return Meaning((kind,), to, lambda a: a.astype(np.int64 if signed == "s" else np.uint64))
    raise Unsupported(f"opcode {'.'.join(opcode)}")


def _product(wide: str) -> Callable[..., Array]:
    dtype = from_bits(np.zeros(1, np.uint64), wide).dtype

    def function(a: Array, b: Array, c: Array | None = None) -> Array:
        product = a.astype(dtype) * b.astype(dtype)
        return product if c is None else product + c

    return function


def _bit_field(a: Array, first: Array, length: Array) -> Array:
    """`length` bits of 32 from `first` on, extended by the last one if a is signed."""
    if a.dtype.itemsize != 4 or not ((length > 0) & (first + length <= 32)).all():
        raise Unsupported("bfe beyond the register's bits")
    up = np.uint32(32) - first - length
    moved = (a.view(np.uint32) << up).view(a.dtype)
    return moved >> (np.uint32(32) - length).astype(a.dtype)
