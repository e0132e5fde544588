"""Stand-ins for vLLM-Omni 0.30.0 and SGLang 0.5.23: their models, and what calls a cache there.

Models have the names, modules, block lists, arguments and returns of the engines' classes, as those
call each other; `tests/test_serving_releases.py` compares them with the released source. What they
compute is smooth and of no meaning.
"""

from __future__ import annotations

import abc
import enum
import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

WIDTH, CHANNELS, TEXT_WIDTH = 16, 4, 8
IN_VLLM_OMNI = "vllm_omni.diffusion.models"
IN_SGLANG = "sglang.multimodal_gen.runtime.models.dits"


class Block(nn.Module):
    """What all blocks here compute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def mix(self, x: Tensor, text: Tensor | None, temb: Tensor, scale: float = 0.3) -> Tensor:
        seen = x.mean(1, keepdim=True) + temb[:, None]
        if text is not None:
            seen = seen + text.mean(1, keepdim=True)
        return x + scale * (self.linear(x) + seen).sin()

    def both(self, image: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """(text, image)"""
        changed = text + 0.1 * (self.other(text) + image.mean(1, keepdim=True)).sin()
        return changed, self.mix(image, text, temb)


class Model(nn.Module):
    """What all models here have around their blocks."""

    depth = 4

    def __init__(self) -> None:
        super().__init__()
        self.image_in, self.text_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(TEXT_WIDTH, WIDTH)
        self.time_in, self.head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.parallel_config = SimpleNamespace(sequence_parallel_size=1)

    def blocks_of(self, kind: type[nn.Module], depth: int | None = None) -> nn.ModuleList:
        return nn.ModuleList(kind() for _ in range(depth or self.depth))

    def temb(self, timestep: Tensor, scale: float) -> Tensor:
        return self.time_in(timestep.reshape(len(timestep), -1)[:, :1] * scale)


def of(module: str) -> Callable[[type], type]:
    """Let a class say that it is from this module."""

    def decorate(kind: type) -> type:
        kind.__module__ = module
        return kind

    return decorate


# --- vLLM-Omni -----------------------------------------------------------------------------------


class TextFirstBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
    ):
        return self.both(hidden_states, encoder_hidden_states, temb)


class TextFirstModel(Model):
    """Two lists whose blocks return (text, image): Flux, LongCat-Image, Ovis-Image."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = self.blocks_of(TextFirstBlock)
        self.single_transformer_blocks = self.blocks_of(TextFirstBlock)

    def run(self, image, text, timestep, **more):
        image, text, temb = self.image_in(image), self.text_in(text), self.temb(timestep, 1.0)
        rotary = (image.new_zeros(7, 2), image.new_zeros(7, 2))
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=temb,
                image_rotary_emb=rotary,
                **more,
            )
        return (self.head(image),)


@of(f"{IN_VLLM_OMNI}.flux.flux_transformer")
class FluxTransformer2DModel(TextFirstModel):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        joint_attention_kwargs=None,
        return_dict=True,
    ):
        more = {"joint_attention_kwargs": joint_attention_kwargs}
        return self.run(hidden_states, encoder_hidden_states, timestep, **more)


@of(f"{IN_VLLM_OMNI}.flux.flux_transformer")
class FluxKontextTransformer2DModel(FluxTransformer2DModel):
    pass


@of(f"{IN_VLLM_OMNI}.longcat_image.longcat_image_transformer")
class LongCatImageTransformer2DModel(TextFirstModel):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        return_dict=True,
    ):
        return self.run(hidden_states, encoder_hidden_states, timestep)


@of(f"{IN_VLLM_OMNI}.ovis_image.ovis_image_transformer")
class OvisImageTransformer2DModel(TextFirstModel):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        return_dict=True,
    ):
        return self.run(hidden_states, encoder_hidden_states, timestep)


class Flux2TransformerBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb_mod_params_img,
        temb_mod_params_txt,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
    ):
        return self.both(hidden_states, encoder_hidden_states, temb_mod_params_img[0][0])


class Flux2SingleTransformerBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb_mod_params,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
        split_hidden_states=False,
        text_seq_len=None,
    ):
        assert encoder_hidden_states is None and not split_hidden_states and text_seq_len
        return self.mix(hidden_states, None, temb_mod_params[0])


