"""Model families: where a model's blocks are, what they carry, and which class it is. Rows of data.

Every adapter has a table of rows. To add one of your own:

    from dicache import BlockStack, ModelFamily, register_family

    register_family(
        ModelFamily(
            name="my-model",
            model_class="MyTransformer3DModel",
            stacks=(BlockStack("blocks", outputs=("hidden_states", "encoder_hidden_states")),),
            threshold=0.1,
            alignment_threshold=0.035,
        )
    )
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..error_rules import ErrorRule

HIDDEN, TEXT, TIMESTEP = "hidden_states", "encoder_hidden_states", "timestep"
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
# Text streams by the names that blocks give them: nothing reads those behind the last block.
TEXT_STREAMS = (TEXT, "text", "txt", "context")
# What changes what blocks behind the probe compute, by the names that diffusers gives it: residuals
# that are added between blocks, adapters and their scales, blocks that are left out.
BEHIND_PROBE = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "controlnet_blocks_repeat",
    "block_controlnet_hidden_states",
    "control_hidden_states",
    "control_hidden_states_scale",
    "joint_attention_kwargs",
    "attention_kwargs",
    "skip_layers",
    "kv_cache_mode",
)
# Wrappers put the module that they wrap under these names.
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


@dataclass(frozen=True)
class BlockStack:
    """One `ModuleList` of transformer blocks that run one after the other.

    Attributes:
        attribute: Name of the list on the model.
        outputs: What a block returns, by the names of its arguments; a single name stands for a
            bare tensor. A skipped block returns these arguments as they came.
        hidden_states: Name of the argument and output that carries the image or video tokens. Of
            models with several streams that are read behind the last block (video and audio), the
            names of all of them, in a tuple; see `driver.streams`. One that a call lacks is `None`.
        text_in_front: Whether that tensor is [text, image] along the sequence. The image tokens
            are then its last ones, as many as entered block 0.
        per_sample: Names of the arguments whose tensors have a row a sample, so that a part of a
            batch can be run; `name.key` is an entry of a dictionary. Tensors may lie in lists,
            tuples and dictionaries. One with a single row is shared by all samples.
        whole_for: Arguments of the model's call for which it needs every block of this list in its
            place: to add a ControlNet's residuals by number, to scale LoRAs. Where none of them is
            given, a reused step leaves the blocks out of the list, if its loop has not begun and
            nothing but the model's own code runs around it. `None` promises nothing: such a step
            calls something in the place of every block.
        text_behind: Whether that tensor is [image, text]. The image tokens are then its first ones.
    """

    attribute: str
    outputs: tuple[str, ...] = (HIDDEN,)
    hidden_states: str | tuple[str, ...] = HIDDEN
    text_in_front: bool = False
    per_sample: tuple[str, ...] = PER_SAMPLE
    whole_for: tuple[str, ...] | None = None
    text_behind: bool = False

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the arguments that carry tokens, one of them in most models."""
        names = self.hidden_states
        return (names,) if isinstance(names, str) else names


