"""Real diffusers pipelines around tiny transformers, and calls that fit them.

Prompt embeddings are given and latents returned, so that no text encoder and, where the pipeline
allows it, no VAE is needed. `record` sees every call of a transformer from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from tiny_models import FAMILIES, TEXT_TOKENS, TEXT_WIDTH, build, output_of
from torch import Tensor, nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline class, the family of its transformer, and the arguments of a call.

    Attributes:
        pipeline_class: Name of the class in diffusers.
        family: Of the transformer; see `tiny_models`.
        arguments: Makes the arguments of a call other than the number of steps.
        overrides: Of the transformer's configuration.
        parts: Makes components beside transformer, scheduler and empty ones.
        branches: Names of the contexts that a call has.
        strength: Share of the steps that a call runs.
    """

    pipeline_class: str
    family: str
    arguments: Callable[[], dict[str, Any]]
    overrides: dict[str, Any] | None = None
    parts: Callable[[], dict[str, Any]] = dict
    branches: tuple[str, ...] = ("cond",)
    strength: float = 1.0


@dataclass(frozen=True)
class Call:
    """One call of a transformer, as it was made and answered."""

    inputs: dict[str, Any]
    output: Tensor


class ControlVae(nn.Module):
    """Makes latents of a control picture."""

    config = type(
        "Config",
        (),
        {
            "latent_channels": 4,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "block_out_channels": (1,) * 4,
        },
    )
    dtype, device = torch.float32, torch.device("cpu")

    def encode(self, x: Tensor) -> Any:
        latents = x[:, [0, 1, 2, 0], ::8, ::8]
        drawn = type("Drawn", (), {"sample": lambda *_: latents, "mode": lambda *_: latents})
        return type("Encoded", (), {"latent_dist": drawn()})()


def control_net_for(model: Any, std: float) -> FluxControlNetModel:
    """A small ControlNet of random weights that fits a Flux."""
    names = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    names += ("pooled_projection_dim", "axes_dims_rope", "guidance_embeds")
    sizes = {name: getattr(model.config, name) for name in names}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = FluxControlNetModel(num_layers=2, num_single_layers=2, **sizes)
        for parameter in made.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=std)
    return made.eval().requires_grad_(False)