@of(f"{IN_VLLM_OMNI}.flux2.flux2_transformer")
class Flux2Transformer2DModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = self.blocks_of(Flux2TransformerBlock)
        self.single_transformer_blocks = self.blocks_of(Flux2SingleTransformerBlock)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        joint_attention_kwargs=None,
        return_dict=True,
    ):
        image, text = self.image_in(hidden_states), self.text_in(encoder_hidden_states)
        temb = self.temb(timestep, 1.0)
        modulation = ((temb, temb, temb), (temb, temb, temb))
        more = {"image_rotary_emb": None, "joint_attention_kwargs": joint_attention_kwargs or {}}
        for block in self.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb_mod_params_img=modulation,
                temb_mod_params_txt=modulation,
                **more,
            )
        length = text.shape[1]
        joint = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            joint = block(
                hidden_states=joint,
                encoder_hidden_states=None,
                temb_mod_params=modulation[0],
                text_seq_len=length,
                **more,
            )
        return (self.head(joint[:, length:]),)


class QwenImageTransformerBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        temb,
        image_rotary_emb,
        joint_attention_kwargs=None,
        modulate_index=None,
        hidden_states_mask=None,
    ):
        return self.both(hidden_states, encoder_hidden_states, temb)


@of(f"{IN_VLLM_OMNI}.qwen_image.qwen_image_transformer")
class QwenImageTransformer2DModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = self.blocks_of(QwenImageTransformerBlock)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        timestep=None,
        img_shapes=None,
        txt_seq_lens=None,
        guidance=None,
        attention_kwargs=None,
        additional_t_cond=None,
        return_dict=True,
    ):
        image, text = self.image_in(hidden_states), self.text_in(encoder_hidden_states)
        for block in self.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                temb=self.temb(timestep, 1.0),
                image_rotary_emb=(image.new_zeros(7, 2), text.new_zeros(7, 2)),
                joint_attention_kwargs=attention_kwargs,
                modulate_index=None,
                hidden_states_mask=None,
            )
        return (self.head(image),)


class SD3TransformerBlock(Block):
    def forward(self, hidden_states, encoder_hidden_states, temb):
        return self.both(hidden_states, encoder_hidden_states, temb)


class SD3LastBlock(SD3TransformerBlock):
    """`context_pre_only`: it has no text to give."""

    def forward(self, hidden_states, encoder_hidden_states, temb):
        return None, super().forward(hidden_states, encoder_hidden_states, temb)[1]


@of(f"{IN_VLLM_OMNI}.sd3.sd3_transformer")
class SD3Transformer2DModel(Model):
    def __init__(self) -> None:
        super().__init__()
        blocks = self.blocks_of(SD3TransformerBlock, self.depth - 1)
        self.transformer_blocks = blocks.append(SD3LastBlock())

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        return_dict=True,
    ):
        image, text = self.image_in(hidden_states), self.text_in(encoder_hidden_states)
        temb = self.temb(timestep, 1e-3)
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        return (self.head(image),)


class HunyuanVideo15TransformerBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        attention_mask=None,
        freqs_cis=None,
        hidden_states_mask=None,
    ):
        return self.both(hidden_states, encoder_hidden_states, temb)[::-1]


@of(f"{IN_VLLM_OMNI}.hunyuan_video.hunyuan_video_15_transformer")
class HunyuanVideo15Transformer3DModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = self.blocks_of(HunyuanVideo15TransformerBlock)

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_attention_mask,
        timestep_r=None,
        encoder_hidden_states_2=None,
        encoder_attention_mask_2=None,
        image_embeds=None,
        image_embeds_mask=None,
        attention_kwargs=None,
        return_dict=True,
    ):
        image = self.image_in(hidden_states.flatten(2).transpose(1, 2))
        text, temb = self.text_in(encoder_hidden_states), self.temb(timestep, 1e-3)
        rotary = (image.new_zeros(7, 2), image.new_zeros(7, 2))
        for block in self.transformer_blocks:
            image, text = block(
                image, text, temb, encoder_attention_mask, rotary, hidden_states_mask=None
            )
        return (self.head(image).transpose(1, 2).reshape(hidden_states.shape),)


class WanTransformerBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        rotary_emb,
        hidden_states_mask=None,
        vsa_dit_seq_shape=None,
        preserve_vsa_all_blocks=False,
    ):
        return self.mix(hidden_states, encoder_hidden_states, temb[:, 0])


@of(f"{IN_VLLM_OMNI}.wan2_2.wan2_2_transformer")
class WanTransformer3DModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks_of(WanTransformerBlock)
        self.start_layer, self.end_layer = 0, self.depth

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_hidden_states_image=None,
        intermediate_tensors=None,
        return_dict=True,
        attention_kwargs=None,
    ):
        image = self.image_in(hidden_states.flatten(2).transpose(1, 2))
        text = self.text_in(encoder_hidden_states)
        temb = self.temb(timestep, 1e-3)[:, None].expand(-1, 6, -1)
        rotary = (image.new_zeros(1, 7, 1, 2), image.new_zeros(1, 7, 1, 2))
        for block in self.blocks[self.start_layer : self.end_layer]:
            image = block(image, text, temb, rotary, None, (1, 7, 1), False)
        return (self.head(image).transpose(1, 2).reshape(hidden_states.shape),)


@of(f"{IN_VLLM_OMNI}.wan2_2.wan2_2_vace_transformer")
class WanVACETransformer3DModel(WanTransformer3DModel):
    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_hidden_states_image=None,
        return_dict=True,
        attention_kwargs=None,
        vace_context=None,
        vace_context_scale=1.0,
    ):
        image = self.image_in(hidden_states.flatten(2).transpose(1, 2))
        text = self.text_in(encoder_hidden_states)
        temb = self.temb(timestep, 1e-3)[:, None].expand(-1, 6, -1)
        hint = vace_context.flatten(2).transpose(1, 2) @ self.image_in.weight.T
        for index, block in enumerate(self.blocks):
            image = block(image, text, temb, None, None, (1, 7, 1))
            if index in (0, 2):
                image = image + hint * vace_context_scale[0]
        return (self.head(image).transpose(1, 2).reshape(hidden_states.shape),)


@of(f"{IN_VLLM_OMNI}.bagel.bagel_transformer")
class UnknownTransformer(Model):
    pass


# --- SGLang --------------------------------------------------------------------------------------


class SGLangFluxBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        freqs_cis=None,
        complex_freqs=None,
        joint_attention_kwargs=None,
        num_replicated_prefix=0,
    ):
        return self.both(hidden_states, encoder_hidden_states, temb)


@of(f"{IN_SGLANG}.flux")
class SGLangFlux(Model):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = self.blocks_of(SGLangFluxBlock)
        self.single_transformer_blocks = self.blocks_of(SGLangFluxBlock)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        guidance=None,
        freqs_cis=None,
        joint_attention_kwargs=None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
    ):
        image, text = self.image_in(hidden_states), self.text_in(encoder_hidden_states)
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=self.temb(timestep, 1e-3),
                freqs_cis=image.new_zeros(7, 2),
                complex_freqs=None,
                joint_attention_kwargs=joint_attention_kwargs,
                num_replicated_prefix=text.shape[1],
            )
        return self.head(image)


SGLangFlux.__name__ = "FluxTransformer2DModel"


class SGLangQwenImageBlock(Block):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        temb_img_silu,
        temb_txt_silu,
        image_rotary_emb=None,
        joint_attention_kwargs=None,
        modulate_index=None,
        modulation_cache_key=None,
    ):
        # As there, blocks keep a modulation of the whole batch for calls with the same key.
        assert len(hidden_states) == modulation_cache_key.batch
        return self.both(hidden_states, encoder_hidden_states, temb_img_silu)


