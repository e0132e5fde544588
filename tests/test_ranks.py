"""Ranks that share a model decide as one: gloo processes on the CPU, compared with one process.

What runs in them is in `rank_worker.py`. A hang would be an error after 20 seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from original_models import ask, branches, steps
from original_models import build as build_original
from ranks import Group, Rank
from tiny_models import build
from torch import nn

from dicache import DiCacheConfig, apply_dicache, context_parallel_plan
from dicache.core.run import Timeline
from dicache.driver.parallel import group_of_all

RULES = [
    "default",
    "sample",
    "delta_y",
    "delta_minus",
    "packed",
    "reference",
    "contexts",
    "guidance",
    "uneven",
]
MODELS = ["flux", "wan", "hunyuan-video", "qwen-image", "flux2", "ltx", "chronoedit"]
MODELS += ["minimax-h3"]
FOUR = ["default", "sample", "uneven"]
SAMPLES = ["flux", "hunyuan-video", "wan"]
ORIGINALS = ["hunyuan", "t2v", "2.2"]
ROWS = {"hunyuan": "hunyuan-video-original", "t2v": "wan-original"}
SHARDED = ["fsdp1", "fsdp2", "tensor"]
TILES = ["threshold", "CCRRRRRRRRRC", "CCCCCCCCCCCC"]
OTHERS = [
    "rounded",
    "noise",
    "branches",
    "moments",
    "not_finite:0",
    "not_finite:1",
    "ten_runs:wan",
    "compiled:wan",
]
OTHERS += ["calibrated:wan", "learned:wan", "pipeline:wan"]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    """What two ranks saw in all checks that end well."""
    checks = [f"session:{name}" for name in RULES] + [f"tiles:{name}" for name in TILES]
    checks += [f"model:{name}" for name in MODELS] + [f"original:{name}" for name in ORIGINALS]
    checks += [f"model:{name}/sample" for name in SAMPLES]
    checks += [f"weights:{kind}" for kind in SHARDED] + OTHERS
    return Group(tmp_path_factory.mktemp("ranks"), checks).wait(timeout=600)


def seen(ranks: list[Rank], check: str) -> list[dict[str, Any]]:
    for rank in ranks:
        assert check in rank.seen and "error" not in rank.seen[check], rank.errors[-3000:]
    return [rank.seen[check] for rank in ranks]


def test_no_rank_ends_with_an_error(ranks: list[Rank]) -> None:
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].errors[-3000:]


# --- a loop of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_ranks_decide_as_one_process_does(ranks: list[Rank], name: str) -> None:
    """By all errors, for batches and samples; also where every rank alone would do otherwise."""
    one, other = seen(ranks, f"session:{name}")
    assert one["shared"] == other["shared"] == one["whole"]
    assert one["alone"] != other["alone"]
    assert "R" in str(one["shared"]) and "c" in str(one["shared"])
    assert max(one["far"], other["far"]) < CLOSE


@pytest.mark.parametrize("name", RULES)
def test_a_probed_step_takes_one_total_and_one_word_of_the_first_rank(
    ranks: list[Rank], name: str
) -> None:
    for each in seen(ranks, f"session:{name}"):
        samples = 2 if name == "sample" else 1
        probed = sum(len(mask) - mask.count("C") for mask in each["shared"].values()) // samples
        assert each["called"] == ["all_reduce", "broadcast"] * probed
        if name in (
            "default",
            "sample",
        ):  # six sums a sample in fp32; 2 + 2 (B + 1) numbers in fp64
            assert each["bytes"] == [2 * 6 * 4, 8 * (2 + 2 * 3)] * probed


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_in_one_rank_is_so_for_all(ranks: list[Rank], which: int) -> None:
    """The step, and the next one, are computed; nobody makes a profile of it."""
    one, other = seen(ranks, f"not_finite:{which}")
    assert one["mask"] == other["mask"]
    assert one["mask"][4] == "c" and "R" in one["mask"][:4] and "R" in one["mask"][6:]
    assert one["refused"] == other["refused"] == "The hidden states of the context 'main' "


def test_ranks_follow_the_first_ones_numbers(ranks: list[Rank]) -> None:
    """Decisions and gamma, where the second rank got other totals."""
    for each in seen(ranks, "rounded"):
        alike, other = each["gammas"]
        assert alike == other and each["far"] == 0.0
        assert each["masks"][0] == each["masks"][1]


@pytest.mark.parametrize("name", TILES)
def test_ranks_follow_what_the_first_one_saw_of_the_order_of_calls(
    ranks: list[Rank], name: str
) -> None:
    """In probed steps and in computed ones."""
    one, other = seen(ranks, f"tiles:{name}")
    for which in range(2):
        key = f"as {which} tells"
        assert one[key] == other[key]
        assert len(one[f"told {key}"]) == len(other[f"told {key}"]) == (1 if which == 0 else 0)


def test_ranks_follow_what_the_first_one_saw_of_noise(ranks: list[Rank]) -> None:
    one, other = seen(ranks, "noise")
    for key in ("as 0 tells", "as 1 tells"):
        assert one[key] == other[key]
    assert set(one["as 0 tells"][3:]) == {"C"}
    assert "R" in one["as 1 tells"][3:]


def test_ranks_with_a_branch_of_guidance_each_are_independent(ranks: list[Rank]) -> None:
    one, other = seen(ranks, "branches")
    assert one["called"] == other["called"] == ["all_gather"]  # that of the loop
    assert one["mask"] != other["mask"]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    """What four ranks saw."""
    checks = [f"session:{name}" for name in FOUR] + ["two_groups", "moments"]
    return Group(tmp_path_factory.mktemp("four"), checks, size=4).wait(timeout=300)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(four: list[Rank], name: str) -> None:
    all_seen = seen(four, f"session:{name}")
    assert len({str(each["alone"]) for each in all_seen}) > 1
    for each in all_seen:
        assert each["shared"] == each["whole"]
        assert each["far"] < CLOSE


def test_four_ranks_weigh_moments(four: list[Rank]) -> None:
    assert max(each["far"] for each in seen(four, "moments")) < CLOSE


def test_groups_do_not_wait_for_each_other(four: list[Rank]) -> None:
    """The first rank of the second group is not the first one of all."""
    first, same, second, alike = seen(four, "two_groups")
    for one, other in ((first, same), (second, alike)):
        assert one["shared"] == other["shared"] == one["whole"]
    assert 0 < first["shared"].count("R") < second["shared"].count("R")


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.backs("GPUs")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_sequence_is_split(ranks: list[Rank], name: str) -> None:
    """Two branches, and context parallelism before and after the cache."""
    one, other = seen(ranks, f"model:{name}")
    for order in ("before", "after"):
        assert one[order] == other[order] == one["whole"]
        assert {*one[order]} == {"cond", "uncond"} and "R" in one[order]["cond"]
        assert max(each[f"far {order}"] for each in (one, other)) < CLOSE
        assert max(each[f"plain {order}"] for each in (one, other)) < CLOSE  # taken off again
    assert one["worth"] > 100 * CLOSE  # a reused step is another thing than a computed one


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_a_model_whose_sequence_is_split(ranks: list[Rank], name: str) -> None:
    """Each has its own schedule, and blocks run for some of them."""
    one, other = seen(ranks, f"model:{name}/sample")
    for order in ("before", "after"):
        assert one[order] == other[order] == one["whole"]
        pairs = [one[order]["cond"][k : k + 2] for k in range(0, 16, 2)]
        assert {"cR", "Rc"} & {*pairs}
        assert max(each[f"far {order}"] for each in (one, other)) < CLOSE


@pytest.mark.backs("GPUs", rows=ROWS)
@pytest.mark.parametrize("kind", ORIGINALS)
def test_an_original_model_whose_sequence_is_split(ranks: list[Rank], kind: str) -> None:
    one, other = seen(ranks, f"original:{kind}")
    for order in ("before", "after"):
        assert one[order] == other[order] == one["whole"]
        assert "R" in str(one[order]) and "c" in str(one[order])
        assert max(each[f"far {order}"] for each in (one, other)) < CLOSE


@pytest.mark.parametrize("kind", SHARDED)
def test_ranks_with_a_part_of_the_weights_each(ranks: list[Rank], kind: str) -> None:
    """FSDP's have another sample each, and decide as one process does that has both in a batch."""
    one, other = seen(ranks, f"weights:{kind}")
    if kind != "tensor":
        assert one["alone"] != other["alone"]
    for order in {"before", "after"} & one.keys():
        assert one[order] == other[order] == one["whole"]
        assert max(each[f"far {order}"] for each in (one, other)) < CLOSE


