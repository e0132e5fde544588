"""What `get_sparse_videogen_stats` tells of a run is what its attention did.

Elements are counted pair by pair here, on models whose videos have five frames of 4 x 4 tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import sparse_part
from test_sparse_videogen import FAMILIES, STEPS, changed, outputs, video
from tiny_models import TEXT_TOKENS, blocks, build
from tiny_pipelines import pipeline, run
from torch._dynamo.testing import CompileCounterWithBackend

from dicache import (
    DiCacheConfig,
    SparseVideoGenStats,
    apply_dicache,
    apply_sparse_videogen,
    get_sparse_videogen_stats,
    get_stats,
    remove_sparse_videogen,
)
from dicache.sparse_videogen import attention

pytestmark = pytest.mark.usefixtures("plain_flex_attention")

FRAMES, FRAME = 5, 16
VIDEO = FRAMES * FRAME
RULES = changed(stats=True)  # density 0.7; of five steps two are dense, of four blocks one


def count_kept(sink: int, valid: int, window: int) -> int:
    """Pairs that one map keeps, from the words of `masks`: text, sink, and the band."""
    pairs = ((i, j) for i in range(valid) for j in range(valid))
    return sum(max(i, j) >= VIDEO or min(i, j) < sink or abs(i - j) <= window for i, j in pairs)


def widest(sink: int, valid: int, density: float) -> int:
    """What the widest band of no more than this density keeps."""
    counts = (count_kept(sink, valid, window) for window in range(VIDEO))
    return max(count for count in counts if count <= density * valid**2)


def stats_of(model: Any) -> SparseVideoGenStats:
    stats = get_sparse_videogen_stats(model)
    assert isinstance(stats, SparseVideoGenStats)
    return stats


@pytest.mark.parametrize(("family", "lengths"), [("hunyuan-video", (5, 3)), ("wan", None)])
def test_the_density_is_the_share_of_pairs_that_are_kept(family, lengths):
    """Dense steps, the dense block and the text included, padding not."""
    model, sink = build(family), FRAME if family == "wan" else 0
    apply_sparse_videogen(model, RULES)
    outputs(model, video(family, lengths=lengths))
    sizes = [VIDEO + text for text in (lengths or (0, 0))]
    assert max(lengths or (0,)) <= TEXT_TOKENS
    full = sum(size**2 for size in sizes)
    kept = sum(widest(sink, size, 0.7) for size in sizes)
    (records,) = stats_of(model).contexts.values()
    assert [(each.step, each.block) for each in records] == [
        (step, block) for step in range(STEPS) for block in range(4)
    ]
    for each in records:
        is_sparse = each.step >= 2 and each.block >= 1
        assert (each.temporal is not None) == is_sparse
        assert (each.kept, each.elements) == (kept if is_sparse else full, full)
    assert stats_of(model).density == pytest.approx((11 * full + 9 * kept) / (20 * full))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_are_those_that_the_profiling_found(family, monkeypatch):
    """A profiling that is known: it turns from call to call, so a wrong place would show."""
    told: list[torch.Tensor] = []

    def known(q: torch.Tensor, *_: Any) -> torch.Tensor:
        kinds = (torch.arange(q.shape[0] * q.shape[2]) + len(told)) % 3 == 0
        told.append(kinds.view(q.shape[0], -1).to(torch.uint8))
        return told[-1]

    monkeypatch.setattr(attention, "temporal_heads", known)
    model = build(family)
    apply_sparse_videogen(model, RULES)
    outputs(model, video(family))
    stats = stats_of(model)
    found = [each for each in stats.records() if each.temporal is not None]
    assert [(each.step, each.block) for each in found] == [
        (s, b) for s in (2, 3, 4) for b in (1, 2, 3)
    ]
    for each, kinds in zip(found, told, strict=True):
        assert each.temporal == tuple(tuple(map(bool, sample)) for sample in kinds.tolist())
    shares = stats.temporal_shares()
    assert list(shares) == [1, 2, 3]
    for block, heads in shares.items():
        wanted = torch.stack(told).view(3, 3, *told[0].shape)[:, block - 1].float().mean(dim=(0, 1))
        assert heads == pytest.approx(wanted.tolist())
    assert len({share for heads in shares.values() for share in heads}) > 1


def test_blocks_that_the_cache_skips_have_no_record():
    """With the cache there are as many records as block evaluations, in the steps it computed."""
    model = build("wan")
    apply_sparse_videogen(model, RULES)
    apply_dicache(model, DiCacheConfig(schedule="CRCCR", num_inference_steps=STEPS))
    outputs(model, video("wan"))
    (records,) = stats_of(model).contexts.values()
    cache = get_stats(model)
    (steps,) = cache.contexts.values()
    assert [each.action for each in steps if each.action == "reuse"]
    assert len(records) == cache.block_calls
    for each in steps:
        ran = [record.block for record in records if record.step == each.step]
        assert ran == ([0] if each.action == "reuse" else [0, 1, 2, 3])


def test_a_part_of_the_batch_counts_as_a_part():
    """A block that runs for one sample of two does so in full: half of the elements."""
    model = build("wan")
    apply_sparse_videogen(model, changed(stats=True, dense_steps=0.0))
    attn, inputs = blocks("wan", model)[2].attn1, video("wan", 1)[0]
    whole = attn.forward
    attn.forward = lambda x, *rest: whole(x[:1], None, None, rest[-1]).expand(2, -1, -1)
    with pytest.warns(UserWarning, match="a part of the batch"):
        model(**inputs)
    records = {each.block: each for each in stats_of(model).records()}
    assert (records[2].kept, records[2].elements) == (VIDEO**2, VIDEO**2)
    assert records[1].elements == 2 * VIDEO**2 and records[2].temporal is None


def test_compiled_blocks_tell_the_same_with_the_graphs_of_those_that_tell_nothing():
    family, graphs, found = "wan", [], []
    for rules, compiled in ((RULES, False), (RULES, True), (changed(), True)):
        torch._dynamo.reset()
        model, counter = build(family), CompileCounterWithBackend("eager")
        apply_sparse_videogen(model, rules)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for seed in (0, 1):  # a second run makes no other graph
            outputs(model, video(family, seed=seed, lengths=(5, 3)))
            graphs.append(counter.frame_count)
        if rules.stats:
            found.append(stats_of(model))
    assert found[0] == found[1]
    assert graphs[2] == graphs[3] == graphs[4] == graphs[5] > 0


def test_they_are_of_the_last_run_and_of_every_context():
    pipe = pipeline("wan")
    options = {"num_frames": 17, "height": 32, "width": 32}
    apply_sparse_videogen(pipe, changed(stats=True, num_inference_steps=None))
    for steps in (2, STEPS):
        run("wan", pipe, steps, **options)
        (stats,) = get_sparse_videogen_stats(pipe).values()
        assert {name: len(each) for name, each in stats.contexts.items()} == {
            "cond": 4 * steps,
            "uncond": 4 * steps,
        }
    remove_sparse_videogen(pipe)
    apply_sparse_videogen(pipe.transformer, RULES)
    with pytest.raises(RuntimeError):  # an aborted run does not count what it did not do
        pipe.transformer(**{**video("wan")[0], "encoder_hidden_states": torch.zeros(2, 5, 3)})
    assert list(stats_of(pipe.transformer).records()) == []


def test_nothing_is_kept_where_nobody_asks():
    model = build("wan")
    apply_sparse_videogen(model, changed())
    outputs(model, video("wan"))
    part = sparse_part(model)
    assert part.recorder is None and all(each.heads is None for each in part.processors)
    with pytest.raises(ValueError, match="WanTransformer3DModel has no statistics.*stats=True"):
        get_sparse_videogen_stats(model)
    remove_sparse_videogen(model)
    with pytest.raises(ValueError, match="WanTransformer3DModel has no Sparse VideoGen"):
        get_sparse_videogen_stats(model)
    with pytest.raises(ValueError, match="stats is 1. Expected True or False"):
        changed(stats=1)


def test_without_attention_the_density_is_that_of_full_attention():
    assert SparseVideoGenStats().density == 1.0 and SparseVideoGenStats().temporal_shares() == {}
