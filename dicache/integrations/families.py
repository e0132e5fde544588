"""The table of model families: one row of data says where a model's blocks are and what they carry.

A row is all that a family needs, if the model's `forward` calls its arguments `hidden_states`,
`timestep` and `encoder_hidden_states`, as diffusers does. To add one, also from your own code:

    from dicache.integrations import BlockStack, ModelFamily, register_family

    register_family(
        ModelFamily(
            name="my-model",
            model_class="MyTransformer3DModel",
            stacks=(BlockStack("blocks", outputs=("hidden_states", "encoder_hidden_states")),),
            threshold=0.1,
        )
    )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HIDDEN, TEXT = "hidden_states", "encoder_hidden_states"
# What blocks take for every sample, by the names that diffusers gives it. Rotary tables are not
# there: in most models all samples share one.
PER_SAMPLE = (
    HIDDEN,
    TEXT,
    "temb",
    "temb_mod",
    "temb_mod_img",
    "temb_mod_txt",
    "token_replace_emb",
    "modulate_index",
    "attention_mask",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "joint_attention_kwargs.ip_hidden_states",
)


@dataclass(frozen=True)
class BlockStack:
    """One `ModuleList` of transformer blocks that run one after the other.

    Attributes:
        attribute: Name of the list on the model.
        outputs: What a block returns, by the names of its arguments; a single name stands for a
            bare tensor. A skipped block returns these arguments as they came.
        hidden_states: Name of the argument and output that carries the image or video tokens.
        text_in_front: Whether that tensor is [text, image] along the sequence. The image tokens
            are then its last ones, as many as entered block 0.
        per_sample: Names of the arguments whose tensors have a row a sample, so that a part of a
            batch can be run; `name.key` is an entry of a dictionary. Tensors may lie in lists,
            tuples and dictionaries. One with a single row is shared by all samples.
        whole_for: Arguments of the model's call for which it needs every block of this list in its
            place: to add a ControlNet's residuals by number, to scale LoRAs. Where none of them is
            given, a reused step leaves the blocks out of the list, if its loop has not begun and
            nothing but diffusers' own code runs around it. `None` promises nothing: such a step
            calls something in the place of every block.
    """

    attribute: str
    outputs: tuple[str, ...] = (HIDDEN,)
    hidden_states: str = HIDDEN
    text_in_front: bool = False
    per_sample: tuple[str, ...] = PER_SAMPLE
    whole_for: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ModelFamily:
    """What the integration knows about a transformer class.

    Attributes:
        name: The family's name, as the command line prints it.
        model_class: Class name of the transformer; subclasses count.
        stacks: Its blocks, in the order in which they run.
        threshold: Value for `DiCacheConfig(threshold=None)` with the published errors
            (`"delta_y"`, `"delta_minus"`).
        alignment_threshold: The same for the alignment errors, whose values are smaller; `None`
            takes `threshold`. A model's own configuration may override it with an entry
            `_dicache_threshold`.
        preset: Name of the published rules for the family, or `None`.
        ascending_timesteps: Whether timesteps rise during a run.
    """

    name: str
    model_class: str
    stacks: tuple[BlockStack, ...]
    threshold: float
    alignment_threshold: float | None = None
    preset: str | None = None
    ascending_timesteps: bool = False

    @property
    def default_threshold(self) -> float:
        """The threshold that `DiCacheConfig()` takes."""
        own = self.alignment_threshold
        return self.threshold if own is None else own

    def blocks(self, transformer: Any) -> list[tuple[Any, BlockStack]]:
        """The transformer's blocks in the order in which they run, each with its stack.

        Raises:
            ValueError: The transformer lacks a block list that the family names.
        """
        missing = [s.attribute for s in self.stacks if not hasattr(transformer, s.attribute)]
        if missing:
            raise ValueError(
                f"{type(transformer).__name__} has no block list {missing[0]!r}, which its family "
                f"{self.name!r} names."
            )
        return [(block, s) for s in self.stacks for block in getattr(transformer, s.attribute)]


_TEXT_FIRST, _TEXT_LAST = (TEXT, HIDDEN), (HIDDEN, TEXT)

# FLUX.1, HunyuanVideo and Wan 2.1 have published thresholds (arXiv 2508.17356, released scripts).
# Their alignment thresholds are these times the ratio of the two rules' thresholds at equal cost on
# our demo model of the family: 0.17, 0.34 and 0.24 (benchmarks/results/quality.json, 2.5x at the
# sibling's depth). The others take the values of the family whose architecture and task are
# closest. None of the alignment thresholds was measured on a real model.
_FAMILIES = {
    family.model_class: family
    for family in (
        ModelFamily(
            "flux",
            "FluxTransformer2DModel",
            (
                BlockStack("transformer_blocks", _TEXT_FIRST),
                BlockStack(
                    "single_transformer_blocks",
                    _TEXT_FIRST,
                    whole_for=("controlnet_single_block_samples", "joint_attention_kwargs"),
                ),
            ),
            threshold=0.4,
            alignment_threshold=0.07,
            preset="flux",
        ),
        ModelFamily(
            "hunyuan-video",
            "HunyuanVideoTransformer3DModel",
            (
                BlockStack("transformer_blocks", _TEXT_LAST),
                BlockStack(
                    "single_transformer_blocks", _TEXT_LAST, whole_for=("attention_kwargs",)
                ),
            ),
            threshold=0.1,
            alignment_threshold=0.035,
            preset="hunyuan-video",
        ),
        ModelFamily(
            "wan",  # Wan 2.1, and both experts of Wan 2.2
            "WanTransformer3DModel",
            (BlockStack("blocks"),),
            threshold=0.08,
            alignment_threshold=0.02,
            preset="wan2.1",
        ),
        ModelFamily(
            "flux2",
            "Flux2Transformer2DModel",
            (
                BlockStack("transformer_blocks", _TEXT_FIRST),
                BlockStack("single_transformer_blocks", text_in_front=True),
            ),
            threshold=0.4,
            alignment_threshold=0.07,
        ),
        ModelFamily(
            "chroma",
            "ChromaTransformer2DModel",
            (
                BlockStack("transformer_blocks", _TEXT_FIRST),
                BlockStack(
                    "single_transformer_blocks",
                    text_in_front=True,
                    whole_for=("controlnet_single_block_samples", "joint_attention_kwargs"),
                ),
            ),
            threshold=0.4,
            alignment_threshold=0.07,
        ),
        ModelFamily(
            "qwen-image",
            "QwenImageTransformer2DModel",
            (BlockStack("transformer_blocks", _TEXT_FIRST),),
            threshold=0.4,
            alignment_threshold=0.07,
        ),
        ModelFamily(
            "cogvideox",
            "CogVideoXTransformer3DModel",
            (BlockStack("transformer_blocks", _TEXT_LAST),),
            threshold=0.1,
            alignment_threshold=0.035,
        ),
        ModelFamily(
            "ltx",
            "LTXVideoTransformer3DModel",
            (BlockStack("transformer_blocks", per_sample=(*PER_SAMPLE, "image_rotary_emb")),),
            threshold=0.1,
            alignment_threshold=0.035,
        ),
        ModelFamily(
            "mochi",
            "MochiTransformer3DModel",
            (BlockStack("transformer_blocks", _TEXT_LAST),),
            threshold=0.1,
            alignment_threshold=0.035,
            ascending_timesteps=True,
        ),
        ModelFamily(
            "hunyuan-video-1.5",
            "HunyuanVideo15Transformer3DModel",
            (BlockStack("transformer_blocks", _TEXT_LAST),),
            threshold=0.1,
            alignment_threshold=0.035,
        ),
    )
}


def register_family(family: ModelFamily) -> None:
    """Support the transformer class `family.model_class`.

    Raises:
        ValueError: The class has a family already, or the row names no blocks.
    """
    if family.model_class in _FAMILIES:
        taken = _FAMILIES[family.model_class].name
        raise ValueError(f"{family.model_class} is registered already, as family {taken!r}.")
    if not family.stacks:
        raise ValueError(f"Family {family.name!r} has no stacks. Expected at least one BlockStack.")
    _FAMILIES[family.model_class] = family


def supported_families() -> tuple[ModelFamily, ...]:
    """All supported families."""
    return tuple(_FAMILIES.values())


def find_family(model: object) -> ModelFamily | None:
    """The family of `model`'s class or of the nearest base class that has one."""
    for base in type(model).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    return None