def test_a_pipeline_whose_transformer_is_split_after_the_cache(ranks: list[Rank]) -> None:
    """With a scheduler that tells where calls stand, and its timesteps on the device."""
    for each in seen(ranks, "pipeline:wan"):
        assert each["shared"] == each["whole"] and "R" in str(each["whole"])
        assert each["far"] < CLOSE


def test_ten_runs_in_a_row(ranks: list[Rank]) -> None:
    one, other = seen(ranks, "ten_runs:wan")
    whole = seen(ranks, "model:wan")[0]["whole"]
    assert one["runs"] == other["runs"] == [whole] * 10


def test_blocks_that_are_compiled(ranks: list[Rank]) -> None:
    for each in seen(ranks, "compiled:wan"):
        assert each["shared"] == each["whole"] and "R" in str(each["whole"])
        assert each["far"] < CLOSE


# --- profiles -------------------------------------------------------------------------------------


def test_ranks_calibrate_as_one(ranks: list[Rank]) -> None:
    """The same profile on both, and that of one process but for rounding."""
    one, other = seen(ranks, "calibrated:wan")
    assert one["profile"] == other["profile"]
    found, expected = one["profile"], one["expected"]
    assert found["gains"] == pytest.approx(expected["gains"], rel=1e-3)
    for name, context in expected["models"]["transformer"]["contexts"].items():
        mine = found["models"]["transformer"]["contexts"][name]
        for kind in ("rr", "qq", "rq", "pp"):
            wanted = torch.tensor(context[kind])
            assert torch.allclose(torch.tensor(mine[kind]), wanted, rtol=1e-5, atol=1e-7)


