"""cfg="shared": one decision for both branches of a step; "independent": one each."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import mask
from tiny_pipelines import PIPELINES, pipeline, run
from torch import Tensor

from dicache import (
    DiCacheConfig,
    DiCacheSession,
    DiCacheWarning,
    Where,
    apply_dicache,
    get_stats,
)
from dicache.demo import pipelines as demo

NUM_STEPS = 16


def session_with(cfg: str, **changes: Any) -> DiCacheSession:
    values = {"threshold": 0.5, "retention_ratio": 0.0, "compute_last_step": False, "cfg": cfg}
    return DiCacheSession(DiCacheConfig(**{**values, **changes}))


def branch(step: int, jumps: float, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, p, y of a branch that moves on evenly, but for jumps of this size."""
    generator = torch.Generator().manual_seed(7)
    x, p, y = (torch.randn(batch, 4, 8, generator=generator) for _ in range(3))
    moved = 0.1 * step + jumps * torch.randn(x.shape, generator=generator.manual_seed(step))
    return x + 0.2 * step, p + moved, y + 0.3 * step


def step(session: DiCacheSession, name: str, index: int, values: tuple[Tensor, ...]) -> str:
    x, p, y = values
    half = range(len(x) // 2)
    where = Where(
        name,
        timestep=1 - index / NUM_STEPS,
        num_steps=NUM_STEPS,
        leaders=(*half, *half) if name == "cond_uncond" else None,
    )
    with session.step(where) as opened:
        if opened.needs_probe:
            opened.probe(x, p)
        if opened.action == "reuse":
            opened.reuse(x)
        else:
            rows = opened.rows or range(len(y))
            opened.record(x, p, y[list(rows)])
    return opened.action


def schedule(records: list[Any], sample: int | None = None) -> str:
    return mask(r for r in records if sample is None or r.sample == sample)


def drive(session: DiCacheSession, jumps: dict[str, float]) -> dict[str, str]:
    for index in range(NUM_STEPS):
        for name, size in jumps.items():
            step(session, name, index, branch(index, size))
    return {name: schedule(session.stats.contexts[name]) for name in jumps}


def test_the_first_branch_decides_for_both() -> None:
    jumps = {"cond": 0.01, "uncond": 1.0}
    independent = drive(session_with("independent"), jumps)
    shared = drive(session_with("shared"), jumps)
    alone = drive(session_with("independent"), {"cond": 0.01})
    assert independent["cond"] != independent["uncond"]
    assert shared["cond"] == shared["uncond"] == alone["cond"]
    assert {"R", "c"} <= set(shared["cond"])
    assert drive(session_with("shared"), {"cond": 1.0, "uncond": 0.01})["uncond"].count("R") < 3


def test_a_branch_that_is_called_in_some_steps_only_follows_in_those() -> None:
    """Guidance in an interval: its context counts fewer steps than the one that decides."""
    session, both = session_with("shared"), {}
    for index in range(NUM_STEPS):
        taken = step(session, "cond", index, branch(index, 0.01))
        if index >= 4:
            both[index] = (taken, step(session, "uncond", index, branch(index, 1.0)))
    first, *others = both.values()
    assert first[1] == "compute"  # it has no history
    assert all(mine == its for mine, its in others)
    assert {mine for mine, _ in others} == {"reuse", "resume"}


def test_a_branch_that_paused_decides_for_itself_until_its_trajectory_is_new() -> None:
    """Its last two computed steps lie on both sides of the pause: the leader's do not."""
    session, taken = session_with("shared"), {}
    for index in range(16):
        leads = step(session, "cond", index, branch(index, 0.01))
        if index < 4 or index >= 8:
            far = 1.0 if index == 8 else 0.01  # what it became in the pause
            taken[index] = (leads, step(session, "uncond", index, branch(index, far)))
    assert taken[8] == ("reuse", "resume")
    alike = [mine == its for index, (mine, its) in taken.items() if index > 12]
    assert all(alike), "it follows again"


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("interval", [(8, 20), (8, 30)], ids=str)
def test_guidance_that_pauses_costs_no_quality(interval: tuple[int, int], granularity: str) -> None:
    """A trained Wan whose callback turns guidance off for some steps, and on again."""
    pipe, plain = demo.load_pipeline("wan"), demo.load_pipeline("wan").transformer
    worst = {"cond": 0.0, "uncond": 0.0}

    def compare(module: Any, args: Any, given: Any, output: Any) -> None:
        expected = plain(**given)[0]
        off = float((output[0] - expected).norm() / expected.norm())
        name = "uncond" if given["encoder_hidden_states"] is unconditional else "cond"
        worst[name] = max(worst[name], off)

    def pause(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if interval[0] <= index + 1 < interval[1] else guidance
        return {}

    inputs = demo.pipeline_inputs("wan", demo.default_prompts("wan")[0], 0, 50)
    guidance, unconditional = inputs["guidance_scale"], inputs["negative_prompt_embeds"]
    pipe.transformer.register_forward_hook(compare, with_kwargs=True)
    apply_dicache(pipe, DiCacheConfig(granularity=granularity))
    with torch.no_grad():
        pipe(**inputs, callback_on_step_end=pause)
    stats = get_stats(pipe)["transformer"]
    assert len(stats.contexts["uncond"]) < len(stats.contexts["cond"]) and stats.num_reused > 20
    assert worst["uncond"] < 0.06  # 0.049 without a pause; 0.17 to 0.26 where it followed


def test_no_branch_reuses_more_steps_in_a_row_than_the_limit_allows() -> None:
    """Also where it is called only in steps that the first branch reuses."""
    session = session_with("shared", threshold=math.inf, max_consecutive_reuse=1)
    for index in range(8):
        step(session, "cond", index, branch(index, 0.01))
        if index == 0 or index % 2 == 1:
            step(session, "uncond", index, branch(index, 0.01))
    assert schedule(session.stats.contexts["cond"]) == "CRcRcRcR"
    assert schedule(session.stats.contexts["uncond"]) == "CRcRc"


def test_a_schedule_is_each_contexts_own() -> None:
    session, taken = session_with("shared", schedule="CCRCRR"), []
    for index in range(6):
        step(session, "cond", index, branch(index, 0.01))
        if index != 1:
            taken.append(step(session, "uncond", index, branch(index, 0.01)))
    assert [action == "reuse" for action in taken] == [letter == "R" for letter in "CCRCR"]


def test_samples_follow_their_own_leader() -> None:
    session = session_with("shared", granularity="sample")
    for index in range(NUM_STEPS):
        calm, wild = branch(index, 0.01), branch(index, 1.0)
        both = tuple(torch.cat(pair) for pair in zip(calm, wild, strict=True))
        step(session, "cond", index, both)
        step(session, "uncond", index, tuple(value.flip(0) for value in both))
    cond, uncond = (session.stats.contexts[name] for name in ("cond", "uncond"))
    assert schedule(cond, 0) != schedule(cond, 1)
    for sample in (0, 1):
        assert schedule(cond, sample) == schedule(uncond, sample)


def test_a_branch_that_must_compute_does() -> None:
    """NaN in the second branch alone: it computes, and the first one's decisions stand."""
    session = session_with("shared", threshold=math.inf)
    for index in range(8):
        step(session, "cond", index, branch(index, 0.01))
        x, p, y = branch(index, 0.01)
        with pytest.warns(DiCacheWarning, match="'uncond'") if index == 4 else nullcontext():
            step(session, "uncond", index, (x, p * math.nan if index == 4 else p, y))
    assert schedule(session.stats.contexts["cond"]) == "CRRRRRRR"
    assert schedule(session.stats.contexts["uncond"]) == "CRRRccRR"


def test_a_branch_without_history_computes_and_leads_nobody_astray() -> None:
    session = session_with("shared", threshold=math.inf)
    for index in range(6):
        step(session, "cond", index, branch(index, 0.01))
        if index == 3:
            session.forget("uncond")
        step(session, "uncond", index, branch(index, 0.01))
    assert schedule(session.stats.contexts["cond"]) == "CRRRRR"
    assert schedule(session.stats.contexts["uncond"]) == "CRRCRR"


def test_branches_in_one_batch_share_by_their_mean_error() -> None:
    """[uncond, cond] with a decision a sample: sample b and b + B / 2 belong together."""

    def schedules(cfg: str, name: str) -> list[str]:
        session = session_with(cfg, granularity="sample")
        for index in range(NUM_STEPS):
            parts = [branch(index, size) for size in (0.01, 0.5, 1.0, 0.01)]
            step(session, name, index, tuple(torch.cat(p) for p in zip(*parts, strict=True)))
        return [schedule(session.stats.contexts[name], sample) for sample in range(4)]

    apart, together = schedules("independent", "cond_uncond"), schedules("shared", "cond_uncond")
    assert together[0] == together[2] and together[1] == together[3]
    assert apart[0] != apart[2]
    assert schedules("shared", "cond") == apart  # another batch is no pair of branches


@pytest.mark.parametrize("cfg", ["independent", "shared"])
def test_wan_pipeline(cfg: str) -> None:
    pipe = pipeline("wan")
    rules = {"threshold": 0.15, "retention_ratio": 0.0, "compute_last_step": False}
    apply_dicache(pipe, DiCacheConfig(cfg=cfg, **rules))
    run("wan", pipe, num_steps=20)
    contexts = get_stats(pipe)["transformer"].contexts
    cond, uncond = (schedule(contexts[name]) for name in ("cond", "uncond"))
    assert "R" in cond and "c" in cond
    if cfg == "shared":
        assert cond == uncond


# --- both branches in one batch, from the pipeline down ------------------------------------------

PAIRED = ("ltx", "cogvideox", "mochi")


def records_of(name: str, batch: int, threshold: float, cfg: str, **changes: Any) -> list[Any]:
    """Those of the samples of a pipeline's run, under rules that decide for each."""
    arguments = {
        key: torch.cat([value + shift for shift in range(batch)])
        for key, value in PIPELINES[name].arguments().items()
        if key.endswith("prompt_embeds")
    } | {
        key: torch.cat([value] * batch)
        for key, value in PIPELINES[name].arguments().items()
        if key.endswith("attention_mask")
    }
    pipe = pipeline(name)
    rules = {"threshold": threshold, "retention_ratio": 0.0, "compute_last_step": False}
    apply_dicache(pipe, DiCacheConfig(cfg=cfg, granularity="sample", **rules))
    run(name, pipe, num_steps=8, **arguments, **changes)
    records = [*get_stats(pipe)["transformer"].records()]
    samples = range(max(record.sample for record in records) + 1)
    return [[record for record in records if record.sample == sample] for sample in samples]


def threshold_between(name: str, batch: int, pair: tuple[int, int], **changes: Any) -> float:
    """One between the errors of two samples at the first step that is judged."""
    records = records_of(name, batch, 0.0, "independent", **changes)
    low, high = sorted(records[sample][1].error for sample in pair)
    assert low < high
    return (low + high) / 2


def actions_at(step: int, records: list[Any]) -> list[str]:
    return [of_sample[step].action for of_sample in records]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", PAIRED)
def test_branches_in_one_batch_of_a_pipeline_decide_together(name: str, batch: int) -> None:
    """[uncond, cond]: sample b and b + B / 2 are of one picture."""
    for picture in range(batch):
        pair = (picture, picture + batch)
        threshold = threshold_between(name, batch, pair)
        apart = records_of(name, batch, threshold, "independent")
        assert {apart[sample][1].action for sample in pair} == {"reuse", "resume"}
        shared = records_of(name, batch, threshold, "shared")
        assert len(shared) == 2 * batch
        assert shared[pair[0]][1].error == pytest.approx(
            sum(apart[sample][1].error for sample in pair) / 2
        )
        for step in range(8):
            assert shared[pair[0]][step].action == shared[pair[1]][step].action


@pytest.mark.parametrize("name", PAIRED)
def test_a_batch_without_guidance_is_no_pair_though_pipelines_call_it_so(name: str) -> None:
    """Its two samples are two pictures."""
    changes = {"guidance_scale": 1.0}
    threshold = threshold_between(name, 2, (0, 1), **changes)
    apart = records_of(name, 2, threshold, "independent", **changes)
    shared = records_of(name, 2, threshold, "shared", **changes)
    assert len(shared) == 2 and set(actions_at(1, apart)) == {"reuse", "resume"}
    assert [actions_at(step, apart) for step in range(8)] == [
        actions_at(step, shared) for step in range(8)
    ]


@pytest.mark.parametrize("leaders", [(0,), (0, 1, 2), (0, 2), (1, 0), (-1, 0)])
def test_leaders_that_cannot_be_are_refused(leaders: tuple[int, ...]) -> None:
    session = session_with("shared", granularity="sample", threshold=math.inf)
    for index in range(2):
        x, p, y = branch(index, 0.01, batch=2)
        where = Where("cond", timestep=1 - index / NUM_STEPS, leaders=leaders, num_steps=NUM_STEPS)
        with session.step(where) as opened:
            if not opened.needs_probe:
                opened.record(x, p, y)
                continue
            with pytest.raises(ValueError, match="leaders is .* in a batch of 2. Expected one"):
                opened.probe(x, p)
