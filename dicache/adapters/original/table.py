"""The table of original classes: one row a class, as the repositories of their authors have it.

Thresholds are those of the same models in diffusers, see `adapters.diffusers.table`: the published
ones, and these converted for our default rules, which nobody measured on the real models.
"""

from __future__ import annotations

from ...driver.families import BlockStack, ModelFamily, register_family

# HunyuanVideo's blocks take lengths of the whole batch (cu_seqlens): they run for all samples.
_NO_SAMPLES: tuple[str, ...] = ()
_WAN_SAMPLES = ("x", "e", "seq_lens", "grid_sizes", "context", "context_lens", "hints")

HUNYUAN_VIDEO = ModelFamily(
    "hunyuan-video-original",
    "HYVideoDiffusionTransformer",
    (
        BlockStack("double_blocks", ("img", "txt"), "img", per_sample=_NO_SAMPLES),
        BlockStack("single_blocks", ("x",), "x", text_behind=True, per_sample=_NO_SAMPLES),
    ),
    threshold=0.1,
    alignment_threshold=0.035,
    preset="hunyuan-video",
    module="hyvideo",
    timestep="t",
    text="text_states",
    behind_probe=(),
)
# Wan 2.1 and 2.2, and what derives from them: VACE, whose hints are added behind blocks.
WAN = ModelFamily(
    "wan-original",
    "WanModel",
    (BlockStack("blocks", ("x",), "x", per_sample=_WAN_SAMPLES),),
    threshold=0.08,
    alignment_threshold=0.02,
    preset="wan2.1",
    module="wan",
    timestep="t",
    text="context",
    behind_probe=("vace_context", "vace_context_scale"),
)
for _family in (HUNYUAN_VIDEO, WAN):
    register_family(_family)