def test_ranks_weigh_moments_by_how_many_tokens_they_have(ranks: list[Rank]) -> None:
    assert max(each["far"] for each in seen(ranks, "moments")) < CLOSE


@pytest.mark.parametrize("which", ["veto", "blind"])
def test_ranks_follow_a_plan(ranks: list[Rank], which: str) -> None:
    """A plan without a probe's veto takes no collective."""
    one, other = seen(ranks, "calibrated:wan")
    assert one[f"{which} shared"] == other[f"{which} shared"] == one[f"{which} alone"]
    assert "R" in str(one[f"{which} shared"])
    assert max(each[f"{which} far"] for each in (one, other)) < CLOSE
    assert (one[f"{which} collectives"] == 0) is (which == "blind")


def test_ranks_learn_from_the_first_run(ranks: list[Rank]) -> None:
    one, other = seen(ranks, "learned:wan")
    assert one["shared"] == other["shared"] == one["whole"]
    assert "R" not in str(one["shared"][0]) and "R" in str(one["shared"][1])


# --- bad ends -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rank]]:
    """What became of two ranks in checks that end badly, each in processes of its own."""
    groups = {
        name: Group(tmp_path_factory.mktemp(name.partition(":")[0]), [name], patience=patience)
        for name, patience in (("raises", 20), ("is_killed", 20), ("decide_alone:flux", 5))
    }
    return {name: group.wait(timeout=300) for name, group in groups.items()}


