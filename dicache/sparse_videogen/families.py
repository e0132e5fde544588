"""The table of families that Sparse VideoGen knows: one row of data each.

Where a family's blocks are, `dicache.adapters.diffusers.table` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .processors import HunyuanVideoProcessor, SparseProcessor, WanProcessor


@dataclass(frozen=True)
class SparseFamily:
    """What Sparse VideoGen knows about a transformer class.

    Attributes:
        model_class: Class name of the transformer; subclasses count.
        attention: Name of a block's attention over the video.
        processor: Class name of the processor that is replaced there.
        sparse_processor: The class that takes its place.
        patch: Frames, height and width of a token in the latents, from the model's configuration.
        sink_frames: Number of leading frames that attend, and are attended by, the whole video.
        text_mask: Argument of the model whose ones are the valid text tokens that follow the video
            in its sequence; `None` where there is no text in it.
        density: Value for `SparseVideoGenConfig(density=None)`.
        dense_steps: The same for `dense_steps`.
    """

    model_class: str
    attention: str
    processor: str
    sparse_processor: type[SparseProcessor]
    patch: Callable[[Any], tuple[int, int, int]]
    sink_frames: int
    text_mask: str | None
    density: float
    dense_steps: float


_FAMILIES = {
    family.model_class: family
    for family in (
        SparseFamily(
            "HunyuanVideoTransformer3DModel",
            attention="attn",
            processor="HunyuanVideoAttnProcessor2_0",
            sparse_processor=HunyuanVideoProcessor,
            patch=lambda config: (config.patch_size_t, config.patch_size, config.patch_size),
            sink_frames=0,
            text_mask="encoder_attention_mask",
            density=0.25,
            dense_steps=0.10,
        ),
        SparseFamily(
            "WanTransformer3DModel",
            attention="attn1",
            processor="WanAttnProcessor",
            sparse_processor=WanProcessor,
            patch=lambda config: tuple(config.patch_size),
            sink_frames=1,
            text_mask=None,
            density=0.30,
            dense_steps=0.20,
        ),
    )
}


def supported_classes() -> tuple[str, ...]:
    """Class names of all supported transformers."""
    return tuple(_FAMILIES)


def find_sparse_family(model: object) -> SparseFamily | None:
    """The family of `model`'s class or of the nearest base class that has one."""
    for base in type(model).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    return None
