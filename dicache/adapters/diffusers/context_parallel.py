"""Splitting HunyuanVideo's sequence over GPUs, for which diffusers has no plan.

    transformer.enable_parallelism(
        config=ContextParallelConfig(ulysses_degree=n), cp_plan=context_parallel_plan(transformer)
    )

Every rank gets a part of the video's tokens and of the text's. In attention they come together as
[video_0, text_0, video_1, text_1, ...], and the mask of the text, which the model makes for [video,
text], is made anew in that order.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

from .attach import cache_on

_HUNYUAN_VIDEO = "HunyuanVideoTransformer3DModel"
_MASK = "attention_mask"  # of a block
_MASK_PLACE = 3  # among its arguments


def context_parallel_plan(transformer: nn.Module) -> dict[str, Any]:
    """The `cp_plan` for `transformer.enable_parallelism`: diffusers' own, or ours for HunyuanVideo.

    Of a HunyuanVideo it also puts hooks on the blocks, which leave the mask alone until the
    sequence is split.

    Raises:
        ValueError: There is no plan for this class, or not for this kind of conditioning.
    """
    kind = type(transformer).__name__
    known = getattr(transformer, "_cp_plan", None)
    if known is not None:
        return known
    if kind != _HUNYUAN_VIDEO:
        raise ValueError(
            f"Neither diffusers nor DiCache knows how to split the sequence of {kind}. Expected a "
            f"class with a `_cp_plan`, or {_HUNYUAN_VIDEO}."
        )
    if transformer.config.image_condition_type == "token_replace":  # type: ignore[union-attr]
        raise ValueError(
            f"This {kind} has image_condition_type='token_replace': its blocks tell the first "
            f"frame's tokens by their place in the sequence, which is another one in every part. "
            f"Expected a model of videos from text."
        )
    _Mask(transformer)
    by_sequence = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
    by_place = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    return {
        "rope": {0: by_place, 1: by_place},
        "x_embedder": {0: by_sequence},
        "context_embedder": {0: by_sequence},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


class _Mask:
    """The mask of a call, in the order in which ranks bring their tokens."""

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer: Any = transformer
        self._mask: Tensor | None = None  # of the call that runs
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(transformer, name):
                block.register_forward_pre_hook(self._exchange, with_kwargs=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parallel = self._transformer._parallel_config
        config = None if parallel is None else parallel.context_parallel_config
        self._mask = None
        if config is None:
            return
        names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self._mask = self._of_parts(given, config)

    def _of_parts(self, given: dict[str, Any], config: ContextParallelConfig) -> Tensor:
        """[B, 1, 1, N]: [video_0, text_0, video_1, text_1, ...]."""
        patch = self._transformer.config
        frames, height, width = given["hidden_states"].shape[2:]
        tokens = (frames // patch.patch_size_t) * (height // patch.patch_size)
        tokens *= width // patch.patch_size
        text = given["encoder_attention_mask"]
        # As the model has it: the text's tokens come first, and what fills it up behind them.
        is_text = torch.arange(text.shape[1], device=text.device) < text.sum(dim=1, keepdim=True)
        video = is_text.new_ones((text.shape[0], tokens))
        count = config._flattened_mesh.size()
        parts = zip(video.tensor_split(count, 1), is_text.tensor_split(count, 1), strict=True)
        return torch.cat([each for pair in parts for each in pair], dim=1)[:, None, None]

    def _exchange(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._mask is None:
            return None
        given = kwargs[_MASK] if _MASK in kwargs else args[_MASK_PLACE]
        mask = self._mask
        if len(given) < len(mask):  # the cache runs the block for some samples only
            mask = self._of_some(mask)
        if _MASK in kwargs:
            return args, {**kwargs, _MASK: mask}
        return (*args[:_MASK_PLACE], mask, *args[_MASK_PLACE + 1 :]), kwargs

    def _of_some(self, mask: Tensor) -> Tensor:
        cache = cache_on(self._transformer)
        call = None if cache is None else cache.model.call
        return mask if call is None or call.samples is None else call.samples.take(mask)