def pipeline(name: str, **parts: Any) -> Any:
    """The pipeline `name` around a tiny transformer, or around the given components."""
    row = PIPELINES[name]
    pipeline_class = getattr(diffusers, row.pipeline_class)
    if "transformer" not in parts:
        parts["transformer"] = build(row.family, **(row.overrides or {}))
    parts = {"scheduler": scheduler(row.family), **row.parts(), **parts}
    required = [
        key
        for key, parameter in inspect.signature(pipeline_class).parameters.items()
        if parameter.default is parameter.empty
    ]
    pipe = pipeline_class(**{**dict.fromkeys(required), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, pipe: Any, num_steps: int = 6, seed: int = 0, **changes: Any) -> Tensor:
    """Latents of one call; equal seeds give equal starts."""
    row = PIPELINES[name]
    arguments = {
        **row.arguments(),
        "num_inference_steps": round(num_steps / row.strength),
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "return_dict": False,
        **changes,
    }
    made = pipe(**arguments)
    if FAMILIES[row.family].other_latents:  # video, and audio
        return torch.cat([each.flatten() for each in made])
    return made[0][-1] if isinstance(made[0], list) else made[0]  # Framepack tells every section


_PROMPTS = ("encoder_hidden_states", "cap_feats")


def record(transformer: nn.Module) -> list[Call]:
    """A list that fills with the transformer's calls from now on."""
    calls: list[Call] = []

    names = [*inspect.signature(type(transformer).forward).parameters][1:]

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # Pipelines change a dictionary of theirs between the branches, and latents in place.
        given = {name: _copied(value) for name, value in given.items()}
        calls.append(Call(given, output_of(module, output)))

    transformer.register_forward_hook(note, with_kwargs=True)
    return calls


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy(value)


def by_branch(calls: list[Call]) -> list[list[Call]]:
    """The calls of every branch, told apart by the values of their text embedding.

    LTX-2 has one more with a known text, which keeps video and audio apart.
    """
    branches: dict[tuple[float, bool], list[Call]] = {}
    for call in calls:
        prompts = next(call.inputs[name] for name in _PROMPTS if name in call.inputs)
        is_apart = bool(call.inputs.get("isolate_modalities"))
        key = float(sum(each.sum() for each in prompts)), is_apart
        branches.setdefault(key, []).append(call)
    return list(branches.values())


def scheduler(family: str) -> Any:
    """The scheduler that the family's pipelines come with."""
    if family == "cosmos":
        return FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    if family in ("wan", "wan-vace", "skyreels-v2"):
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    if family == "cogvideox":
        return diffusers.CogVideoXDDIMScheduler()
    if family == "mochi":
        return FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return FlowMatchEulerDiscreteScheduler()


def text(seed: int) -> Tensor:
    """An embedding of a prompt: [1, T, D]."""
    return torch.randn(
        1, TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(100 + seed)
    )


def _pooled(seed: int) -> Tensor:
    return text(seed)[:, 0]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _flux() -> dict[str, Any]:
    prompt = {"prompt_embeds": text(0), "pooled_prompt_embeds": _pooled(0)}
    return {**prompt, "height": 64, "width": 64}


def _true_guidance() -> dict[str, Any]:
    negative = {"negative_prompt_embeds": text(1), "negative_pooled_prompt_embeds": _pooled(1)}
    return {**negative, "true_cfg_scale": 3.0}


def _image_to_image() -> dict[str, Any]:
    # Given latents are taken as they are, so that no VAE has to encode the picture.
    return {"image": torch.zeros(1, 3, 64, 64), "latents": _normal(1, 16, 16), "strength": 0.5}


def _kontext() -> dict[str, Any]:
    size = {"height": 8, "width": 8, "max_area": 64}
    return {**_flux(), **size, "image": _normal(1, 4, 4, 4)}


def _fill() -> dict[str, Any]:
    picture = {"image": _normal(1, 3, 8, 8).clamp(-1, 1), "mask_image": torch.ones(1, 1, 8, 8)}
    return {**_flux(), **picture, "height": 8, "width": 8}


def _control() -> dict[str, Any]:
    return {**_flux(), "control_image": _normal(1, 3, 8, 8), "height": 8, "width": 8}


def _vae() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4,), latent_channels=4, norm_num_groups=1, shift_factor=0.1
        )
    return {"vae": vae.eval().requires_grad_(False)}


def _guided() -> dict[str, Any]:
    return {"prompt_embeds": text(0), "negative_prompt_embeds": text(1), "guidance_scale": 3.0}


def _guided_with_masks() -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return {**_guided(), **masks}


def _video(frames: int = 5, side: int = 64) -> dict[str, Any]:
    return {"height": side, "width": side, "num_frames": frames}


def _hunyuan() -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS)
    prompt = {"prompt_embeds": text(0), "pooled_prompt_embeds": _pooled(0)}
    return {**prompt, "prompt_attention_mask": mask, **_video()}


def _video_to_video() -> dict[str, Any]:
    size = {"height": 64, "width": 64}
    return {**_guided(), **size, "latents": _normal(1, 4, 2, 8, 8), "strength": 0.5}


def _qwen() -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS).long()
    prompt = {"prompt_embeds": text(0), "prompt_embeds_mask": mask}
    negative = {"negative_prompt_embeds": text(1), "negative_prompt_embeds_mask": mask}
    return {**prompt, **negative, "true_cfg_scale": 3.0, "height": 64, "width": 64}


def _z_image() -> dict[str, Any]:
    prompts = {"prompt_embeds": [text(0)[0]], "negative_prompt_embeds": [text(1)[0, :3]]}
    return {**prompts, "guidance_scale": 3.0, "height": 64, "width": 64}


def _sd3() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": _pooled(0), "negative_pooled_prompt_embeds": _pooled(1)}
    return {**_guided(), **pooled, "height": 64, "width": 64}


