"""Bits and numbers: registers hold bits, an instruction says what they mean.

A kind is one of PTX's types: u8 to u64 and b8 to b64 (unsigned), s8 to s64, f16, bf16, f32, f64,
pred. 16-bit floats are computed with in fp32, which holds each of them exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def width_of(kind: str) -> int:
    return 1 if kind == "pred" else FLOATS[kind] if kind in FLOATS else int(kind[1:])


def from_bits(bits: Array, kind: str) -> Array:
    """What unsigned integers of any width mean as `kind`: only their low bits count."""
    bits = bits.astype(UNSIGNED[width_of(kind)], copy=False)
    if kind[0] == "s":
        return bits.view(SIGNED[width_of(kind)])
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in ("f32", "f64"):
        return bits.view(np.float32 if kind == "f32" else np.float64)
    return bits


def to_bits(value: Array, kind: str) -> Array:
    """The reverse; a wider float is rounded once, to nearest even."""
    if kind in ("f16", "bf16"):
        if value.dtype == np.float64:
            value = odd_float32(value)
        return _bfloat16_bits(value) if kind == "bf16" else _float16_bits(value)
    if kind in ("f32", "f64"):
        value = value.astype(np.float32 if kind == "f32" else np.float64, copy=False)
        return value.view(UNSIGNED[FLOATS[kind]])
    if kind == "pred":
        return value.astype(np.bool_, copy=False)
    return value.astype(UNSIGNED[width_of(kind)], copy=False)


def _bfloat16_bits(value: Array) -> Array:
    bits = value.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _float16_bits(value: Array) -> Array:
    bits = value.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


def odd_float32(value: Array) -> Array:
    """fp64 in fp32, and what does not fit there goes to the neighbour with an odd last bit.

    Such a value is never taken for the middle between two 16-bit floats, so that rounding it again
    gives the number that rounding once would have given.
    """
    nearest = value.astype(np.float32)
    exact = (nearest.astype(np.float64) == value) | ~np.isfinite(nearest)
    bits = nearest.view(np.uint32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(value)
    return np.where(exact, bits, (bits - away.astype(np.uint32)) | np.uint32(1)).view(np.float32)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a b + c of 16-bit floats, in fp64 with an odd last bit where that is not exact."""
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    # Knuth's two-sum: `error` is what the rounded total lacks.
    other = total - product
    error = (product - (total - other)) + (c - other)
    bits = total.view(np.uint64)
    toward_zero = (error < 0) == (total > 0)
    odd = np.where(toward_zero, bits - np.uint64(1), bits) | np.uint64(1)
    inexact = np.isfinite(total) & (error != 0)
    return np.where(inexact, odd, bits).view(np.float64)