@dataclass(frozen=True)
class ModelFamily:
    """What is known about a transformer class.

    Attributes:
        name: The family's name, as the command line prints it.
        model_class: Class name of the transformer; subclasses count.
        stacks: Its blocks, in the order in which they run.
        threshold: Value for `DiCacheConfig(threshold=None)` with the published errors
            (`"delta_y"`, `"delta_minus"`).
        alignment_threshold: The same for the alignment errors, whose values are several times
            smaller, and one of which is the default; `None` takes `threshold`. A model's own
            configuration may override it with an entry `_dicache_threshold`.
        preset: Name of the published rules for the family, or `None`.
        ascending_timesteps: Whether timesteps rise during a run.
        module: The module that the class is in, or a package around it; `None`: any. Several
            projects have a `WanModel`.
        timestep: Name of the argument of the model's `forward` that carries the timestep. `None`:
            it has none, so that only a scheduler can tell where a run begins.
        text: Name of the argument that tells branches of guidance apart where nobody names them:
            the text embedding. `None`: it has none, so that there is one branch.
        behind_probe: Names of the arguments that change what blocks behind the probe compute,
            which it does not see. Where tensors among them begin, end or change their scale in the
            middle of a run, or numbers change at all, the trajectory begins anew. Those that
            `forward` lacks do not matter.
        unread: Outputs of blocks that nothing reads behind the last block. A reused step leaves
            them as they came in.
        tokens_tell_noise: Whether tokens come to block 0 as the latents do, so that they show a
            sampler that adds noise in every step. Not where layers before it see the timestep,
            which moves tokens by itself; then only what is known of the scheduler counts.
        own_timesteps: Whether its pipelines give it timesteps that are not the scheduler's times a
            factor; rising ones never are.

    Raises:
        ValueError: There are no stacks, or blocks return something beside the tokens that may be
            read behind the last block, or a stack has other streams than the first.
    """

    name: str
    model_class: str
    stacks: tuple[BlockStack, ...]
    threshold: float
    alignment_threshold: float | None = None
    preset: str | None = None
    ascending_timesteps: bool = False
    module: str | None = None
    timestep: str | None = TIMESTEP
    text: str | None = TEXT
    behind_probe: tuple[str, ...] = BEHIND_PROBE
    unread: tuple[str, ...] = TEXT_STREAMS
    tokens_tell_noise: bool = True
    own_timesteps: bool = False

    def __post_init__(self) -> None:
        if not self.stacks:
            raise ValueError(
                f"Family {self.name!r} has no stacks. Expected at least one BlockStack."
            )
        for stack in self.stacks:
            self._check_outputs(stack)

    def _check_outputs(self, stack: BlockStack) -> None:
        for name in stack.streams:
            if name not in stack.outputs:
                raise ValueError(
                    f"Blocks of {stack.attribute!r} return {', '.join(stack.outputs)}. Expected "
                    f"{name!r} among them, which carries the image tokens; name it in "
                    f"BlockStack(hidden_states=...)."
                )
        several = len(stack.streams)
        if several != len(self.stacks[0].streams) or not several:
            raise ValueError(
                f"Blocks of {stack.attribute!r} have {several} token streams and those of "
                f"{self.stacks[0].attribute!r} {len(self.stacks[0].streams)}. Expected the same "
                f"ones everywhere, at least one, in BlockStack(hidden_states=...)."
            )
        if several > 1 and (stack.text_in_front or stack.text_behind):
            raise ValueError(
                f"Blocks of {stack.attribute!r} have {several} token streams, and text in one of "
                f"them. Expected one stream where text is in it (text_in_front, text_behind)."
            )
        others = [
            each for each in stack.outputs if each not in (*stack.streams, self.text, *self.unread)
        ]
        if others:
            raise ValueError(
                f"Blocks of {stack.attribute!r} return {others[0]!r} beside the image tokens. A "
                f"reused step gives only those their residual, and whatever reads {others[0]!r} "
                f"behind the last block would get it as it came in. If nothing does, as with a "
                f"text stream, say so: ModelFamily(unread=({others[0]!r},)). If something does, it "
                f"is a stream of tokens, too: "
                f"BlockStack(hidden_states={(*stack.streams, others[0])!r})."
            )

    @property
    def default_threshold(self) -> float:
        """The threshold that `DiCacheConfig()` takes."""
        own = self.alignment_threshold
        return self.threshold if own is None else own

    def threshold_for(self, error: ErrorRule, model: Any) -> float:
        """What `DiCacheConfig(threshold=None)` means for this model under an error's rule."""
        if not error.verifies_alignment:
            return self.threshold
        settings = getattr(model, "config", None)
        own = settings.get("_dicache_threshold") if isinstance(settings, Mapping) else None
        return self.default_threshold if own is None else float(own)

    def blocks(self, model: Any) -> list[tuple[nn.Module, BlockStack]]:
        """The model's blocks in the order in which they run, each with its stack.

        Raises:
            ValueError: The model lacks a block list that the family names.
        """
        missing = [s.attribute for s in self.stacks if not hasattr(model, s.attribute)]
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no block list {missing[0]!r}, which its family "
                f"{self.name!r} names."
            )
        return [(block, s) for s in self.stacks for block in getattr(model, s.attribute)]

    def is_of(self, kind: type) -> bool:
        """Whether this is a class's own row, not that of a class that it derives from."""
        if kind.__name__ != self.model_class:
            return False
        inside = f"{kind.__module__}."
        return self.module is None or inside.startswith(f"{self.module}.")


_FAMILIES: list[ModelFamily] = []


def register_family(family: ModelFamily) -> None:
    """Support the transformer class `family.model_class`.

    Raises:
        ValueError: The class has a family already.
    """
    for known in _FAMILIES:
        if (known.model_class, known.module) == (family.model_class, family.module):
            raise ValueError(
                f"{family.model_class} is registered already, as family {known.name!r}. A class of "
                f"that name in another package needs a row with its own `module`."
            )
    _FAMILIES.append(family)


def supported_families() -> tuple[ModelFamily, ...]:
    """All supported families."""
    return tuple(_FAMILIES)


def find_family(model: object) -> ModelFamily | None:
    """The family of `model`'s class or of the nearest base class that has one.

    Of several rows for a class of this name the one whose `module` is longest is taken.
    """
    for base in type(model).__mro__:
        found = [family for family in _FAMILIES if family.is_of(base)]
        if found:
            return max(found, key=lambda family: len(family.module or ""))
    return None


def unwrapped(module: Any) -> Any:
    """The module inside of what FSDP, activation checkpointing and torch.compile put around it."""
    while True:
        names = [name for name in _WRAPPED if name in getattr(module, "_modules", {})]
        if not names:
            return module
        module = module._modules[names[0]]
