"""Runs of few steps, as distilled models take them: nothing is reused, and that is said once.

The steps of models with random weights are all alike, so that a threshold far below their errors
stands for a model whose steps are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import masks
from test_pipelines import abort_between_steps
from tiny_models import build
from tiny_pipelines import pipeline, run

from dicache import (
    DiCacheConfig,
    DiCacheSession,
    DiCacheWarning,
    apply_dicache,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from dicache.core.where import Where

FAR_APART = DiCacheConfig(threshold=1e-6)
PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": lambda: pipeline("flux", transformer=build("flux", guidance_embeds=False)),  # schnell
    "z-image": lambda: pipeline("z-image"),
    "ltx": lambda: pipeline("ltx"),
    "wan": lambda: pipeline("wan"),
}


def told(act: Callable[[], Any]) -> list[str]:
    """What is warned of meanwhile, however often."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(each.message) for each in caught if issubclass(each.category, DiCacheWarning)]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("num_steps", (3, 4, 8))
def test_a_distilled_model_is_right_and_it_is_said_once(name: str, num_steps: int) -> None:
    """At the end of the first run, which may be the only one."""
    plain, pipe = PIPELINES[name](), PIPELINES[name]()
    expected = run(name, plain, num_steps)
    apply_dicache(pipe, FAR_APART)
    made: list[torch.Tensor] = []
    (message,) = told(lambda: made.append(run(name, pipe, num_steps)))
    assert torch.equal(made[0], expected)
    assert f"None of the {num_steps} steps" in message and "remove_dicache" in message
    reset_dicache(pipe)
    assert told(lambda: run(name, pipe, num_steps)) == []
    remove_dicache(pipe)
    apply_dicache(pipe, FAR_APART)
    assert len(told(lambda: run(name, pipe, num_steps))) == 1  # a cache of its own


QUIET = {
    "steps are reused": (DiCacheConfig(threshold=0.5), 8),
    "one step is": (DiCacheConfig(threshold=float("inf")), 3),
    "its steps are not few": (FAR_APART, 9),
    "it warms up": (FAR_APART, 2),
    "threshold 0 forbids it": (DiCacheConfig(threshold=0), 4),
    "a threshold of 0 in a preset does": (DiCacheConfig.preset("flux", threshold=0), 4),
    "retention does": (DiCacheConfig(threshold=1e-6, retention_ratio=1.0), 4),
    "a schedule does": (DiCacheConfig(schedule="CCCC"), 4),
}


@pytest.mark.parametrize("why", QUIET)
@pytest.mark.parametrize("name", ("flux", "wan"))
def test_nothing_is_said_where(name: str, why: str) -> None:
    config, num_steps = QUIET[why]
    pipe = PIPELINES[name]()
    apply_dicache(pipe, config)
    assert told(lambda: run(name, pipe, num_steps)) == []


@pytest.mark.parametrize("name", ("flux", "wan", "z-image"))
@pytest.mark.parametrize("step", (0, 2))
def test_an_aborted_run_tells_nothing_and_the_next_one_does(name: str, step: int) -> None:
    pipe = PIPELINES[name]()
    apply_dicache(pipe, FAR_APART)
    assert told(lambda: abort_between_steps(name, pipe, step, num_steps=4)) == []
    assert len(told(lambda: run(name, pipe, 4))) == 1


def test_a_run_whose_steps_were_computed_for_another_reason_tells_that_alone() -> None:
    """New noise in every step, say: what is said then is enough."""
    pipe = pipeline("flux")
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, stochastic_sampling=True
    )
    apply_dicache(pipe)
    (message,) = told(lambda: run("flux", pipe, 4))
    assert "new noise" in message


def test_it_waits_for_the_last_branch() -> None:
    """The unconditional branch alone is reused, in the run's last step: that is a reuse."""
    rules = {"threshold": float("inf"), "compute_last_step": False, "cfg": "independent"}
    for is_reused in (False, True):
        session = DiCacheSession(DiCacheConfig(**rules, retention_ratio=0.0))

        def go(session: DiCacheSession = session, is_reused: bool = is_reused) -> None:
            tokens = torch.randn(1, 4, 8)
            for index in range(4):
                for name in ("cond", "uncond"):
                    where = Where(name, moment=index, position=index, num_steps=4)
                    with session.step(where) as step:
                        if name == "uncond" and index == 3 and is_reused:
                            assert step.probe(tokens, tokens + 1).action == "reuse"
                            step.reuse(tokens)
                        elif name == "uncond" and index == 2:
                            step.record(tokens, tokens + 1, tokens + 2)
                        else:  # entries of which nothing is kept are never reused
                            step.discard()

        assert len(told(go)) == (0 if is_reused else 1)


def test_a_loop_of_its_own_without_timesteps() -> None:
    session = DiCacheSession(FAR_APART)

    def go() -> None:
        for _ in range(4):
            for name in ("cond", "uncond"):
                with session.step(name, num_inference_steps=4) as step:
                    x, p, y = torch.randn(3, 1, 4, 8)
                    if step.needs_probe:
                        step.probe(x, p)
                    step.record(x, p, y)

    assert len(told(go)) == 1
    assert told(go) == []


def test_a_step_that_the_caller_computes_all_the_same_is_no_sign_of_a_distilled_model() -> None:
    session = DiCacheSession(DiCacheConfig(threshold=float("inf")))

    def go() -> None:
        for _ in range(4):
            with session.step("cond", num_inference_steps=4) as step:
                x = torch.ones(1, 4, 8)
                if step.needs_probe:
                    step.probe(x, x + 1)
                step.record(x, x + 1, x + 2)

    assert told(go) == []


def test_guidance_that_ends_early_does_not_keep_it_back() -> None:
    pipe = PIPELINES["wan"]()
    apply_dicache(pipe, FAR_APART)

    def stop(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == 1:
            pipe._guidance_scale = 1.0
        return {}

    (message,) = told(lambda: run("wan", pipe, 6, callback_on_step_end=stop))
    assert "6 steps" in message
    assert masks(pipe, "C") == {"cond": "CCCCCC", "uncond": "CC"}


def test_experts_that_share_a_run_tell_it_once_and_not_where_the_other_one_reused() -> None:
    def make() -> Any:
        experts = {"transformer": build("wan"), "transformer_2": build("wan", seed=1)}
        return pipeline("wan", **experts, boundary_ratio=0.5)

    pipe = make()
    apply_dicache(pipe, FAR_APART)
    (message,) = told(lambda: run("wan", pipe, 6))
    assert "6 steps" in message
    assert [len(stats.contexts) for stats in get_stats(pipe).values()] == [2, 2]
    assert told(lambda: run("wan", pipe, 6)) == []
    pipe = make()
    apply_dicache(pipe, DiCacheConfig(threshold=float("inf"), retention_ratio=0))
    assert told(lambda: run("wan", pipe, 4)) == []
    high, low = get_stats(pipe).values()
    assert high.num_reused and not low.num_reused
