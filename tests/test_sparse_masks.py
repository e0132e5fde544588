"""The band's masks: the analytic blocks are those of a dense mask, and keep the share asked for.

Dense masks are made here from the definition, pair by pair, for sizes where S x S is small.
"""

from __future__ import annotations

import resource
import time

import pytest
import torch
from fuzzing import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from dicache.sparse_videogen import masks
from dicache.sparse_videogen.attention import Plan


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, int, list[int], float, int]:
    """(sink, video_end, text, valid text of every sample, density, block size)."""
    frame_size, frames = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    sink = frame_size * draw(st.integers(0, min(frames, 2)))
    text = draw(st.sampled_from([0, 0, 1, 7, 40]))
    valid = draw(st.lists(st.integers(0, text), min_size=1, max_size=3))
    density = draw(st.floats(0.01, 1.0))
    return sink, frame_size * frames, text, valid, density, draw(st.sampled_from([16, 32]))


def dense(bounds: Tensor, length: int) -> Tensor:
    """[B, S, S], by the words of the module's first paragraph."""
    wanted = torch.zeros(len(bounds), length, length, dtype=torch.bool)
    for sample, (sink, video_end, valid_end, window) in enumerate(bounds.tolist()):
        for i in range(length):
            for j in range(length):
                if i >= valid_end or j >= valid_end:
                    kept = i >= valid_end and j >= valid_end
                elif max(i, j) >= video_end or min(i, j) < sink:
                    kept = True
                else:
                    kept = abs(i - j) <= window
                wanted[sample, i, j] = kept
    return wanted


def make(case: tuple[int, int, int, list[int], float, int]) -> tuple[Tensor, int, int]:
    sink, video_end, text, valid, density, block_size = case
    valid_end = torch.tensor([video_end + each for each in valid], dtype=torch.int32)
    return masks.make_bounds(sink, video_end, valid_end, density), video_end + text, block_size


def chosen(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [B, n, n] of a table."""
    blocks = torch.zeros(indices.squeeze(1).shape, dtype=torch.bool)
    for sample, row in torch.cartesian_prod(*map(torch.arange, blocks.shape[:2])).tolist():
        blocks[sample, row, indices[sample, 0, row, : counts[sample, 0, row]].long()] = True
    return blocks


@draws(60)
@given(geometries())
def test_the_blocks_and_the_mask_function_are_the_dense_mask(case):
    bounds, length, block_size = make(case)
    wanted = dense(bounds, length)
    tables = masks.make_tables(bounds, length, block_size)
    mask = masks.block_mask(tables, bounds, length, block_size)
    partial = chosen(mask.kv_num_blocks, mask.kv_indices)
    whole = chosen(mask.full_kv_num_blocks, mask.full_kv_indices)
    place = torch.arange(length)
    of_pairs = torch.stack(
        [
            mask.mask_mod(torch.tensor(b), None, place[:, None], place)  # type: ignore[arg-type]
            for b in range(len(bounds))
        ]
    )
    assert torch.equal(of_pairs, wanted)
    # Whole, in part, or not at all, exactly as the elements of a block say.
    n = -(-length // block_size)
    padded = torch.zeros(len(bounds), n * block_size, n * block_size, dtype=torch.bool)
    padded[:, :length, :length] = wanted
    blocks = padded.unflatten(1, (n, block_size)).unflatten(3, (n, block_size))
    kept = blocks.sum(dim=(2, 4))
    assert torch.equal(whole, kept == block_size**2)
    assert torch.equal(partial, (kept > 0) & (kept < block_size**2))


def test_the_tables_are_those_that_torch_finds_by_trying_every_pair():
    bounds, length, block_size = make((12, 96, 40, [3, 40], 0.4, 16))
    mask = masks.block_mask(
        masks.make_tables(bounds, length, block_size), bounds, length, block_size
    )
    wanted = create_block_mask(
        masks.mask_function(bounds), 2, 1, length, length, device="cpu", BLOCK_SIZE=block_size
    )
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(mask, name), getattr(wanted, name)), name


@draws(60)
@given(geometries())
def test_the_kept_share_is_the_density(case):
    """One place of W more would be too many, unless W is 0 or all is kept; counts are exact."""
    bounds, length, _ = make(case)
    density, wanted = case[4], dense(bounds, length)
    for sample, (sink, video_end, valid_end, window) in enumerate(bounds.tolist()):
        kept = wanted[sample, :valid_end, :valid_end].sum().item()
        end = torch.tensor(valid_end)
        count = [
            masks.kept_elements(sink, video_end, end, torch.tensor(each)).item()
            for each in (window, window + 1)
        ]
        assert kept == count[0]
        assert window == 0 or kept <= density * valid_end**2
        assert window >= video_end - sink - 1 or count[1] > density * valid_end**2


@draws(60)
@given(geometries(), st.integers(1, 12))
def test_a_band_is_narrow_where_it_does_not_reach_a_frame(case, frame_size):
    sink, _, text, _, density, _ = case
    frames = 2 + sink // frame_size
    video_end = frames * frame_size
    sink = min(sink, 1) * frame_size
    end = torch.tensor([video_end + text], dtype=torch.int32)
    window = masks.make_bounds(sink, video_end, end, density)[0, 3].item()
    narrow = masks.is_narrow(sink, (frames, 1, frame_size), text, density)
    assert narrow == (window < frame_size)


@pytest.mark.parametrize(("sink", "text"), [(0, 256), (3600, 0)])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.3, 0.6])
def test_the_share_of_real_sizes_matches_within_one_block(sink, text, density):
    """W is off by less than one place, a hundredth of a block's 128."""
    video_end = 33 * 3600
    end = torch.tensor([video_end + text], dtype=torch.int32)
    window = masks.make_bounds(sink, video_end, end, density)[0, 3].long()
    count = masks.kept_elements(sink, video_end, end.long(), window).item()
    assert abs(count / end.item() ** 2 - density) <= 128 / end.item()


def test_the_mask_of_a_real_video_is_made_at_once_and_without_memory():
    """119,056 tokens: 720p, 129 frames. S x S booleans would be 14 GB."""
    valid = torch.tensor([200], dtype=torch.int32)
    Plan.make(0, (4, 8, 8), 256, valid, 0.25, 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    plan = Plan.make(0, (33, 45, 80), 256, valid, 0.25, 128)
    seconds = time.perf_counter() - begin
    assert plan.order.shape == (119_056,)
    assert seconds < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize(("sink", "frames", "frame_size", "text"), [(0, 5, 6, 3), (6, 4, 6, 0)])
def test_token_major_order_and_its_inverse(sink, frames, frame_size, text):
    length = sink + frames * frame_size + text
    order, positions = masks.token_major(sink, frames, frame_size, length)
    assert torch.equal(order[positions.long()], torch.arange(length, dtype=torch.int32))
    fixed = [*range(sink), *range(length - text, length)]
    assert order[fixed].tolist() == fixed
    for frame in range(frames):
        for place in range(frame_size):
            token = sink + frame * frame_size + place
            assert positions[token] == sink + place * frames + frame


def test_a_video_that_is_all_sink_or_all_kept():
    end = torch.tensor([24], dtype=torch.int32)
    assert dense(masks.make_bounds(24, 24, end, 0.1), 24).all()
    assert dense(masks.make_bounds(0, 24, end, 1.0), 24).all()
