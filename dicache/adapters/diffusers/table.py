"""The table of diffusers' families: one row a transformer class.

FLUX.1, HunyuanVideo and Wan 2.1 have published thresholds (arXiv 2508.17356, released scripts).
Their alignment thresholds are these times the ratio of the two rules' thresholds at equal cost on
our demo model of the family: 0.17, 0.34 and 0.24 (benchmarks/results/quality.json, 2.5x at the
sibling's depth). The others take the values of the family whose architecture and task are closest.
None of the alignment thresholds was measured on a real model.
"""

from __future__ import annotations

from typing import Any

from ...driver.families import (
    BEHIND_PROBE,
    HIDDEN,
    PER_SAMPLE,
    TEXT,
    TIMESTEP,
    BlockStack,
    ModelFamily,
    register_family,
)

_TEXT_FIRST, _TEXT_LAST = (TEXT, HIDDEN), (HIDDEN, TEXT)
_HIDREAM = (*PER_SAMPLE, "hidden_states_masks", "image_rotary_emb")
_LTX2_PER_SAMPLE = (
    *PER_SAMPLE,
    "audio_hidden_states",
    "audio_encoder_hidden_states",
    "temb_audio",
    "temb_ca_scale_shift",
    "temb_ca_audio_scale_shift",
    "temb_ca_gate",
    "temb_ca_audio_gate",
    "temb_prompt",
    "temb_prompt_audio",
    "video_rotary_emb",
    "audio_rotary_emb",
    "ca_video_rotary_emb",
    "ca_audio_rotary_emb",
    "audio_encoder_attention_mask",
    "self_attention_mask",
    "perturbation_mask",
)
_FLUX: dict[str, Any] = {"threshold": 0.4, "alignment_threshold": 0.07}
_HUNYUAN_VIDEO: dict[str, Any] = {"threshold": 0.1, "alignment_threshold": 0.035}
_WAN: dict[str, Any] = {"threshold": 0.08, "alignment_threshold": 0.02}

