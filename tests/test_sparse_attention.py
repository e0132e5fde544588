"""Sparse attention of one layer: which kind a head is, and what the band leaves of its attention.

flex_attention runs uncompiled here, which is the same mask in plain arithmetic; the last tests
compile it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dicache.sparse_videogen import attention
from dicache.sparse_videogen.attention import Plan, sparse_attention
from dicache.sparse_videogen.masks import is_kept
from dicache.sparse_videogen.profiling import draw_rows, sampled_masks, temporal_heads

pytestmark = pytest.mark.usefixtures("plain_flex_attention")

FRAMES, HEIGHT, WIDTH = 8, 4, 6
FRAME = HEIGHT * WIDTH
VIDEO = FRAMES * FRAME
KINDS = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]], dtype=torch.uint8)


def make_plan(
    density: float, sink: int = 0, valid: tuple[int, ...] = (9, 5), text: int = 9
) -> Plan:
    ends = torch.tensor(valid, dtype=torch.int32)
    return Plan.make(sink, (FRAMES, HEIGHT, WIDTH), text, ends, density, 16)


def draw(length: int, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [2, S, 4, D] without any structure."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, length, 4, width, generator=generator).unbind(0)
    return q, k, v


def built(kinds: Tensor, text: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose heads look at their own frame, or at their own place in all frames.

    Queries and keys are one-hot codes of a token's frame or place; a temporal head's value differs
    from frame to frame and place to place, as a spatial one's does.
    """
    batch, heads = kinds.shape
    tokens = torch.arange(VIDEO)
    codes = {0: tokens // FRAME, 1: tokens % FRAME}
    width = max(FRAMES, FRAME)
    generator = torch.Generator().manual_seed(1)
    q = 0.1 * torch.randn(batch, VIDEO + text, heads, width, generator=generator)
    v = torch.randn(batch, VIDEO + text, heads, width, generator=generator)
    k = torch.zeros_like(q)
    for sample in range(batch):
        for head in range(heads):
            code = torch.nn.functional.one_hot(codes[int(kinds[sample, head])], width).float()
            q[sample, :VIDEO, head] += 20 * code
            k[sample, :VIDEO, head] = code * width**0.5
    return q, k, v


def rows_of(plan: Plan, count: int = 32) -> Tensor:
    return draw_rows(count, VIDEO, 3, [1], torch.Generator())[0]


@pytest.mark.parametrize(("sink", "text"), [(0, 9), (1, 0)])
@pytest.mark.parametrize("count", [16, 64])
def test_heads_built_to_be_of_a_kind_are_found_to_be_of_it(sink, text, count):
    plan = make_plan(0.3, sink, (text, text), text)
    q, k, v = built(KINDS, text)
    for seed in range(5):
        rows = draw_rows(count, VIDEO, seed, [1], torch.Generator())[0]
        found = temporal_heads(q, k, v, rows, plan.bounds, plan.positions)
        assert torch.equal(found, KINDS)


def test_the_profile_is_the_error_of_single_rows():
    """Every head's two errors, from softmax alone, row by row."""
    plan, (q, k, v) = make_plan(0.35), built(KINDS, 9)
    rows = rows_of(plan, 12)
    masks = sampled_masks(rows, plan.bounds, plan.positions)
    errors = torch.zeros(2, 4, 2)
    for sample in range(2):
        for head in range(4):
            scores = q[sample, rows, head] @ k[sample, :, head].T / 24**0.5
            exact, *banded = (
                scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v[sample, :, head]
                for mask in masks[sample]
            )
            errors[sample, head] = torch.stack([((b - exact) ** 2).mean() for b in banded])
    found = temporal_heads(q, k, v, rows, plan.bounds, plan.positions)
    assert torch.equal(found.bool(), errors[..., 1] < errors[..., 0])
    assert found.unique().numel() == 2


def test_sampled_masks_are_rows_of_the_band_in_both_orders():
    plan = make_plan(0.35)
    length, rows = VIDEO + 9, rows_of(plan)
    exact, spatial, temporal = sampled_masks(rows, plan.bounds, plan.positions).unbind(1)
    whole = torch.stack([dense_mask(plan, sample, length) for sample in range(2)])
    assert torch.equal(spatial, whole[:, rows])
    positions = plan.positions.long()
    assert torch.equal(temporal, whole[:, positions[rows]][:, :, positions])
    assert exact.sum(dim=-1).eq(plan.bounds[:, 2:3]).all()


def dense_mask(plan: Plan, sample: int, length: int) -> Tensor:
    place = torch.arange(length)
    return is_kept(place[:, None], place, plan.bounds[sample])


@pytest.mark.parametrize(("sink", "text", "valid"), [(0, 9, (9, 5)), (1, 0, (0, 0))])
def test_each_head_attends_within_the_band_of_its_kind(sink, text, valid):
    """Against dense attention with the mask, moved to the head's order."""
    plan = make_plan(0.4, sink, valid, text)
    length = VIDEO + text
    q, k, v = draw(length)
    rows = rows_of(plan)
    kinds = temporal_heads(q, k, v, rows, plan.bounds, plan.positions)
    assert kinds.unique().numel() == 2
    output, _ = sparse_attention(q, k, v, plan, rows)
    for sample in range(2):
        for head in range(4):
            place = plan.positions.long() if kinds[sample, head] else torch.arange(length)
            mask = dense_mask(plan, sample, length)[place][:, place]
            one = (each[sample, :, head] for each in (q, k, v))
            wanted = scaled_dot_product_attention(*one, attn_mask=mask)
            torch.testing.assert_close(output[sample, :, head], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sink", "text"), [(0, 9), (1, 0)])
def test_the_error_falls_as_the_density_rises(sink, text):
    q, k, v = built(KINDS, text)
    q = q / 8  # attention that reaches beyond its frame or place
    exact = scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
    errors = []
    # The first frame alone, as queries and keys, is 1 - (7 / 8)^2 of the elements.
    least = () if sink else (0.1, 0.2)
    for density in (*least, 0.3, 0.5, 0.7, 0.9, 1.0):
        plan = make_plan(density, sink, (text, text), text)
        output = sparse_attention(q, k, v, plan, rows_of(plan))[0].transpose(1, 2)
        errors.append((output - exact).square().mean().item())
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-10


def test_padding_does_not_reach_any_valid_token():
    plan, (q, k, v) = make_plan(0.4), draw(VIDEO + 9)
    rows = rows_of(plan)
    first, _ = sparse_attention(q, k, v, plan, rows)
    for tensor in (q, k, v):
        tensor[1, VIDEO + 5 :] = 1e3  # sample 1 has five text tokens
    second, _ = sparse_attention(q, k, v, plan, rows)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1, : VIDEO + 5], second[1, : VIDEO + 5])
    assert second.isfinite().all()