def _lumina() -> dict[str, Any]:
    """The branches' texts are of different lengths, and so are their tokens."""
    masks = {
        "prompt_attention_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.long),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    }
    return {**_guided(), **masks, "height": 64, "width": 64}


def _wan_vae() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    return {"vae": vae.eval().requires_grad_(False)}


def _framepack() -> dict[str, Any]:
    picture = _normal(1, 3, 64, 64).clamp(-1, 1)
    return {**_hunyuan(), "image": picture, "latent_window_size": 2}


def _framepack_parts() -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SiglipVisionModel(config)
        vae = AutoencoderKLHunyuanVideo(
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=1,
        )
    processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    return {"image_encoder": encoder.eval(), "feature_extractor": processor, "vae": vae.eval()}


def _picture(**arguments: Any) -> dict[str, Any]:
    return {**_guided(), "height": 64, "width": 64, **arguments}


def _sana() -> dict[str, Any]:
    given = {"negative_prompt": None, "use_resolution_binning": False}
    return {**_guided_with_masks(), **_picture(), **given}


def _kandinsky() -> dict[str, Any]:
    given = {"guidance_scale": 3.0, **_video(side=128)}
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds_qwen"] = text(seed)
        given[f"{prefix}prompt_embeds_clip"] = _pooled(seed)
        given[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, TEXT_TOKENS], dtype=torch.int32)
    return given


def _ltx2(**arguments: Any) -> dict[str, Any]:
    """As it is made by default, with two more branches beside those of guidance."""
    given = {**_guided_with_masks(), **_video(frames=17, side=256), **arguments}
    return {"spatio_temporal_guidance_blocks": [2], **given}


def _ltx2_parts() -> dict[str, Any]:
    sides = ("video", "audio")
    options: dict[str, Any] = {"caption_channels": TEXT_WIDTH, "text_proj_in_factor": 1}
    for side in sides:
        options |= {
            f"{side}_connector_num_attention_heads": 1,
            f"{side}_connector_attention_head_dim": TEXT_WIDTH,
            f"{side}_connector_num_layers": 1,
            f"{side}_connector_num_learnable_registers": None,
        }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
        )
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=6, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=12
        )
        connectors = LTX2TextConnectors(**options)
    return {"vae": vae.eval(), "audio_vae": audio_vae.eval(), "connectors": connectors.eval()}


def _kandinsky6() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": _pooled(0), "negative_pooled_prompt_embeds": _pooled(1)}
    return {**_guided(), **pooled, **_video()}


class _SafetyChecker(nn.Module):
    """Stands for Cosmos's, which takes a package of its own."""

    device, dtype = torch.device("cpu"), torch.float32

    def to(self, *_: Any, **__: Any) -> _SafetyChecker:
        return self


_BOTH, _BRANCHES = ("cond", "uncond"), ("branch0", "branch1")


class _Sound(nn.Module):
    """Stands for Kandinsky 6's models of sound, which hear nothing before the end."""

    device, dtype = torch.device("cpu"), torch.float32
    config, latent_hop_length = SimpleNamespace(sample_rate=44100), 1024


