"""Loads and stores of one block of a sample, and the numbers that a program reads about its sample.

Values are widened as they are loaded and rounded once as they are stored. With `mask` None the
addresses of a block are one aligned run, and the compiler makes 16-byte accesses of it; a mask
breaks them into single elements, so only the last, partial block of a sample has one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(pointers, mask, ACC: tl.constexpr):
    """Elements in the accumulator's dtype; zero, which adds nothing to any sum, behind the mask."""
    value = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    return value.to(ACC)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """In a buffer's dtype; fp64 comes to 16 bits by way of fp32, as in torch."""
    if value.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def store(pointers, value, mask):
    """Round to the buffer's dtype and store."""
    value = rounded(value, pointers.dtype.element_ty)
    if mask is None:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=mask)


@triton.jit
def store_tokens(pointers, value, mask):
    """`store` of a step that is filled in: it ends at fp16's largest number, and NaN stays NaN."""
    if pointers.dtype.element_ty == tl.float16:
        value = tl.where(value > 65504.0, 65504.0, value)
        value = tl.where(value < -65504.0, -65504.0, value)
    store(pointers, value, mask)


@triton.jit
def is_active(active, sample):
    """Whether to work on this sample; without `active` on all."""
    if active is None:
        return sample >= 0
    else:
        return tl.load(active + sample) != 0


@triton.jit
def my_share(per_sample, size, BLOCK: tl.constexpr):
    """(sample, index among its programs, whole blocks a sample, elements behind them).

    Offsets are 64 bits wide: a sample may have more than 2^31 elements.
    """
    program = tl.program_id(0)
    sample = (program // per_sample).to(tl.int64)
    index = (program % per_sample).to(tl.int64)
    size = size.to(tl.int64)
    return sample, index, size // BLOCK, size % BLOCK
