"""The table of the engines' own transformer classes: one row a class, by package.

Both engines write models anew, with names of classes and lists from diffusers, and blocks that take
other arguments. Rows follow vLLM-Omni 0.30.0 and SGLang 0.5.23 as released. Thresholds are those of
the same models in diffusers (`adapters.diffusers.table`), measured on no real model.

SGLang's Wan has no row: there a block leaves the end of its work to the next one, so what it
returns are not its tokens.
"""

from __future__ import annotations

from typing import Any

from ...driver.families import (
    BEHIND_PROBE,
    HIDDEN,
    PER_SAMPLE,
    TEXT,
    BlockStack,
    ModelFamily,
    register_family,
)

VLLM_OMNI, SGLANG = "vllm_omni", "sglang"  # the packages, which are the rows' modules

_TEXT_FIRST, _TEXT_LAST = (TEXT, HIDDEN), (HIDDEN, TEXT)
_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_FLUX: dict[str, Any] = {"threshold": 0.4, "alignment_threshold": 0.07}
_HUNYUAN_VIDEO: dict[str, Any] = {"threshold": 0.1, "alignment_threshold": 0.035}
_WAN: dict[str, Any] = {"threshold": 0.08, "alignment_threshold": 0.02}
_FLUX2_SAMPLES = (*PER_SAMPLE, "temb_mod_params", "temb_mod_params_img", "temb_mod_params_txt")

for _family in (
    ModelFamily(
        "flux-vllm",  # and Kontext
        "FluxTransformer2DModel",
        (BlockStack(_DOUBLE, _TEXT_FIRST), BlockStack(_SINGLE, _TEXT_FIRST)),
        preset="flux",
        module=VLLM_OMNI,
        **_FLUX,
    ),
    ModelFamily(
        "flux2-vllm",
        "Flux2Transformer2DModel",
        (
            BlockStack(_DOUBLE, _TEXT_FIRST, per_sample=_FLUX2_SAMPLES),
            BlockStack(_SINGLE, text_in_front=True, per_sample=_FLUX2_SAMPLES),
        ),
        module=VLLM_OMNI,
        **_FLUX,
    ),
    ModelFamily(
        "longcat-image-vllm",
        "LongCatImageTransformer2DModel",
        (BlockStack(_DOUBLE, _TEXT_FIRST), BlockStack(_SINGLE, _TEXT_FIRST)),
        module=VLLM_OMNI,
        **_FLUX,
    ),
    ModelFamily(
        "ovis-image-vllm",
        "OvisImageTransformer2DModel",
        (BlockStack(_DOUBLE, _TEXT_FIRST), BlockStack(_SINGLE, _TEXT_FIRST)),
        module=VLLM_OMNI,
        **_FLUX,
    ),
    ModelFamily(
        "qwen-image-vllm",
        "QwenImageTransformer2DModel",
        (BlockStack(_DOUBLE, _TEXT_FIRST),),
        module=VLLM_OMNI,
        **_FLUX,
    ),
    ModelFamily(
        "sd3-vllm",  # and 3.5
        "SD3Transformer2DModel",
        (BlockStack(_DOUBLE, _TEXT_FIRST),),
        module=VLLM_OMNI,
        **_FLUX,
    ),
    ModelFamily(
        "hunyuan-video-1.5-vllm",
        "HunyuanVideo15Transformer3DModel",
        (BlockStack(_DOUBLE, _TEXT_LAST),),
        module=VLLM_OMNI,
        **_HUNYUAN_VIDEO,
    ),
    ModelFamily(
        "wan-vllm",  # Wan 2.1, both experts of Wan 2.2, and VACE, which derives from it
        "WanTransformer3DModel",
        (BlockStack("blocks"),),
        preset="wan2.1",
        module=VLLM_OMNI,
        behind_probe=(*BEHIND_PROBE, "vace_context", "vace_context_scale"),
        **_WAN,
    ),
    ModelFamily(
        "flux-sglang",
        "FluxTransformer2DModel",
        (BlockStack(_DOUBLE, _TEXT_FIRST), BlockStack(_SINGLE, _TEXT_FIRST)),
        preset="flux",
        module=SGLANG,
        **_FLUX,
    ),
    ModelFamily(
        "qwen-image-sglang",
        "QwenImageTransformer2DModel",
        (BlockStack(_DOUBLE, _TEXT_FIRST),),
        module=SGLANG,
        **_FLUX,
    ),
    ModelFamily(
        "hunyuan-video-sglang",
        "HunyuanVideoTransformer3DModel",
        (
            BlockStack("double_blocks", ("img", "txt"), "img", per_sample=("img", "txt", "vec")),
            BlockStack("single_blocks", ("x",), "x", text_behind=True, per_sample=("x", "vec")),
        ),
        preset="hunyuan-video",
        module=SGLANG,
        **_HUNYUAN_VIDEO,
    ),
):
    register_family(_family)