for _family in (
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
        preset="flux",
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        (
            BlockStack("transformer_blocks", _TEXT_LAST),
            BlockStack("single_transformer_blocks", _TEXT_LAST, whole_for=("attention_kwargs",)),
        ),
        preset="hunyuan-video",
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "wan",  # Wan 2.1, and both experts of Wan 2.2
        "WanTransformer3DModel",
        (BlockStack("blocks"),),
        preset="wan2.1",
        module="diffusers",
        **_WAN,
    ),
    ModelFamily(
        "flux2",
        "Flux2Transformer2DModel",
        (
            BlockStack("transformer_blocks", _TEXT_FIRST),
            BlockStack("single_transformer_blocks", text_in_front=True),
        ),
        module="diffusers",
        **_FLUX,
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
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "qwen-image",
        "QwenImageTransformer2DModel",
        (BlockStack("transformer_blocks", _TEXT_FIRST),),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        (BlockStack("transformer_blocks", _TEXT_LAST),),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "ltx",
        "LTXVideoTransformer3DModel",
        (BlockStack("transformer_blocks", per_sample=(*PER_SAMPLE, "image_rotary_emb")),),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "mochi",
        "MochiTransformer3DModel",
        (BlockStack("transformer_blocks", _TEXT_LAST),),
        ascending_timesteps=True,
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        (BlockStack("transformer_blocks", _TEXT_LAST),),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "sd3",  # and 3.5
        "SD3Transformer2DModel",
        (
            BlockStack(
                "transformer_blocks",
                _TEXT_FIRST,
                per_sample=(*PER_SAMPLE, "joint_attention_kwargs.temb"),
            ),
        ),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "auraflow",
        "AuraFlowTransformer2DModel",
        (
            BlockStack("joint_transformer_blocks", _TEXT_FIRST),
            BlockStack(
                "single_transformer_blocks", text_in_front=True, whole_for=("attention_kwargs",)
            ),
        ),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "sana",
        "SanaTransformer2DModel",
        (BlockStack("transformer_blocks", per_sample=(*PER_SAMPLE, TIMESTEP)),),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "cogview4",
        "CogView4Transformer2DModel",
        (BlockStack("transformer_blocks", _TEXT_LAST),),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "hunyuan-image",  # HunyuanImage 2.1
        "HunyuanImageTransformer2DModel",
        (
            BlockStack("transformer_blocks", _TEXT_LAST),
            BlockStack("single_transformer_blocks", _TEXT_LAST, whole_for=("attention_kwargs",)),
        ),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "longcat-image",
        "LongCatImageTransformer2DModel",
        (
            BlockStack("transformer_blocks", _TEXT_FIRST),
            BlockStack("single_transformer_blocks", _TEXT_FIRST, whole_for=()),
        ),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "ovis-image",
        "OvisImageTransformer2DModel",
        (
            BlockStack("transformer_blocks", _TEXT_FIRST),
            BlockStack(
                "single_transformer_blocks", _TEXT_FIRST, whole_for=("joint_attention_kwargs",)
            ),
        ),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "bria",
        "BriaTransformer2DModel",
        (
            BlockStack("transformer_blocks", _TEXT_FIRST),
            BlockStack(
                "single_transformer_blocks",
                _TEXT_FIRST,
                whole_for=("controlnet_single_block_samples", "attention_kwargs"),
            ),
        ),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "lumina2",  # its tokens are text and image in one, each sample with tables of its own
        "Lumina2Transformer2DModel",
        (BlockStack("layers", per_sample=(*PER_SAMPLE, "image_rotary_emb")),),
        ascending_timesteps=True,
        tokens_tell_noise=False,
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "skyreels-v2",
        "SkyReelsV2Transformer3DModel",
        (BlockStack("blocks"),),
        module="diffusers",
        **_WAN,
    ),
    ModelFamily(
        "chronoedit",
        "ChronoEditTransformer3DModel",
        (BlockStack("blocks"),),
        module="diffusers",
        **_WAN,
    ),
    ModelFamily(
        "wan-vace",  # the blocks that make its hints run in every step
        "WanVACETransformer3DModel",
        (BlockStack("blocks"),),
        module="diffusers",
        **_WAN,
    ),
    ModelFamily(
        "framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        (
            BlockStack("transformer_blocks", _TEXT_LAST),
            BlockStack("single_transformer_blocks", _TEXT_LAST, whole_for=("attention_kwargs",)),
        ),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        (
            BlockStack(
                "visual_transformer_blocks",
                ("visual_embed",),
                hidden_states="visual_embed",
                per_sample=("visual_embed", "text_embed", "time_embed", "rope"),
            ),
        ),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "z-image",  # its tokens are image and text in one
        "ZImageTransformer2DModel",
        (
            BlockStack(
                "layers",
                ("x",),
                hidden_states="x",
                per_sample=(
                    "x",
                    "attn_mask",
                    "freqs_cis",
                    "adaln_input",
                    "noise_mask",
                    "adaln_noisy",
                    "adaln_clean",
                ),
            ),
        ),
        timestep="t",
        text="cap_feats",
        ascending_timesteps=True,
        tokens_tell_noise=False,
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "glm-image",
        "GlmImageTransformer2DModel",
        (BlockStack("transformer_blocks", _TEXT_LAST),),
        own_timesteps=True,  # one less
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "wan-animate",  # what it sees of a face is added between blocks
        "WanAnimateTransformer3DModel",
        (BlockStack("blocks"),),
        behind_probe=(*BEHIND_PROBE, "face_pixel_values"),
        module="diffusers",
        **_WAN,
    ),
    ModelFamily(
        "cosmos",  # Predict 2; others have the same class
        "CosmosTransformer3DModel",
        (
            BlockStack(
                "transformer_blocks",
                per_sample=(
                    *PER_SAMPLE,
                    "embedded_timestep",
                    "extra_pos_emb",
                    "controlnet_residual",
                ),
            ),
        ),
        own_timesteps=True,  # sigma / (sigma + 1)
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "hidream",
        "HiDreamImageTransformer2DModel",
        (
            BlockStack("double_stream_blocks", _TEXT_LAST, per_sample=_HIDREAM),
            BlockStack("single_stream_blocks", text_behind=True, per_sample=_HIDREAM),
        ),
        timestep="timesteps",
        text="encoder_hidden_states_t5",
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        # Its modulations have a row a sample and one for what does not change with the timestep:
        # then blocks run for all samples of a batch.
        "qwen-image-2.1",
        "QwenImage21Transformer2DModel",
        (BlockStack("transformer_blocks", per_sample=(HIDDEN, "modulation", "key_valid")),),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "ltx2",  # its audio is a stream of its own, and read at the end
        "LTX2VideoTransformer3DModel",
        (
            BlockStack(
                "transformer_blocks",
                (HIDDEN, "audio_hidden_states"),
                hidden_states=(HIDDEN, "audio_hidden_states"),
                per_sample=_LTX2_PER_SAMPLE,
            ),
        ),
        behind_probe=(
            *BEHIND_PROBE,
            "isolate_modalities",
            "spatio_temporal_guidance_blocks",
            "perturbation_mask",
        ),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "kandinsky6",  # with audio, as a stream of its own, or without
        "Kandinsky6Transformer3DModel",
        (
            BlockStack(
                "visual_transformer_blocks",
                ("vis", "aud"),
                hidden_states=("vis", "aud"),
                per_sample=("vis", "aud", "text_v", "text_a", "time_embed", "attn_mask"),
            ),
        ),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "minimax-h3",  # its tokens are text, video and audio in one
        "MiniMaxH3Transformer3DModel",
        (BlockStack("transformer_blocks", per_sample=(HIDDEN,)),),
        ascending_timesteps=True,
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "hunyuan-dit",  # later blocks also read what earlier ones made
        "HunyuanDiT2DModel",
        (BlockStack("blocks", per_sample=(*PER_SAMPLE, "skip")),),
        module="diffusers",
        **_FLUX,
    ),
    ModelFamily(
        "motif-video",  # its last blocks begin with x again, and read the others' tokens as a text
        "MotifVideoTransformer3DModel",
        (
            BlockStack("transformer_blocks", _TEXT_LAST),
            BlockStack("single_transformer_blocks", _TEXT_LAST),
        ),
        module="diffusers",
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "flux3",  # blocks of text alone and picture alone run in every step
        "Flux3Transformer2DModel",
        (
            BlockStack(
                "single_transformer_blocks",
                _TEXT_FIRST,
                per_sample=(*PER_SAMPLE, "temb_mod_context"),
            ),
        ),
        module="diffusers",
        **_FLUX,
    ),
):
    register_family(_family)