@of(f"{IN_SGLANG}.qwen_image")
class SGLangQwenImage(Model):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = self.blocks_of(SGLangQwenImageBlock)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        timestep=None,
        img_shapes=None,
        txt_seq_lens=None,
        freqs_cis=None,
        freqs_complex=None,
        additional_t_cond=None,
        guidance=None,
        attention_kwargs=None,
        controlnet_block_samples=None,
        return_dict=True,
    ):
        if isinstance(encoder_hidden_states, list):
            encoder_hidden_states = encoder_hidden_states[0]
        image, text = self.image_in(hidden_states), self.text_in(encoder_hidden_states)
        temb, key = self.temb(timestep, 1e-3), SimpleNamespace(batch=len(image))
        for block in self.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                temb_img_silu=temb,
                temb_txt_silu=temb,
                image_rotary_emb=freqs_cis,
                joint_attention_kwargs={"sp_text_sharded": False},
                modulate_index=None,
                modulation_cache_key=key,
            )
        return self.head(image)


SGLangQwenImage.__name__ = "QwenImageTransformer2DModel"


class MMDoubleStreamBlock(Block):
    def forward(self, img, txt, vec, freqs_cis, txt_is_sharded=False, seq_lens=None):
        return self.both(img, txt, vec)[::-1]


class MMSingleStreamBlock(Block):
    def forward(self, x, vec, txt_len, freqs_cis, txt_is_sharded=False, seq_lens=None):
        return self.mix(x, x[:, -txt_len:], vec)


@of(f"{IN_SGLANG}.hunyuanvideo")
class HunyuanVideoTransformer3DModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = self.blocks_of(MMDoubleStreamBlock)
        self.single_blocks = self.blocks_of(MMSingleStreamBlock)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        timestep,
        encoder_hidden_states_image=None,
        pooled_projections=None,
        guidance=None,
        **kwargs,
    ):
        img = self.image_in(hidden_states.flatten(2).transpose(1, 2))
        txt, vec = self.text_in(encoder_hidden_states[0]), self.temb(timestep, 1e-3)
        freqs = (img.new_zeros(7, 2), img.new_zeros(7, 2))
        for block in self.double_blocks:
            img, txt = block(*[img, txt, vec, freqs, False, None])
        x = torch.cat((img, txt), 1)
        for block in self.single_blocks:
            x = block(*[x, vec, txt.shape[1], freqs, False, None])
        out = self.head(x[:, : img.shape[1]])
        return out.transpose(1, 2).reshape(hidden_states.shape)


VLLM_OMNI: dict[str, type[Model]] = {
    "flux": FluxTransformer2DModel,
    "kontext": FluxKontextTransformer2DModel,
    "longcat": LongCatImageTransformer2DModel,
    "ovis": OvisImageTransformer2DModel,
    "flux2": Flux2Transformer2DModel,
    "qwen": QwenImageTransformer2DModel,
    "sd3": SD3Transformer2DModel,
    "hunyuan": HunyuanVideo15Transformer3DModel,
    "wan": WanTransformer3DModel,
    "vace": WanVACETransformer3DModel,
}
SGLANG: dict[str, type[Model]] = {
    "sglang-flux": SGLangFlux,
    "sglang-qwen": SGLangQwenImage,
    "sglang-hunyuan": HunyuanVideoTransformer3DModel,
}
VIDEOS = ("hunyuan", "wan", "vace", "sglang-hunyuan")
# Pipelines of these give thousandths of the scheduler's timesteps.
THOUSANDTHS = ("flux", "kontext", "longcat", "ovis", "flux2", "qwen")


