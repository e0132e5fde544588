"""Attention processors: a model's projections around `sparse_attention`.

A processor is put in the place of the model's own, which it keeps for every call with full
attention. Whether a call is sparse, it sees by its `plan`; the step and the layer it never sees.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from .attention import Plan, sparse_attention

QKV = tuple[Tensor, Tensor, Tensor]


def _of_dense(name: str) -> Any:
    """An attribute that lives on the processor that was there before."""
    return property(
        lambda self: getattr(self.dense, name),
        lambda self, value: setattr(self.dense, name, value),
    )


class SparseProcessor:
    """Base of the processors of single families.

    Args:
        dense: The processor that was there before.

    Attributes:
        plan: What this call's sparse layers share; `None` for full attention.
        rows: int64 [R], the queries that this call is profiled by.
        kept: uint8 [B, H], the kinds of its heads where they are known; `None` to profile them.
        records: Whether calls leave `heads` behind.
        heads: uint8 [B, H] of the last call, 1 for its temporal heads; [B, 0] if its attention was
            full. Set, never read here, so compiled code does not depend on it.
    """

    def __init__(self, dense: Any) -> None:
        self.dense = dense
        self.plan: Plan | None = None
        self.rows: Any = None
        self.kept: Tensor | None = None
        self.records = False
        self.heads: Tensor | None = None

    # What a model's `set_attention_backend` and `enable_parallelism` set on its processors.
    _attention_backend = _of_dense("_attention_backend")
    _parallel_config = _of_dense("_parallel_config")

    def _fitting_plan(self, tokens: Tensor, text: int = 0) -> Plan | None:
        """The plan, if it is for these tokens [B, S, D] and as many text tokens behind them.

        A misfit is noted rather than warned of, which compiled code could not.
        """
        plan = self.plan
        if plan is None or plan.fits(tokens.shape[0], tokens.shape[1] + text, tokens.device):
            return plan
        plan.misfit = True
        return None

    def _dense(self, attn: Any, tokens: Tensor, *others: Any) -> Any:
        """What the processor that was there before makes of tokens [B, S, D]."""
        if self.records:
            self.heads = tokens.new_empty((tokens.shape[0], 0), dtype=torch.uint8)
        return self.dense(attn, tokens, *others)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """Attention [B, S, H D] within the plan's band."""
        output, heads = sparse_attention(q, k, v, plan, self.rows, self.kept)
        if self.records:
            self.heads = heads
        return output.flatten(2).to(q.dtype)


class HunyuanVideoProcessor(SparseProcessor):
    """Joint attention over video and text, in blocks with two streams and with one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        text = encoder_hidden_states
        plan = None if text is None else self._fitting_plan(hidden_states, text.shape[1])
        if plan is None or text is None:
            return self._dense(attn, hidden_states, text, attention_mask, image_rotary_emb)
        q, k, v = _joint_qkv(attn, hidden_states, text, image_rotary_emb)
        output = self._sparse(q, k, v, plan)
        video, text = output.split([hidden_states.shape[1], text.shape[1]], dim=1)
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


class WanProcessor(SparseProcessor):
    """Self-attention over the video; text comes in elsewhere."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        plan = self._fitting_plan(hidden_states)
        if plan is None or encoder_hidden_states is not None or attention_mask is not None:
            return self._dense(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        q, k, v = _own_qkv(attn, hidden_states)
        if rotary_emb is not None:
            turns = rotary_emb[0][0, :, 0], rotary_emb[1][0, :, 0]  # [S, D] cosines and sines
            q, k = (apply_rotary_emb(each, turns, sequence_dim=1) for each in (q, k))
        return attn.to_out[1](attn.to_out[0](self._sparse(q, k, v, plan)))


def _joint_qkv(attn: Any, video: Tensor, text: Tensor, rotary: Any) -> QKV:
    """q, k and v [B, S, H, D] of video and text, only the video's turned by its places."""
    layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
    q, k, v = _project(attn.heads, video, layers, norms)
    if rotary is not None:
        q, k = (apply_rotary_emb(each, rotary, sequence_dim=1) for each in (q, k))
    if attn.add_q_proj is not None:  # a block with two streams
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_added_q, attn.norm_added_k, None)
    others = _project(attn.heads, text, layers, norms)
    q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), others, strict=True))
    return q, k, v


def _project(heads: int, tokens: Tensor, layers: Any, norms: Any) -> QKV:
    split = [layer(tokens).unflatten(2, (heads, -1)) for layer in layers]
    q, k, v = (x if norm is None else norm(x) for x, norm in zip(split, norms, strict=True))
    return q, k, v


def _own_qkv(attn: Any, tokens: Tensor) -> QKV:
    """q, k and v [B, S, H, D] of Wan, which normalises over all heads together."""
    if attn.fused_projections:
        q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
    return q, k, v
