"""Tiny transformers of every supported family, with random weights and inputs that fit them.

A model has four blocks of width 16 to 48, in fp32 and evaluation mode, and depends only on its
seed. Parameters that are zero at initialisation get random values, so that no residual is trivial.
`TinyFamily` also says, independently of `dicache.adapters.diffusers.table`, where a block's output
carries the image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import CacheMixin
from torch import Tensor, nn

TEXT_TOKENS = 5
TEXT_WIDTH = 16
AUDIO_TOKENS = 4


@dataclass(frozen=True)
class TinyFamily:
    """How to build and call one family's model.

    Attributes:
        model_class: Name of the class in diffusers.
        config: Its arguments.
        latents: Shape of the hidden states, from (batch, size).
        inputs: The other arguments of a call, from (batch, size, generator).
        stacks: Attributes of the block lists, in the order in which they run.
        image_output: Place of the image tokens in the tuple that a block returns. A block that
            returns a bare tensor has them at the tensor's end.
        streams: Names of the tokens that a block takes and returns, if there are several streams:
            they are then its first arguments and all that it returns.
        image_first: They are at such a tensor's beginning.
        timesteps: First and last timestep of a run.
        names: Arguments of a call that carry latents and timestep.
        as_list: Whether latents go in and come out as a list, a tensor a sample.
        other_latents: Shapes of further latents of a call, as `latents`, by argument.
        shares_timestep: Whether a call has one timestep, not one a sample.
    """

    model_class: str
    config: dict[str, Any]
    latents: Callable[[int, int], tuple[int, ...]]
    inputs: Callable[[int, int, torch.Generator], dict[str, Any]]
    stacks: tuple[str, ...] = ("transformer_blocks",)
    image_output: int = 0
    image_first: bool = False
    timesteps: tuple[float, float] = (1000.0, 100.0)
    names: tuple[str, str] = ("hidden_states", "timestep")
    as_list: bool = False
    streams: tuple[str, ...] = ()
    other_latents: dict[str, Callable[[int, int], tuple[int, ...]]] = field(default_factory=dict)
    shares_timestep: bool = False


def build(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The tiny model of family `name`; equal seeds give equal weights."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, family.model_class)(**{**family.config, **overrides})
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def calls(
    name: str, num_steps: int = 6, *, seed: int = 0, batch: int = 2, size: int = 4
) -> list[dict[str, Any]]:
    """Keyword arguments of the calls of one run, which share text and masks as pipelines do."""
    family = FAMILIES[name]
    arguments = family.inputs(batch, size, torch.Generator().manual_seed(seed))
    first, last = family.timesteps
    steps = []
    for share in torch.linspace(0, 1, num_steps).tolist():
        timestep = first + share * (last - first)
        inputs = {
            family.names[1]: torch.full((1 if family.shares_timestep else batch,), timestep),
            "return_dict": False,
            **arguments,
        }
        for k, (other, shape) in enumerate(family.other_latents.items()):
            inputs[other] = _on_the_way(shape(batch, size), share, seed + 11 + 2 * k)
        latents = _on_the_way(family.latents(batch, size), share, seed + 1)
        steps.append(with_latents(name, inputs, latents))
    return steps


def _on_the_way(shape: tuple[int, ...], share: float, seed: int) -> Tensor:
    """Latents between noise and a picture.

    The probes of a straight line would all be alike; a wave bends it.
    """
    noise, picture = (_normal(shape, seed + k) for k in (0, 1))
    return (1 - share) * noise + share * picture + 0.3 * torch.sin(4 * share + picture)


def latents_of(name: str, inputs: dict[str, Any]) -> Tensor:
    """The latents of a call, as one tensor."""
    return _as_tensor(inputs[FAMILIES[name].names[0]])


def with_latents(name: str, inputs: dict[str, Any], latents: Tensor) -> dict[str, Any]:
    """The call with these latents instead."""
    family = FAMILIES[name]
    return {**inputs, family.names[0]: [*latents] if family.as_list else latents}


def run_model(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the model makes of the latents of a call, as one tensor."""
    return output_of(model, model(**inputs))