PIPELINES: dict[str, TinyPipeline] = {
    "flux": TinyPipeline("FluxPipeline", "flux", _flux),
    "flux-true-guidance": TinyPipeline(
        "FluxPipeline", "flux", lambda: {**_flux(), **_true_guidance()}, branches=_BOTH
    ),
    "flux-img2img": TinyPipeline(
        "FluxImg2ImgPipeline",
        "flux",
        lambda: {**_flux(), **_image_to_image()},
        branches=("branch0",),
        strength=0.5,
    ),
    "flux-img2img-true-guidance": TinyPipeline(
        "FluxImg2ImgPipeline",
        "flux",
        lambda: {**_flux(), **_image_to_image(), **_true_guidance()},
        branches=_BRANCHES,
        strength=0.5,
    ),
    "flux-kontext": TinyPipeline(
        "FluxKontextPipeline", "flux", _kontext, parts=_vae, branches=("branch0",)
    ),
    "flux-fill": TinyPipeline(
        "FluxFillPipeline",
        "flux",
        _fill,
        {"in_channels": 36, "out_channels": 16},
        _vae,
        branches=("branch0",),
    ),
    "flux-control": TinyPipeline(
        "FluxControlPipeline",
        "flux",
        _control,
        {"in_channels": 32, "out_channels": 16},
        _vae,
        branches=("branch0",),
    ),
    "wan": TinyPipeline("WanPipeline", "wan", lambda: {**_guided(), **_video()}, branches=_BOTH),
    "wan-timestep-per-token": TinyPipeline(
        "WanPipeline",
        "wan",
        lambda: {**_guided(), **_video()},
        parts=lambda: {"expand_timesteps": True},
        branches=_BOTH,
    ),
    "wan-v2v": TinyPipeline(
        "WanVideoToVideoPipeline", "wan", _video_to_video, branches=_BRANCHES, strength=0.5
    ),
    "hunyuan-video": TinyPipeline("HunyuanVideoPipeline", "hunyuan-video", _hunyuan),
    "qwen-image": TinyPipeline("QwenImagePipeline", "qwen-image", _qwen, branches=_BOTH),
    "chroma": TinyPipeline(
        "ChromaPipeline",
        "chroma",
        lambda: {**_guided_with_masks(), "height": 64, "width": 64},
        branches=_BRANCHES,
    ),
    "mochi": TinyPipeline(
        "MochiPipeline",
        "mochi",
        lambda: {**_guided_with_masks(), **_video(frames=7)},
        branches=("cond_uncond",),
    ),
    "ltx": TinyPipeline(
        "LTXPipeline",
        "ltx",
        lambda: {**_guided_with_masks(), **_video(frames=9, side=128)},
        branches=("cond_uncond",),
    ),
    "cogvideox": TinyPipeline(
        "CogVideoXPipeline",
        "cogvideox",
        lambda: {**_guided(), **_video()},
        branches=("cond_uncond",),
    ),
    "z-image": TinyPipeline("ZImagePipeline", "z-image", _z_image, branches=("branch0",)),
    "sd3": TinyPipeline("StableDiffusion3Pipeline", "sd3", _sd3, branches=("branch0",)),
    "lumina2": TinyPipeline("Lumina2Pipeline", "lumina2", _lumina, branches=_BRANCHES),
    "wan-vace": TinyPipeline(
        "WanVACEPipeline",
        "wan-vace",
        lambda: {**_guided(), **_video()},
        {"vace_in_channels": 72},
        _wan_vae,
        branches=_BOTH,
    ),
    "framepack": TinyPipeline(
        "HunyuanVideoFramepackPipeline",
        "framepack",
        _framepack,
        parts=_framepack_parts,
        branches=("branch0",),
    ),
    "auraflow": TinyPipeline(
        "AuraFlowPipeline",
        "auraflow",
        lambda: {**_guided_with_masks(), **_picture()},
        branches=("branch0",),
    ),
    "sana": TinyPipeline("SanaPipeline", "sana", _sana, branches=("branch0",)),
    "cogview4": TinyPipeline("CogView4Pipeline", "cogview4", _picture, branches=_BOTH),
    "ovis-image": TinyPipeline(
        "OvisImagePipeline", "ovis-image", lambda: _picture(negative_prompt=None), branches=_BOTH
    ),
    "bria": TinyPipeline("BriaPipeline", "bria", _picture, parts=_vae, branches=("branch0",)),
    "skyreels-v2": TinyPipeline(
        "SkyReelsV2Pipeline", "skyreels-v2", lambda: {**_guided(), **_video()}, branches=_BOTH
    ),
    "kandinsky5": TinyPipeline(
        "Kandinsky5T2VPipeline", "kandinsky5", _kandinsky, branches=_BRANCHES
    ),
    "glm-image": TinyPipeline(
        "GlmImagePipeline",
        "glm-image",
        lambda: _picture(prior_token_ids=torch.arange(16)[None] % 8),
        branches=_BRANCHES,
    ),
    "cosmos": TinyPipeline(
        "Cosmos2TextToImagePipeline",
        "cosmos",
        _picture,
        parts=lambda: {"safety_checker": _SafetyChecker()},
        branches=_BRANCHES,
    ),
    "ltx2": TinyPipeline(
        "LTX2Pipeline",
        "ltx2",
        _ltx2,
        {"perturbed_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True},
        _ltx2_parts,
        branches=("cond_uncond", "uncond_stg", "uncond_modality"),
    ),
    "ltx2-i2v": TinyPipeline(
        "LTX2ImageToVideoPipeline",
        "ltx2",
        lambda: _ltx2(
            image=_normal(1, 3, 8, 8),
            latents=_normal(1, 8, 2, 4, 4),
            image_crf=0,
            stg_scale=0,
            audio_stg_scale=0,
            modality_scale=1,
            audio_modality_scale=1,
        ),
        parts=_ltx2_parts,
        branches=("cond_uncond",),
    ),
    "kandinsky6": TinyPipeline(
        "Kandinsky6TI2VAPipeline",
        "kandinsky6",
        _kandinsky6,
        {"visual_cond": True},
        lambda: {"audio_vae": _Sound(), "vocoder": _Sound()},
        branches=_BOTH,
    ),
}
