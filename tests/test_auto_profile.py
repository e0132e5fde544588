"""profile="auto": the first whole run of a model is un-cached and makes the plan of the others."""

from __future__ import annotations

import gc
import math
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import build, calls
from tiny_pipelines import pipeline, run

from dicache import (
    DiCacheConfig,
    DiCacheSession,
    DiCacheWarning,
    RunStats,
    Where,
    apply_dicache,
    calibrate,
    get_stats,
    reset_dicache,
)
from dicache.core.recorder import Recorder
from dicache.core.trajectory import Trajectory
from dicache.profile import Identity

STEPS = 8
CONFIG = DiCacheConfig(profile="auto", target_speedup=1.7)


def masks_of(stats: RunStats) -> dict[str, str]:
    return {name: stats.mask(name) for name in stats.contexts}


def stats_of(pipe) -> RunStats:
    return get_stats(pipe)["transformer"]


@pytest.mark.parametrize("kind", ["flux", "wan", "flux-true-guidance"])
def test_the_second_run_is_the_one_of_a_profile_that_calibrate_makes(kind) -> None:
    plain = pipeline(kind)
    profile = calibrate(plain, lambda _: run(kind, plain, STEPS), samples=1, gains=0)
    un_cached = run(kind, plain, STEPS)
    apply_dicache(plain, DiCacheConfig(profile=profile, target_speedup=1.7))
    expected = run(kind, plain, STEPS, seed=1)

    pipe = pipeline(kind)
    apply_dicache(pipe, CONFIG)
    assert torch.equal(run(kind, pipe, STEPS), un_cached)
    first = stats_of(pipe)
    assert first.num_resumed == first.num_reused == 0
    assert "to calibrate" in first.summary().splitlines()[-1]
    assert torch.equal(run(kind, pipe, STEPS, seed=1), expected)
    assert masks_of(stats_of(pipe)) == masks_of(stats_of(plain))
    assert stats_of(pipe).num_reused > 0 and stats_of(pipe).planned


def test_without_a_target_the_plan_costs_what_the_default_does() -> None:
    pipe = pipeline("flux")
    apply_dicache(pipe, DiCacheConfig(profile="auto"))
    run("flux", pipe, STEPS)
    run("flux", pipe, STEPS)
    default = pipeline("flux")
    apply_dicache(default)
    run("flux", default, STEPS)
    computed = masks_of(stats_of(default))["cond"].count("C")
    assert stats_of(pipe).planned == {"cond": computed}


def test_an_aborted_first_run_teaches_nothing_and_the_next_one_is_recorded() -> None:
    pipe = pipeline("wan")
    apply_dicache(pipe, CONFIG)

    def stop(pipe, step, timestep, kwargs):
        if step == STEPS // 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        run("wan", pipe, STEPS, callback_on_step_end=stop)
    run("wan", pipe, STEPS)
    assert stats_of(pipe).num_computed == 2 * STEPS
    run("wan", pipe, STEPS)
    assert stats_of(pipe).num_reused > 0


def test_runs_that_are_never_whole_are_cached_by_the_rules_in_the_end() -> None:
    model = build("flux")
    rules = {"threshold": math.inf, "retention_ratio": 0, "num_inference_steps": STEPS}
    apply_dicache(model, DiCacheConfig(profile="auto", **rules))

    def ask() -> RunStats:
        for inputs in calls("flux", 6):  # of the eight steps that were announced
            with model.cache_context("cond"):
                model(**inputs)
        reset_dicache(model)
        return get_stats(model)

    assert [ask().num_computed for _ in range(2)] == [6, 6]
    with pytest.warns(DiCacheWarning, match="from 3 runs in a row.*Steps of it are missing"):
        assert ask().num_computed == 6
    assert ask().mask("cond") == "CRRRRR"