@pytest.mark.parametrize(("name", "code"), [("raises", 1), ("is_killed", -9)])
def test_a_rank_that_ends_ends_the_others(
    ends: dict[str, list[Rank]], name: str, code: int
) -> None:
    first, second = ends[name]
    assert second.code == code
    assert first.code == 1  # it went on to its own end, and was not killed for being late
    assert first.seen[name]["seconds"] < 20
    assert "RuntimeError" in first.seen[name]["error"]


def test_ranks_that_decide_alone_wait_for_each_other(ends: dict[str, list[Rank]]) -> None:
    """What the group is for, on the same model and tokens as above."""
    one, other = seen(ends["decide_alone:flux"], "decide_alone:flux")
    stopped = f"{one['stopped']} {other['stopped']}"
    assert "Timed out" in stopped, stopped
    assert one["masks"]["cond"] != other["masks"]["cond"]


# --- in one process -------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_configuration_with_a_group_is_a_value_as_ever(group: Any) -> None:
    """Copies in this process keep the group, those that leave it go without."""
    config = DiCacheConfig(threshold=0.1, process_group=group)
    assert hash(config) == hash(dataclasses.replace(config)) and "ProcessGroup" in repr(config)
    assert copy.deepcopy(config).process_group is group
    assert pickle.loads(pickle.dumps(config)) == DiCacheConfig(threshold=0.1)
    with pytest.raises(ValueError, match="process_group is 3. Expected None or a torch.distrib"):
        DiCacheConfig(process_group=3)


def test_ranks_that_no_group_has_are_named(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"a": [0, 1], "b": [0, 2], "all": [0, 1, 2], "me": [0]}
    monkeypatch.setattr(dist, "get_process_group_ranks", members.__getitem__)
    assert group_of_all(None, []) is None
    assert group_of_all(None, ["me"]) is None
    assert group_of_all(None, ["me", "a"]) == "a"
    assert group_of_all(None, ["a", "all"]) == "all"
    assert group_of_all("all", ["a", "b", None]) == "all"
    with pytest.raises(ValueError, match=r"ranks \[2\], which are not in the group \[0, 1\]"):
        group_of_all(None, ["a", "b"])
    with pytest.raises(ValueError, match=r"ranks \[1\], which are not in the group \[0\]"):
        group_of_all("me", ["a"])
    with pytest.raises(ValueError, match="neither xfuser nor torch.distributed has"):
        group_of_all(None, ["a", None])


def test_split_original_models_take_a_group_that_is_given(group: Any) -> None:
    model = build_original("hunyuan")
    for block in model.double_blocks:
        block.hybrid_seq_parallel_attn = object()
    apply_dicache(model, DiCacheConfig(num_inference_steps=8, process_group=group))


def test_ranks_know_a_video_by_its_whole(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of two sizes fill the same [B, S, D] here, as they may on one of several ranks."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    layouts = []
    visit = Timeline.visit
    monkeypatch.setattr(
        Timeline, "visit", lambda t, where: layouts.append(where.layout) or visit(t, where)
    )
    model = build_original("t2v")
    apply_dicache(model, DiCacheConfig(num_inference_steps=8, process_group=group))
    text = branches("t2v")[0]
    for latents, time in steps("t2v", 2):
        for width in (4, 3):
            ask(model, [each[..., :width] for each in latents], time, text, "t2v")
    assert layouts[0] != layouts[1] and layouts[0][0] == layouts[1][0] == (1, 30, 16)


def test_a_plan_is_refused_where_parts_would_be_mistaken() -> None:
    with pytest.raises(ValueError, match="the first frame's tokens by their place"):
        context_parallel_plan(build("hunyuan-video", image_condition_type="token_replace"))
    with pytest.raises(ValueError, match="knows how to split the sequence of Linear"):
        context_parallel_plan(nn.Linear(1, 1))
