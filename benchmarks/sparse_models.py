"""What sparse.py measures: HunyuanVideo at 720p and 129 frames, its attention made flash or sparse.

diffusers always gives HunyuanVideo's attention a mask of the text's padding, which flash attention
does not take. Prompts here have no padding, so the mask says nothing, and `flash_attention` leaves
it out: the dense baseline is the faster one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from efficiency_caches import Applied, Cache, family_of
from efficiency_models import HUNYUAN_VIDEO, Model
from efficiency_models import TINY as TINY_MODELS
from torch import nn

from dicache import SparseVideoGenConfig, apply_sparse_videogen, remove_sparse_videogen
from dicache.sparse_videogen.families import SparseFamily, find_sparse_family


@dataclass(frozen=True)
class Size:
    """A model and its video, in tokens."""

    model: Model
    dtype: torch.dtype
    block_size: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width; a token is 1 x 2 x 2 places of the latents."""
        frames, height, width = self.model.latents[2:]
        return frames, height // 2, width // 2

    @property
    def video(self) -> int:
        """Tokens of the video."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def text(self) -> int:
        """Tokens of the text, all of them valid."""
        return self.model.text[0]

    @property
    def heads(self) -> tuple[int, int]:
        """Number of heads, and the width of one."""
        config = self.model.config
        return config["num_attention_heads"], config["attention_head_dim"]

    def sparse_config(self, **fields: Any) -> SparseVideoGenConfig:
        """Sparse in every step: short runs have no leading ones."""
        return SparseVideoGenConfig(dense_steps=0.0, block_size=self.block_size, **fields)


FULL = Size(
    dataclasses.replace(
        HUNYUAN_VIDEO,
        title="HunyuanVideo, 720x1280, 129 frames",
        latents=(1, 16, 33, 90, 160),
        call={**HUNYUAN_VIDEO.call, "height": 720, "width": 1280},
    ),
    torch.bfloat16,
    block_size=128,
)
TINY = Size(
    dataclasses.replace(
        TINY_MODELS["hunyuan-video"],
        latents=(1, 16, 5, 16, 16),  # with fewer tokens the text alone were a density of 0.25
        call={"height": 128, "width": 128, "num_frames": 17},
    ),
    torch.float32,
    block_size=16,
)


def sparse_family(transformer: nn.Module) -> SparseFamily:
    """The row of Sparse VideoGen's table for this transformer, which must be in it."""
    family = find_sparse_family(transformer)
    assert family is not None, f"{type(transformer).__name__} is in no family"
    return family


def attentions(transformer: nn.Module) -> list[Any]:
    """The attention over the video of every block."""
    name = sparse_family(transformer).attention
    return [getattr(block, name) for block, _ in family_of(transformer).blocks(transformer)]


@contextmanager
def flash_attention(transformer: nn.Module) -> Iterator[None]:
    """The blocks' full attention is flash attention without a mask; an error where it cannot be."""
    layers = attentions(transformer)
    handles = [each.register_forward_pre_hook(_unmasked, with_kwargs=True) for each in layers]
    backends = [each.processor._attention_backend for each in layers]
    for each in layers:
        each.processor._attention_backend = AttentionBackendName._NATIVE_FLASH
    try:
        yield
    finally:
        for each, handle, backend in zip(layers, handles, backends, strict=True):
            handle.remove()
            each.processor._attention_backend = backend


def _unmasked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": None}


def with_sparse(config: SparseVideoGenConfig, cache: Cache) -> Cache:
    """Sparse VideoGen, and a cache on top of it."""

    @contextmanager
    def both(pipe: Any, mask: str) -> Iterator[Applied]:
        apply_sparse_videogen(pipe, config)
        try:
            with cache(pipe, mask) as applied:
                yield applied
        finally:
            remove_sparse_videogen(pipe)

    return both


class SparseLayers:
    """Counts the layers whose attention really is sparse, in every step of a run."""

    def __init__(self, transformer: nn.Module) -> None:
        self._steps: list[int] = []
        layers = attentions(transformer)
        self._handles = [each.register_forward_pre_hook(self._count) for each in layers]

    def _count(self, module: Any, args: tuple[Any, ...]) -> None:
        self._steps[-1] += getattr(module.processor, "plan", None) is not None

    def boundary(self) -> None:
        """Before the first step and after every one."""
        self._steps.append(0)

    def finish(self) -> list[int]:
        """The count of every step; nothing is counted any more."""
        for handle in self._handles:
            handle.remove()
        return self._steps[:-1]