def output_of(model: nn.Module, output: Any) -> Tensor:
    """What a call returned, as one tensor; of several kinds of latents [B, all of them]."""
    kinds = {family.model_class: 1 + len(family.other_latents) for family in FAMILIES.values()}
    count = kinds[type(model).__name__]
    if count == 1:
        return _as_tensor(output[0])
    return torch.cat([each.flatten(1) for each in output[:count]], dim=1)


def branches(name: str, num_steps: int) -> list[list[dict[str, Any]]]:
    """The calls of two branches of guidance: the same latents, and a prompt of each one's own."""
    one, other = calls(name, num_steps), calls(name, num_steps, seed=7)
    keys = (*FAMILIES[name].names, *FAMILIES[name].other_latents)
    return [one, [{**o, **{k: i[k] for k in keys}} for i, o in zip(one, other, strict=True)]]


def context(model: Any, name: str) -> AbstractContextManager[Any]:
    """That a pipeline would put around a call, where the model's class knows any."""
    return model.cache_context(name) if isinstance(model, CacheMixin) else nullcontext()


def blocks(name: str, model: nn.Module) -> list[nn.Module]:
    """The model's blocks, in the order in which they run."""
    return [block for stack in FAMILIES[name].stacks for block in getattr(model, stack)]


def _as_tensor(value: Any) -> Tensor:
    return torch.stack(value) if isinstance(value, list) else value


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _text(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator)


def _mask(batch: int) -> Tensor:
    mask = torch.ones(batch, TEXT_TOKENS)
    mask[0, -1] = 0
    return mask


def _grid(size: int, axes: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    ids = torch.zeros(size * size, axes)
    ids[:, 1], ids[:, 2] = rows.flatten(), columns.flatten()
    return ids


def _flux_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(batch, generator),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "img_ids": _grid(size, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def _flux2_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(batch, generator),
        "img_ids": _grid(size, 4),
        "txt_ids": torch.zeros(TEXT_TOKENS, 4),
        "guidance": torch.full((batch,), 4.0),
    }


def _chroma_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(batch, generator),
        "img_ids": _grid(size, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "attention_mask": torch.ones(batch, TEXT_TOKENS + size * size),
    }


def _qwen_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(batch, generator),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT_TOKENS).long(),
        "img_shapes": [[(1, size, size)]] * batch,
    }


def _hunyuan_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(batch, generator),
        "encoder_attention_mask": _mask(batch),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
    }


def _hunyuan15_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(batch, generator),
        "encoder_attention_mask": _mask(batch),
        "encoder_hidden_states_2": _text(batch, generator),
        "encoder_attention_mask_2": _mask(batch),
        "image_embeds": torch.zeros(batch, 2, 16),
    }


def _text_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"encoder_hidden_states": _text(batch, generator)}


def _masked_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {**_text_inputs(batch, size, generator), "encoder_attention_mask": _mask(batch)}


def _ltx_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    shape = {"num_frames": 2, "height": size, "width": size}
    return {**_masked_inputs(batch, size, generator), **shape}


def _mochi_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    inputs = _masked_inputs(batch, size, generator)
    return {**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"].bool()}


def _sd3_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    pooled = torch.randn(batch, 16, generator=generator)
    return {**_text_inputs(batch, size, generator), "pooled_projections": pooled}


def _cogview4_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    side = torch.full((batch, 2), 16.0 * size)
    sizes = {"original_size": side, "target_size": side, "crop_coords": torch.zeros(batch, 2)}
    return {**_text_inputs(batch, size, generator), **sizes}


def _hunyuan_image_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_masked_inputs(batch, size, generator),
        "encoder_hidden_states_2": _text(batch, generator),
        "encoder_attention_mask_2": _mask(batch),
    }


def _ids_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    ids = {"img_ids": _grid(size, 3), "txt_ids": torch.zeros(TEXT_TOKENS, 3)}
    return {**_text_inputs(batch, size, generator), **ids}


def _kandinsky_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_sd3_inputs(batch, size, generator),
        "visual_rope_pos": (torch.arange(2), torch.arange(size), torch.arange(size)),
        "text_rope_pos": torch.arange(TEXT_TOKENS),
        "return_dict": True,  # the only way to get more than the first sample by number
    }