def test_other_steps_are_interpolated_and_other_guidance_is_learned() -> None:
    pipe = pipeline("flux-true-guidance")
    apply_dicache(pipe, CONFIG)
    run("flux-true-guidance", pipe, 10, true_cfg_scale=1.0)  # one branch
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        run("flux-true-guidance", pipe, 7, true_cfg_scale=1.0)
        assert stats_of(pipe).num_reused > 0 and len(masks_of(stats_of(pipe))["cond"]) == 7
        run("flux-true-guidance", pipe, 10)  # the second branch has no moments
        run("flux-true-guidance", pipe, 10)
        assert stats_of(pipe).num_computed == 20
        run("flux-true-guidance", pipe, 10)
    planned = stats_of(pipe).planned
    assert len(planned) == 2 and {*masks_of(stats_of(pipe)).values()} == {
        stats_of(pipe).mask([*planned][0])
    }


def bare_session() -> DiCacheSession:
    session = DiCacheSession(DiCacheConfig(profile="auto", threshold=math.inf))
    session.identity = Identity("Model", None, 4)
    return session


def step_of(session: DiCacheSession, key: str, position: int, factor: float = 1.5) -> str:
    """A step of a run of six; the first letter of its action."""
    where = Where("main", run=key, position=position, moment=position, num_steps=6)
    x = torch.linspace(1, 2, 24).reshape(1, 4, 6) + position
    with session.step(where) as step:
        p = x * (1.1 + 0.01 * position)
        if step.needs_probe:
            step.probe(x, p)
        if step.action == "reuse":
            step.reuse(x)
        else:
            step.record(x, p, p * factor)
        return step.action[0] if step.action != "reuse" else "R"


def test_a_run_beside_the_recorded_one_is_cached_by_the_rules() -> None:
    session = bare_session()
    taken = [step_of(session, key, place) for place in range(6) for key in ("one", "two")]
    assert "".join(taken[::2]) == "cccccc" and "".join(taken[1::2]) == "cRRRRc"
    assert session.timeline.run.stats.contexts["main"][2].weights is None
    session.end("one")
    assert "".join(step_of(session, "three", place) for place in range(6)) == "cRRRRc"
    assert session.stats.contexts["main"][2].weights is not None


def test_a_run_that_is_not_finite_teaches_nothing() -> None:
    session = bare_session()
    for key, factor in (("one", math.nan), ("two", 1.5), ("three", 1.5)):
        taken = "".join(step_of(session, key, place, factor) for place in range(6))
        session.end(key)
        assert taken == ("cRRRRc" if key == "three" else "cccccc")


def test_what_was_recorded_is_freed_with_the_run(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(Recorder, "__init__", _noting(made, Recorder.__init__))
    pipe = pipeline("wan")
    apply_dicache(pipe, CONFIG)
    run("wan", pipe, STEPS)
    gc.collect()
    assert len(made) == 1 and not made[0]._steps


def _noting(made, init):
    def noted(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    return noted


def test_no_run_but_those_that_a_probe_may_veto_waits_for_decisions(monkeypatch) -> None:
    model = build("flux")
    rules = {"target_speedup": 1.7, "num_inference_steps": STEPS, "veto": None}
    apply_dicache(model, DiCacheConfig(profile="auto", **rules))
    measured = []
    measure = Trajectory.measure
    monkeypatch.setattr(Trajectory, "measure", lambda *given: measured.append(1) or measure(*given))
    for _ in range(2):
        for inputs in calls("flux", STEPS):
            with model.cache_context("cond"):
                model(**inputs)
    assert get_stats(model).num_reused > 0 and not measured


def test_a_file_that_is_called_auto_is_given_as_a_path(tmp_path, monkeypatch) -> None:
    pipe = pipeline("flux")
    profile = calibrate(pipe, lambda i: run("flux", pipe, 4, seed=i), samples=1, gains=0)
    profile.save(tmp_path / "auto")
    monkeypatch.chdir(tmp_path)
    assert DiCacheConfig(profile=Path("auto"), target_speedup=2).profile.num_steps == 4
    assert DiCacheConfig(profile="auto", target_speedup=2).profile == "auto"


def test_what_auto_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="target_psnr is 40.*'auto'"):
        DiCacheConfig(profile="auto", target_psnr=40)
    with pytest.raises(ValueError, match="threshold is None"):
        DiCacheSession(DiCacheConfig(profile="auto"))
    DiCacheSession(CONFIG)
    pipe = pipeline("wan", transformer_2=build("wan", seed=1))
    with pytest.raises(ValueError, match="several models, transformer, transformer_2"):
        apply_dicache(pipe, CONFIG)
