"""Arguments for the operators: any dtype, layout and alignment, inside memory that must not change.

Every tensor lies in a larger allocation of its own. What surrounds it holds a sentinel, and so does
every output, so that a write outside and an element that was not written both show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SENTINEL = -77.0  # exact in every dtype; not a value that the cases draw


@dataclass
class Layout:
    """How the samples of one tensor lie in memory."""

    offset: int = 0  # elements before the first: anything but a multiple of 16 bytes is unaligned
    gap: int = 0  # elements between two samples
    shared: bool = False  # batch stride 0: all samples are one


@dataclass
class Case:
    """One drawn call."""

    batch: int
    shape: tuple[int, ...]
    x_dtype: torch.dtype
    p_dtype: torch.dtype
    y_dtype: torch.dtype
    layouts: dict[str, Layout]
    active: tuple[int, ...] | None
    seed: int
    device: str = "cpu"
    allocations: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def wide(self) -> bool:
        return torch.float64 in (self.x_dtype, self.p_dtype)

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1000 + sum(name.encode()))

    def tensor(self, name: str, dtype: torch.dtype, entries: int = 1, fill: bool = True) -> Tensor:
        """A tensor [B, ...] (windows: [2, B, ...]) of drawn values, or of sentinels."""
        layout = self.layouts.get(name, Layout())
        shared = layout.shared and fill
        row = self.size + layout.gap
        entry = row if shared else row * self.batch
        flat = torch.full((layout.offset + entry * entries + 16,), SENTINEL, dtype=dtype)
        strides = [0 if shared else row]
        for length in self.shape:
            strides.append(math.prod(self.shape[len(strides) :]))
            assert length > 0
        sizes = (self.batch, *self.shape)
        if entries > 1:
            sizes, strides = (entries, *sizes), [entry, *strides]
        flat = flat.to(self.device)
        view = flat.as_strided(sizes, strides, layout.offset)
        if fill:
            one = sizes[: -len(self.shape)] if self.shape else sizes
            rows = (*(1 if s == 0 else n for n, s in zip(one, strides, strict=False)), *self.shape)
            drawn = torch.randn(rows, generator=self.generator(name), dtype=torch.float32)
            target = flat.as_strided(rows, strides, layout.offset)
            target.copy_(drawn.to(dtype))
        self.allocations[name] = (flat, view)
        return view

    def newest(self) -> Tensor:
        drawn = torch.randint(0, 2, (self.batch,), generator=self.generator("newest"))
        return drawn.to(torch.int32).to(self.device)

    def weights(self, one: bool, wide: bool) -> Tensor:
        """[B, 3] inside rows of five, or one row for all samples."""
        drawn = torch.randn(self.batch, 5, generator=self.generator("weights"))
        drawn = drawn.to(torch.float64 if wide else torch.float32).to(self.device)[:, 1:4]
        return drawn[:1].expand(self.batch, 3) if one else drawn

    def entry_sums(self, wide: bool = False) -> Tensor:
        sums = torch.rand(self.batch, 4, generator=self.generator("entry_sums")) * self.size + 0.5
        return sums.to(torch.float64 if wide else torch.float32).to(self.device)

    def active_flags(self) -> Tensor | None:
        if self.active is None:
            return None
        return torch.tensor(self.active, dtype=torch.uint8, device=self.device)

    def surroundings_are_untouched(self) -> bool:
        """Whether nothing but the tensors themselves was written."""
        for flat, view in self.allocations.values():
            outside = torch.ones_like(flat, dtype=torch.bool)
            outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
            if not (flat[outside] == SENTINEL).all():
                return False
        return True


@st.composite
def cases(draw: st.DrawFn, max_size: int = 20_000) -> Case:
    """Sizes around every boundary: one element, a vector, a chunk of a task, several chunks."""
    batch = draw(st.integers(1, 3))
    size = draw(
        st.one_of(
            st.integers(1, 40),
            st.integers(8180, 8200),  # csrc/include/dicache/launch_plan.h: a CPU task has 8192
            st.integers(1, max_size),
        )
    )
    width = draw(st.sampled_from([1, 3, 8]))
    shape = (size,) if width == 1 else (max(1, size // width), width)
    x_dtype = draw(st.sampled_from(DTYPES))
    mixed = draw(st.booleans())
    others = st.sampled_from(DTYPES) if mixed else st.just(x_dtype)
    layout = st.builds(
        Layout,
        offset=st.sampled_from([0, 0, 1, 3, 8]),
        gap=st.sampled_from([0, 0, 5, 8]),
        shared=st.booleans() if draw(st.booleans()) else st.just(False),
    )
    names = ("x", "p", "y", "p_prev", "x_prev", "probe_window", "residual_window", "oldest", "out")
    flags = st.one_of(st.none(), st.tuples(*[st.integers(0, 1)] * batch))
    return Case(
        batch=batch,
        shape=shape,
        x_dtype=x_dtype,
        p_dtype=draw(others),
        y_dtype=draw(others),
        layouts={name: draw(layout) for name in names},
        active=draw(flags),
        seed=draw(st.integers(0, 10_000)),
    )