def _lumina_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    # Masks of ones: what fills up shorter texts is a part of the tokens, and of their errors.
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.long)
    return {**_text_inputs(batch, size, generator), "encoder_attention_mask": mask}


def _vace_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    control = torch.randn(batch, 6, 2, 2 * size, 2 * size, generator=generator)
    return {
        **_text_inputs(batch, size, generator),
        "control_hidden_states": control,
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def _framepack_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    def history(frames: int) -> Tensor:
        return torch.randn(batch, 4, frames, 2 * size, 2 * size, generator=generator)

    return {
        **_hunyuan_inputs(batch, size, generator),
        "image_embeds": torch.randn(batch, 2, 16, generator=generator),
        "indices_latents": torch.arange(8, 10),
        "latents_clean": history(2),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": history(2),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": history(4),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


def _glm_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    prior = torch.randint(0, 8, (batch, size * size), generator=generator)
    return {
        **_text_inputs(batch, size, generator),
        "prior_token_id": prior,
        "prior_token_drop": torch.zeros(batch, size * size, dtype=torch.bool),
        "target_size": torch.full((batch, 2), 16.0 * size),
        "crop_coords": torch.zeros(batch, 2),
    }


def _animate_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    pose = torch.randn(batch, 4, 1, 2 * size, 2 * size, generator=generator)
    face = torch.randn(batch, 3, 4, 8, 8, generator=generator)
    given = {"pose_hidden_states": pose, "face_pixel_values": face}
    return {**_text_inputs(batch, size, generator), **given}


def _hidream_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    layers = torch.randn(2, batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    return {
        "encoder_hidden_states_t5": _text(batch, generator),
        "encoder_hidden_states_llama3": layers,
        "pooled_embeds": torch.randn(batch, 16, generator=generator),
    }


def _qwen21_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    slots = torch.arange(TEXT_TOKENS + size * size // 4) >= TEXT_TOKENS  # of four tokens each
    return {
        **_text_inputs(batch, size, generator),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT_TOKENS).long(),
        "img_shapes": [[(1, size, size)]] * batch,
        "img_mask": slots.expand(batch, -1),
    }


def _audio_video_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_ltx_inputs(batch, size, generator),
        "audio_encoder_hidden_states": _text(batch, generator),
        "audio_encoder_attention_mask": _mask(batch),
        "audio_num_frames": AUDIO_TOKENS,
    }


def _packed_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    """Text, audio and two frames of video in one sequence."""
    counts = (TEXT_TOKENS, AUDIO_TOKENS, 2 * size * size)
    text, audio, video = torch.arange(sum(counts)).split(counts)
    rows = torch.meshgrid(torch.arange(2), torch.arange(size), torch.arange(size), indexing="ij")
    others = torch.arange(len(text) + len(audio))[:, None].expand(-1, 3)
    return {
        **_text_inputs(batch, size, generator),
        "timestep_indices": torch.zeros(sum(counts), dtype=torch.long),
        "token_tags": torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor(counts)),
        "position_ids": torch.cat([others, torch.stack(rows, dim=-1).flatten(0, 2)]),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def _hunyuan_dit_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        **_text_inputs(batch, size, generator),
        "text_embedding_mask": torch.ones(batch, TEXT_TOKENS),
        "encoder_hidden_states_t5": _text(batch, generator),
        "text_embedding_mask_t5": torch.ones(batch, TEXT_TOKENS),
    }


def _flux3_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    ids = {"img_ids": _grid(size, 4), "txt_ids": torch.zeros(TEXT_TOKENS, 4)}
    reference = torch.randn(batch, 4, 16, generator=generator)
    cond = {"image_cond_hidden_states": reference, "image_cond_ids": _grid(2, 4)}
    return {**_text_inputs(batch, size, generator), **ids, **cond}


def _z_image_inputs(batch: int, size: int, generator: torch.Generator) -> dict[str, Any]:
    return {"cap_feats": [*_text(batch, generator)]}


def _picture(channels: int, patch: int = 2) -> Callable[[int, int], tuple[int, ...]]:
    return lambda batch, size: (batch, channels, patch * size, patch * size)


def _packed(channels: int, frames: int = 1) -> Callable[[int, int], tuple[int, ...]]:
    return lambda batch, size: (batch, frames * size * size, channels)


def _video(channels: int, patch: int = 2) -> Callable[[int, int], tuple[int, ...]]:
    return lambda batch, size: (batch, channels, 2, patch * size, patch * size)


def _audio(channels: int) -> Callable[[int, int], tuple[int, ...]]:
    return lambda batch, size: (batch, AUDIO_TOKENS, channels)


_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}
_JOINT: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, **_HEADS}
_WAN: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
_TWO_STACKS = ("transformer_blocks", "single_transformer_blocks")
_UNIT = (1.0, 0.1)  # the timesteps of models that multiply them by 1000 themselves