def test_rows_are_spread_over_the_video_and_depend_on_step_and_layer_alone():
    before = torch.random.get_rng_state()
    generator = torch.Generator()
    rows = draw_rows(16, 100, 4, [1, 2], generator)
    assert torch.equal(torch.random.get_rng_state(), before)
    part = torch.arange(16) * 6.25  # one row in each
    assert (rows >= part.long()).all() and (rows <= (part + 6.25).long()).all()
    assert torch.equal(draw_rows(16, 100, 4, [2], torch.Generator())[0], rows[1])
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(draw_rows(16, 100, 5, [1], generator)[0], rows[0])
    assert torch.equal(draw_rows(100, 100, 0, [0], generator)[0], torch.arange(100))


@pytest.mark.parametrize("width", [12, 16])
def test_compiled_flex_attention_is_the_same(monkeypatch, width):
    if not attention._has_compiler():
        pytest.skip("there is no C++ compiler")
    plan, (q, k, v) = make_plan(0.4), draw(VIDEO + 9, width)
    plain, _ = sparse_attention(q, k, v, plan, rows_of(plan))
    monkeypatch.setattr(attention, "COMPILED", None)
    torch.testing.assert_close(
        sparse_attention(q, k, v, plan, rows_of(plan))[0], plain, rtol=1e-5, atol=1e-5
    )


@pytest.mark.gpu
def test_on_a_gpu_it_is_dense_attention_with_the_mask(monkeypatch):
    """Blocks of 128, bf16: as near to fp32 as dense bf16 attention with the same mask is."""
    monkeypatch.setattr(attention, "COMPILED", None)
    frames, grid, text = 9, (9, 12, 20), 50
    length = frames * 240 + text
    plan = Plan.make(0, grid, text, torch.tensor([50, 31], dtype=torch.int32).cuda(), 0.4, 128)
    exact = [each.cuda() for each in draw(length, 64)]
    q, k, v = (each.bfloat16() for each in exact)
    rows = draw_rows(64, frames * 240, 3, [1], torch.Generator())[0].cuda()
    kinds = temporal_heads(q, k, v, rows, plan.bounds, plan.positions)
    output, _ = sparse_attention(q, k, v, plan, rows)
    tokens = torch.arange(length, device="cuda")
    for sample, head in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        place = plan.positions.long() if kinds[sample, head] else tokens
        mask = is_kept(place[:, None], place, plan.bounds[sample])
        wanted, dense = (
            scaled_dot_product_attention(*(x[sample, :, head] for x in given), attn_mask=mask)
            for given in (exact, (q, k, v))
        )
        error = (output[sample, :, head].float() - wanted).norm()
        assert error <= 2 * (dense.float() - wanted).norm()


def test_without_a_compiler_the_cpu_computes_it_plainly(monkeypatch):
    monkeypatch.setattr(attention, "COMPILED", None)
    monkeypatch.setattr(attention, "_has_compiler", lambda: False)
    assert not attention._compiles(torch.device("cpu"))
    assert attention._compiles(torch.device("cuda"))
    monkeypatch.setattr(attention, "COMPILED", True)
    assert attention._compiles(torch.device("cpu"))
