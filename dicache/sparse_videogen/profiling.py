"""Which heads look at their frame, and which at their place over time: online profiling.

A few query tokens are drawn over the whole video. Their attention is computed three times: in full,
under the band in frame-major order, and under the same band in token-major order. The head is of
the kind whose output is nearer to the full one (arXiv 2502.01776, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .masks import is_kept


def draw_rows(
    count: int, tokens: int, step: int, layers: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Query tokens for every layer, spread over the video: one out of each of `count` equal parts.

    Args:
        count: Number of rows R of a layer; at most `tokens`.
        tokens: Number of tokens to draw from, the first of the sequence.
        step: Index of the step; with the layer's it is the seed.
        layers: Indices of the layers that are drawn for.
        generator: On the CPU; it is seeded here.

    Returns:
        int64 [len(layers), R], on the CPU, ascending.
    """
    parts = torch.arange(count, dtype=torch.float64)
    shares = [
        parts + torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64)
        for seed in (1_000_003 * step + layer for layer in layers)
    ]
    rows = torch.stack(shares) * (tokens / count)
    return rows.long().clamp(max=tokens - 1)


def temporal_heads(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, bounds: Tensor, positions: Tensor
) -> Tensor:
    """1 for the heads whose sampled attention the token-major band changes least, else 0.

        error(mask) = mean over rows and D of (attention(q[rows]) - attention_mask(q[rows]))^2

    Keys and values are read once: the three masks are three times the rows of one call.

    Args:
        q, k, v: [B, S, H, D] tokens in frame-major order.
        rows: int64 [R], the sampled queries; tokens of the video.
        bounds: int32 [B, 4] from `make_bounds`.
        positions: int32 [S], the position of each token in token-major order.

    Returns:
        uint8 [B, H], on the device. A tie is a spatial head.
    """
    masks = sampled_masks(rows, bounds, positions)  # [B, 3, R, S]
    queries = q[:, rows].transpose(1, 2).repeat(1, 1, 3, 1)  # [B, H, 3 R, D]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    outputs = scaled_dot_product_attention(queries, keys, values, masks.flatten(1, 2)[:, None])
    exact, spatial, temporal = outputs.float().unflatten(2, (3, -1)).unbind(2)  # [B, H, R, D]
    spatial_error = (spatial - exact).square().mean(dim=(2, 3))  # [B, H]
    temporal_error = (temporal - exact).square().mean(dim=(2, 3))
    return (temporal_error < spatial_error).to(torch.uint8)


def sampled_masks(rows: Tensor, bounds: Tensor, positions: Tensor) -> Tensor:
    """The keys [B, 3, R, S] of sampled queries: all valid ones, spatial band, temporal band."""
    tokens = torch.arange(positions.shape[0], device=positions.device)
    of_sample = bounds[:, None, None]  # [B, 1, 1, 4]
    exact = (tokens < of_sample[..., 2]).expand(-1, rows.shape[0], -1)
    spatial = is_kept(rows[:, None], tokens, of_sample)
    temporal = is_kept(positions[rows][:, None], positions, of_sample)
    return torch.stack([exact, spatial, temporal], dim=1)