def build(kind: str, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return {**VLLM_OMNI, **SGLANG}[kind]().eval()


def condition(kind: str, seed: int, batch: int = 1) -> dict[str, Any]:
    """What a branch of guidance gives with every call, the same objects in every step."""
    text = torch.randn(batch, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
    given: dict[str, Any] = {"encoder_hidden_states": text}
    if kind.startswith("sglang") and kind != "sglang-flux":
        given["encoder_hidden_states"] = [text, text[:, 0]]
    if kind in ("flux", "kontext", "sd3"):
        given["pooled_projections"] = text[:, 0]
    if kind == "hunyuan":
        given["encoder_attention_mask"] = torch.ones(batch, 5, dtype=torch.bool)
    if kind == "vace":
        context = torch.randn(1, CHANNELS, 1, 3, 3, generator=torch.Generator().manual_seed(9))
        given |= {"vace_context": context, "vace_context_scale": [0.5]}
    return given


class Pipeline(nn.Module):
    """A pipeline's denoising loop: branches one after the other, then the scheduler.

    Args:
        kind: Of its transformers.
        experts: How many of them share the steps.
        sizes: Of vLLM-Omni's parallel configuration.
    """

    def __init__(self, kind: str, experts: int = 1, **sizes: Any) -> None:
        super().__init__()
        self.kind = kind
        self.transformer = build(kind)
        self.transformer_2 = build(kind, seed=1) if experts > 1 else None
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.od_config = SimpleNamespace(parallel_config=SimpleNamespace(**sizes))
        self.seen: list[Tensor] = []  # the latents behind every step

    def forward(self, request: Request) -> Tensor:
        self.scheduler.set_timesteps(request.num_steps)
        return self.denoise(request, self.scheduler)

    def denoise(self, request: Request, scheduler: Any) -> Tensor:
        scheduler.set_begin_index(0)
        shape = (1, CHANNELS, 1, 3, 3) if self.kind in VIDEOS else (1, 9, CHANNELS)
        noise = torch.Generator().manual_seed(request.seed)
        latents = torch.randn(request.batch, *shape[1:], generator=noise)
        branches = [
            condition(self.kind, 10 * request.seed + k, request.batch)
            for k in range(request.branches)
        ]
        self.seen = []
        for index, t in enumerate(scheduler.timesteps):
            if index == request.aborts_at:
                raise RuntimeError("the request was aborted")
            timestep = t.expand(request.batch)
            if self.kind in THOUSANDTHS:
                timestep = timestep / 1000
            model = self.transformer
            if self.transformer_2 is not None and t < 700:
                model = self.transformer_2
            answers = [
                model(hidden_states=latents, timestep=timestep, **given) for given in branches
            ]
            answers = [each[0] if isinstance(each, tuple) else each for each in answers]
            velocity = answers[0] if len(answers) == 1 else 3 * answers[0] - 2 * answers[1]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
            if request.is_noisy:  # as pipelines of distilled models do it, beside the scheduler
                latents = 0.2 * latents + torch.randn(latents.shape, generator=noise)
            self.seen.append(latents)
        return latents


@dataclass
class Request:
    """What is asked of a pipeline; also SGLang's `Req`, as far as a cache sees it."""

    seed: int = 1
    num_steps: int = 8
    branches: int = 1
    batch: int = 1
    aborts_at: int = -1
    is_noisy: bool = False
    enable_teacache: bool = False
    enable_spectrum: bool = False
    scheduler: Any = None

    @property
    def num_inference_steps(self) -> int:
        return self.num_steps


# --- what calls a cache in vLLM-Omni --------------------------------------------------------------


class CacheBackend(abc.ABC):
    def __init__(self, config: Any) -> None:
        self.config = config
        self.enabled = False

    @abc.abstractmethod
    def enable(self, pipeline: Any) -> None: ...

    @abc.abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None: ...

    def is_enabled(self) -> bool:
        return self.enabled


@dataclass
class DiffusionCacheConfig:
    """Fields for all caches, a few of them, and what it does not know."""

    rel_l1_thresh: float | None = None
    max_warmup_steps: int = 4
    num_inference_steps: int | None = None
    velocity_sim_thresholds: list[float] = field(default_factory=lambda: [0.95, 0.93])
    _extra_params: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DiffusionCacheConfig:
        known = {each.name for each in fields(cls)}
        extra = {key: value for key, value in data.items() if key not in known}
        return cls(**{k: v for k, v in data.items() if k in known}, _extra_params=extra)


def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
    if cache_backend in (None, "none"):
        return None
    raise ValueError(f"Unsupported cache backend: {cache_backend}.")


@contextmanager
def vllm_omni(**replaced: Any) -> Iterator[Callable[[str], types.ModuleType]]:
    """A package `vllm_omni` with the modules that a cache backend meets; yields them by name.

    Args:
        replaced: Other things instead of `get_cache_backend` or `CacheBackend`; `None`: not there.
    """
    given: dict[str, Any] = {
        "get_cache_backend": get_cache_backend,
        "CacheBackend": CacheBackend,
        **replaced,
    }
    selector = {"get_cache_backend": given["get_cache_backend"]}
    with modules(
        {
            "vllm_omni.diffusion.cache.base": {"CacheBackend": given["CacheBackend"]},
            "vllm_omni.diffusion.cache.selector": selector,
            "vllm_omni.diffusion.worker.diffusion_model_runner": selector,
        }
    ) as found:
        yield found


class ModelRunner:
    """vLLM-Omni's: loads a pipeline, then executes requests, one batch after the other."""

    def __init__(self, pipeline: Pipeline, cache_backend: str, cache_config: Any) -> None:
        self.pipeline = pipeline
        runner = sys.modules["vllm_omni.diffusion.worker.diffusion_model_runner"]
        config = DiffusionCacheConfig.from_dict(cache_config)
        self.cache_backend = runner.get_cache_backend(cache_backend, config)
        if self.cache_backend is not None:
            self.cache_backend.enable(self.pipeline)

    def execute(self, request: Request, refresh: bool = True) -> Tensor:
        with torch.inference_mode():
            if refresh and self.cache_backend is not None and self.cache_backend.is_enabled():
                self.cache_backend.refresh(self.pipeline, request.num_steps)
            return self.pipeline.forward(request)


# --- what calls a cache in SGLang -----------------------------------------------------------------


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class DenoisingStage:
    """Runs a batch's loop on its transformers."""

    def __init__(self, kind: str, **server_args: Any) -> None:
        self.transformer, self.transformer_2 = build(kind), None
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.server_args = SimpleNamespace(enable_breakable_cuda_graph=False, **server_args)
        self.pipeline = None
        self._cache_dit_enabled = False
        self._kind = kind
        self.asked: list[Any] = []  # what came to the stage's own two methods

    def _maybe_enable_cache_dit(self, num_inference_steps: Any, batch: Any) -> None:
        self.asked.append(num_inference_steps)

    def _reset_dit_cache_states(self, batch: Any) -> None:
        self.asked.append(batch)

    @torch.no_grad()
    def forward(self, batch: Request) -> Tensor:
        batch.scheduler = self.scheduler
        batch.scheduler.set_timesteps(batch.num_steps)
        self._maybe_enable_cache_dit(batch.num_steps, batch)
        self._reset_dit_cache_states(batch)
        loop = Pipeline(self._kind)
        loop.transformer = self.transformer
        latents = loop.denoise(batch, batch.scheduler)
        self.seen = loop.seen
        return latents


@contextmanager
def sglang() -> Iterator[type[DenoisingStage]]:
    """A package `sglang` with its hooks for plug-ins; yields its denoising stage."""
    path = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.DenoisingStage"
    stage: type[DenoisingStage] = type("DenoisingStage", (DenoisingStage,), {})

    def plugin_hook(target: str, type: HookType = HookType.AFTER) -> Callable[..., Any]:
        owner, _, name = target.rpartition(".")
        assert owner == path

        def decorate(hook: Callable[..., Any]) -> Callable[..., Any]:
            original = getattr(stage, name)

            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if type is HookType.AROUND:
                    return hook(original, *args, **kwargs)
                assert type is HookType.AFTER
                result = original(*args, **kwargs)
                modified = hook(result, *args, **kwargs)
                return result if modified is None else modified

            setattr(stage, name, wrapper)
            return hook

        return decorate

    plugins = {"plugin_hook": plugin_hook, "HookType": HookType}
    with modules({"sglang.multimodal_gen.runtime.platforms.plugins": plugins}):
        yield stage


@contextmanager
def modules(contents: dict[str, dict[str, Any]]) -> Iterator[Callable[[str], types.ModuleType]]:
    """Modules with these contents, and the packages around them, as long as the block runs."""
    made: dict[str, types.ModuleType] = {}
    for path, names in contents.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            made.setdefault(name, types.ModuleType(name)).__path__ = []
        vars(made[path]).update({k: v for k, v in names.items() if v is not None})
    ours = "dicache.adapters.serving.vllm_omni_backend"  # made of one package, not of the next
    before = {name: sys.modules.get(name) for name in [*made, ours]}
    sys.modules.update(made)
    sys.modules.pop(ours, None)
    try:
        yield made.__getitem__
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