FAMILIES: dict[str, TinyFamily] = {
    "flux": TinyFamily(
        "FluxTransformer2DModel",
        {
            **_JOINT,
            "in_channels": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 4),
        },
        _packed(16),
        _flux_inputs,
        stacks=_TWO_STACKS,
        image_output=1,
        timesteps=_UNIT,
    ),
    "hunyuan-video": TinyFamily(
        "HunyuanVideoTransformer3DModel",
        {
            **_JOINT,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 2,
            "text_embed_dim": TEXT_WIDTH,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 4, 4),
        },
        _video(4),
        _hunyuan_inputs,
        stacks=_TWO_STACKS,
    ),
    "wan": TinyFamily(
        "WanTransformer3DModel",
        _WAN,
        _video(4),
        _text_inputs,
        stacks=("blocks",),
    ),
    "flux2": TinyFamily(
        "Flux2Transformer2DModel",
        {
            **_JOINT,
            "attention_head_dim": 16,
            "in_channels": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _packed(16),
        _flux2_inputs,
        stacks=_TWO_STACKS,
        image_output=1,
        timesteps=_UNIT,
    ),
    "chroma": TinyFamily(
        "ChromaTransformer2DModel",
        {
            **_JOINT,
            "in_channels": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": (4, 4, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _packed(16),
        _chroma_inputs,
        stacks=_TWO_STACKS,
        image_output=1,
        timesteps=_UNIT,
    ),
    "qwen-image": TinyFamily(
        "QwenImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": (4, 4, 4),
        },
        _packed(16),
        _qwen_inputs,
        image_output=1,
        timesteps=_UNIT,
    ),
    "cogvideox": TinyFamily(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT_WIDTH,
            "num_layers": 4,
            "max_text_seq_length": TEXT_TOKENS,
            "use_rotary_positional_embeddings": True,
        },
        lambda batch, size: (batch, 2, 4, 2 * size, 2 * size),
        _text_inputs,
    ),
    "ltx": TinyFamily(
        "LTXVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 24,
            "num_layers": 4,
            "caption_channels": TEXT_WIDTH,
        },
        _packed(8, frames=2),
        _ltx_inputs,
    ),
    "mochi": TinyFamily(
        "MochiTransformer3DModel",
        {
            **_HEADS,
            "num_layers": 4,
            "in_channels": 4,
            "pooled_projection_dim": 16,
            "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 4,
            "max_sequence_length": TEXT_TOKENS,
        },
        _video(4),
        _mochi_inputs,
        timesteps=(0.0, 900.0),
    ),
    "hunyuan-video-1.5": TinyFamily(
        "HunyuanVideo15Transformer3DModel",
        {
            **_HEADS,
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_WIDTH,
            "text_embed_2_dim": TEXT_WIDTH,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 4, 4),
            "task_type": "t2v",
        },
        _video(9, patch=1),
        _hunyuan15_inputs,
    ),
    "sd3": TinyFamily(
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": TEXT_WIDTH,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        _picture(4),
        _sd3_inputs,
        image_output=1,
    ),
    "auraflow": TinyFamily(
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": TEXT_WIDTH,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 64,
        },
        _picture(4),
        _text_inputs,
        stacks=("joint_transformer_blocks", "single_transformer_blocks"),
        image_output=1,
        timesteps=_UNIT,
    ),
    "sana": TinyFamily(
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": TEXT_WIDTH,
            "sample_size": 4,
        },
        _picture(4, patch=1),
        _masked_inputs,
    ),
    "cogview4": TinyFamily(
        "CogView4Transformer2DModel",
        {
            **_HEADS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "pos_embed_max_size": 16,
            "sample_size": 8,
            "rope_axes_dim": (16, 16),
        },
        _picture(4),
        _cogview4_inputs,
    ),
    "hunyuan-image": TinyFamily(
        "HunyuanImageTransformer2DModel",
        {
            **_JOINT,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_WIDTH,
            "text_embed_2_dim": TEXT_WIDTH,
            "rope_axes_dim": (6, 6),
        },
        _picture(4, patch=1),
        _hunyuan_image_inputs,
        stacks=_TWO_STACKS,
    ),
    "longcat-image": TinyFamily(
        "LongCatImageTransformer2DModel",
        {
            **_JOINT,
            "in_channels": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 4),
        },
        _packed(16),
        _ids_inputs,
        stacks=_TWO_STACKS,
        image_output=1,
        timesteps=_UNIT,
    ),
    "ovis-image": TinyFamily(
        "OvisImageTransformer2DModel",
        {
            **_JOINT,
            "in_channels": 16,
            "out_channels": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": (4, 4, 4),
        },
        _packed(16),
        _ids_inputs,
        stacks=_TWO_STACKS,
        image_output=1,
        timesteps=_UNIT,
    ),
    "bria": TinyFamily(
        "BriaTransformer2DModel",
        {
            **_JOINT,
            "in_channels": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": (4, 4, 4),
        },
        _packed(16),
        _ids_inputs,
        stacks=_TWO_STACKS,
        image_output=1,
    ),
    "lumina2": TinyFamily(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": TEXT_WIDTH,
        },
        _picture(4),
        _lumina_inputs,
        stacks=("layers",),
        timesteps=(0.0, 0.9),
    ),
    "skyreels-v2": TinyFamily(
        "SkyReelsV2Transformer3DModel",
        _WAN,
        _video(4),
        _text_inputs,
        stacks=("blocks",),
    ),
    "chronoedit": TinyFamily(
        "ChronoEditTransformer3DModel",
        {**_WAN, "rope_temporal_skip_len": 2},
        _video(4),
        _text_inputs,
        stacks=("blocks",),
    ),
    "wan-vace": TinyFamily(
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0, 2], "vace_in_channels": 6},
        _video(4),
        _vace_inputs,
        stacks=("blocks",),
    ),
    "framepack": TinyFamily(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_JOINT,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_WIDTH,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 4, 4),
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        _video(4),
        _framepack_inputs,
        stacks=_TWO_STACKS,
    ),
    "kandinsky5": TinyFamily(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT_WIDTH,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 4,
            "axes_dims": (4, 4, 4),
        },
        lambda batch, size: (batch, 2, 2 * size, 2 * size, 4),
        _kandinsky_inputs,
        stacks=("visual_transformer_blocks",),
    ),
    "z-image": TinyFamily(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 4,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": TEXT_WIDTH,
            "axes_dims": [4, 4, 4],
            "axes_lens": [128, 16, 16],
        },
        lambda batch, size: (batch, 4, 1, 2 * size, 2 * size),
        _z_image_inputs,
        stacks=("layers",),
        timesteps=(0.0, 0.9),
        names=("x", "t"),
        as_list=True,
    ),
    "glm-image": TinyFamily(
        "GlmImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 8,
        },
        _picture(4),
        _glm_inputs,
    ),
    "wan-animate": TinyFamily(
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4},
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _video(12),
        _animate_inputs,
        stacks=("blocks",),
    ),
    "cosmos": TinyFamily(
        "CosmosTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_WIDTH,
            "adaln_lora_dim": 4,
            "max_size": (8, 16, 16),
            "concat_padding_mask": False,  # it would take torchvision
            "controlnet_block_every_n": 2,
        },
        _video(4),
        _text_inputs,
        timesteps=_UNIT,
    ),
    "hidream": TinyFamily(
        "HiDreamImageTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": [TEXT_WIDTH, TEXT_WIDTH],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 4, 4),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 0, 1],
        },
        _picture(4),
        _hidream_inputs,
        stacks=("double_stream_blocks", "single_stream_blocks"),
        image_first=True,
        names=("hidden_states", "timesteps"),
    ),
    "qwen-image-2.1": TinyFamily(
        "QwenImage21Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 4,
            "context_in_dim": TEXT_WIDTH,
            "mlp_ratio": 2,
            "axes_dims_rope": (4, 4, 4),
        },
        _packed(16),
        _qwen21_inputs,
        timesteps=_UNIT,
    ),
    "ltx2": TinyFamily(
        "LTX2VideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 24,
            "audio_in_channels": 6,
            "audio_out_channels": 6,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 4,
            "caption_channels": TEXT_WIDTH,
        },
        _packed(8, frames=2),
        _audio_video_inputs,
        streams=("hidden_states", "audio_hidden_states"),
        other_latents={"audio_hidden_states": _audio(6)},
    ),
    "kandinsky6": TinyFamily(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT_WIDTH,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 4,
            "axes_dims": (4, 4, 4),
            "visual_cond": False,
            "in_audio_dim": 6,
            "out_audio_dim": 6,
            "model_dim_a": 16,
            "axes_dims_a": (4, 2, 2),
        },
        lambda batch, size: (batch, 2, 2 * size, 2 * size, 4),
        _sd3_inputs,
        stacks=("visual_transformer_blocks",),
        streams=("vis", "aud"),
        other_latents={"audio_hidden_states": _audio(6)},
    ),
    "minimax-h3": TinyFamily(
        "MiniMaxH3Transformer3DModel",
        {
            **_HEADS,
            "hidden_size": 24,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 2,
            "audio_in_channels": 6,
            "text_dim": TEXT_WIDTH,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _packed(8, frames=2),
        _packed_inputs,
        timesteps=(0.0, 0.9),
        other_latents={"audio_hidden_states": _audio(6)},
        shares_timestep=True,
    ),
    "hunyuan-dit": TinyFamily(
        "HunyuanDiT2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 24,
            "num_layers": 4,
            "learn_sigma": False,
            "cross_attention_dim": TEXT_WIDTH,
            "cross_attention_dim_t5": TEXT_WIDTH,
            "pooled_projection_dim": 16,
            "text_len": TEXT_TOKENS,
            "text_len_t5": TEXT_TOKENS,
            "use_style_cond_and_image_meta_size": False,
        },
        _picture(4),
        _hunyuan_dit_inputs,
        stacks=("blocks",),
    ),
    "motif-video": TinyFamily(
        "MotifVideoTransformer3DModel",
        {
            **_JOINT,
            "in_channels": 4,
            "out_channels": 4,
            "num_decoder_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_WIDTH,
            "rope_axes_dim": (4, 4, 4),
        },
        _video(4),
        _text_inputs,
        stacks=_TWO_STACKS,
    ),
    "flux3": TinyFamily(
        "Flux3Transformer2DModel",
        {
            **_HEADS,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 4,
            "in_channels": 16,
            "cond_in_channels": 16,
            "joint_attention_dim": TEXT_WIDTH,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _packed(16),
        _flux3_inputs,
        stacks=("single_transformer_blocks",),
        image_output=1,
        timesteps=_UNIT,
    ),
}

# HunyuanVideo image-to-video has block classes of its own.
FAMILIES["hunyuan-video-i2v"] = replace(
    FAMILIES["hunyuan-video"],
    config={**FAMILIES["hunyuan-video"].config, "image_condition_type": "token_replace"},
)
# Only where nothing is modulated by its own do samples have a row each.
FAMILIES["qwen-image-2.1-not-causal"] = replace(
    FAMILIES["qwen-image-2.1"],
    config={**FAMILIES["qwen-image-2.1"].config, "causal_condition": False},
)
