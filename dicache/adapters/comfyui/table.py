"""The table of ComfyUI's models: where one lets its blocks be patched, one row a model.

A block's patch gets and returns its image tokens as `img`. In a block of one stream `img` is text
and image in one tensor, and which part of it is the image differs from model to model.

Thresholds are those of the diffusers family that a row names: converted, not measured on real
models (`adapters/diffusers/table.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...driver.families import supported_families, unwrapped
from ...error_rules import ErrorRule

ALL, FIRST, LAST = "all", "first", "last"


class Block(NamedTuple):
    """A place where a model takes a patch.

    Attributes:
        key: Of its patch: what the model calls such blocks, and the block's index.
        image: Which of its tokens are the image's.
    """

    key: tuple[str, int]
    image: str = ALL

    def image_of(self, tokens: Tensor, count: int | None = None) -> Tensor:
        """The image's part [B, n, D] of a block's tokens [B, S, D], n being `count`."""
        if self.image == ALL or count is None:
            return tokens
        start = 0 if self.image == FIRST else tokens.shape[1] - count
        return tokens.narrow(1, start, count).contiguous()

    def with_image(self, tokens: Tensor, image: Tensor) -> Tensor:
        """A block's tokens with another image in them. The others are as they came in: behind the
        last block nobody reads them.
        """
        if self.image == ALL:
            return image
        tokens, count = tokens.clone(), image.shape[1]
        start = 0 if self.image == FIRST else tokens.shape[1] - count
        tokens.narrow(1, start, count).copy_(image)
        return tokens


@dataclass(frozen=True)
class Stack:
    """Blocks of a model that run one after the other.

    Attributes:
        attribute: Name of their list on the model.
        kind: What the model calls them where it looks for patches.
        image: Which part of their tokens is the image: `ALL`, `FIRST` or `LAST`.
        left_out: Name of the model's list of indices that it does not run.
    """

    attribute: str
    kind: str = "double_block"
    image: str = ALL
    left_out: str | None = None


@dataclass(frozen=True)
class ComfyModel:
    """What is known of a model class.

    Attributes:
        name: As the documentation calls it.
        classes: Names of its classes, which all run the same blocks.
        module: Where they are.
        stacks: Their blocks, in the order in which they run.
        like: The diffusers family whose thresholds it takes.
    """

    name: str
    classes: tuple[str, ...]
    module: str
    stacks: tuple[Stack, ...]
    like: str

    def threshold_for(self, error: ErrorRule) -> float:
        """What `DiCacheConfig(threshold=None)` means here under an error's rule."""
        family = next(each for each in supported_families() if each.name == self.like)
        return family.default_threshold if error.verifies_alignment else family.threshold

    def blocks(self, model: Any) -> list[Block]:
        """Its blocks in the order in which they run.

        Raises:
            ValueError: The model lacks one of the lists.
        """
        found: list[Block] = []
        for stack in self.stacks:
            if not hasattr(model, stack.attribute):
                raise ValueError(
                    f"{type(model).__name__} has no block list {stack.attribute!r}. This ComfyUI "
                    f"is another one than dicache knows."
                )
            left_out = getattr(model, stack.left_out, ()) if stack.left_out else ()
            indices = range(len(getattr(model, stack.attribute)))
            found += [Block((stack.kind, i), stack.image) for i in indices if i not in left_out]
        return found


MODELS = (
    ComfyModel(
        "Flux",
        ("Flux",),
        "comfy.ldm.flux.model",
        (Stack("double_blocks"), Stack("single_blocks", "single_block", LAST)),
        like="flux",
    ),
    ComfyModel(
        "Chroma",
        ("Chroma",),
        "comfy.ldm.chroma.model",
        (
            Stack("double_blocks", left_out="skip_mmdit"),
            Stack("single_blocks", "single_block", LAST, left_out="skip_dit"),
        ),
        like="chroma",
    ),
    ComfyModel(
        "HunyuanVideo",
        ("HunyuanVideo",),
        "comfy.ldm.hunyuan_video.model",
        (Stack("double_blocks"), Stack("single_blocks", "single_block", FIRST)),
        like="hunyuan-video",
    ),
    ComfyModel(
        "Wan",
        ("WanModel", "VaceWanModel", "CameraWanModel"),
        "comfy.ldm.wan.model",
        (Stack("blocks"),),
        like="wan",
    ),
    ComfyModel(
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        "comfy.ldm.qwen_image.model",
        (Stack("transformer_blocks"),),
        like="qwen-image",
    ),
    ComfyModel(
        "LTX-Video",
        ("LTXVModel",),
        "comfy.ldm.lightricks.model",
        (Stack("transformer_blocks"),),
        like="ltx",
    ),
    ComfyModel(
        "Stable Diffusion 3",
        ("OpenAISignatureMMDITWrapper",),
        "comfy.ldm.modules.diffusionmodules.mmdit",
        (Stack("joint_blocks"),),
        like="flux",
    ),
)


def find_model(model: object) -> ComfyModel:
    """The row of a model's own class: one that derives from it may run its blocks otherwise.

    Raises:
        ValueError: There is none.
    """
    kind = type(unwrapped(model))
    for row in MODELS:
        if kind.__name__ in row.classes and kind.__module__ == row.module:
            return row
    names = ", ".join(row.name for row in MODELS)
    raise ValueError(
        f"DiCache does not know the model class {kind.__name__} ({kind.__module__}). Expected one "
        f"of {names}: models whose blocks ComfyUI lets a node patch, and that were tried."
    )
