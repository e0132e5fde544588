"""What a scheduler tells of a run, and what follows where it tells something unusual.

Timesteps that rise, a last timestep that is left out, noise in every step, runs of one step,
timesteps that do not move.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXI2VLongMultiPromptPipeline
from diffusers.schedulers import LTXEulerAncestralRFScheduler
from helpers import mask, masks
from tiny_models import build, calls
from tiny_pipelines import PIPELINES, pipeline, run, text
from torch import Tensor

from dicache import (
    DiCacheConfig,
    DiCacheSession,
    DiCacheWarning,
    SparseVideoGenConfig,
    Where,
    apply_dicache,
    apply_sparse_videogen,
    get_stats,
    remove_dicache,
)
from dicache.adapters import schedule
from dicache.adapters.diffusers import locate
from dicache.demo import pipelines as demo
from dicache.stats import MOST_RECORDS

ALWAYS = {"threshold": math.inf, "retention_ratio": 0}


@contextmanager
def told(*messages: str) -> Iterator[None]:
    """These warnings are given and no other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    given = [str(each.message) for each in caught if each.category is DiCacheWarning]
    assert len(given) == len(messages), given
    for message, expected in zip(given, messages, strict=True):
        assert expected in message


# --- timesteps that rise -------------------------------------------------------------------------


def inversion(name: str, num_steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """The calls of a run, backwards."""
    return calls(name, num_steps, seed=seed)[::-1]


@pytest.mark.parametrize("name", ["flux", "wan", "qwen-image"])
def test_an_inversion_is_cached_from_its_third_step_on(name: str) -> None:
    model, plain = build(name), build(name)
    apply_dicache(model, DiCacheConfig(schedule="CCCCRRCR", num_inference_steps=8))
    with told():
        for index, inputs in enumerate(inversion(name, 8)):
            output = model(**inputs)[0]
            if index < 4:
                assert torch.equal(output, plain(**inputs)[0])
    # The two steps before the direction was known are in a run that is no more.
    (records,) = get_stats(model).contexts.values()
    assert [record.step for record in records] == [2, 3, 4, 5, 6, 7]
    assert list(masks(model).values()) == ["CCRRCR"]


def test_inversions_and_generations_in_turns_are_each_a_run() -> None:
    model = build("flux")
    apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=8))
    generation = calls("flux", 8)
    with told():
        for steps in (generation, generation[::-1], generation[::-1], generation, generation):
            for inputs in steps:
                model(**inputs)
    assert masks(model) == {"branch0": "CRRRRRRC"}


def test_nothing_of_an_inversion_is_taken_for_the_generation_behind_it() -> None:
    """It begins at the timestep where that ended, and the direction has to be learned."""
    generation, plain = calls("flux", 8), build("flux")
    model = build("flux")
    apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=8))
    for inputs in generation[::-1]:
        model(**inputs)
    outputs = [model(**inputs)[0] for inputs in generation]
    for index in range(3):
        assert torch.equal(outputs[index], plain(**generation[index])[0])
    assert masks(model) == {"branch0": "CRRRRC"}  # from its third step on


# --- the last step -------------------------------------------------------------------------------


class FakeVAE(torch.nn.Module):
    config = SimpleNamespace(scaling_factor=1.0)
    spatial_compression_ratio, temporal_compression_ratio = 32, 8
    dtype, device = torch.float32, torch.device("cpu")
    latents_mean, latents_std = torch.zeros(8), torch.ones(8)


@pytest.mark.parametrize(
    "sigmas", [None, [1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0], [1.0, 0.7, 0.5, 0.3]]
)
def test_the_last_step_that_runs_is_computed_where_a_pipeline_leaves_the_last_out(
    sigmas: list[float] | None,
) -> None:
    pipe: Any = LTXI2VLongMultiPromptPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=FakeVAE(),
        transformer=build("ltx"),
        scheduler=LTXEulerAncestralRFScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    mask = torch.ones(1, 5)
    pipe.encode_prompt = lambda prompt=None, **_: (text(len(prompt[0])), mask, text(99), mask)
    apply_dicache(pipe, DiCacheConfig(threshold=math.inf, compute_last_step=True))
    size = {"height": 64, "width": 64, "num_frames": 65}
    tiles = {"temporal_tile_size": 40, "temporal_overlap": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of noise
        pipe(
            prompt="a | bb",
            negative_prompt="x",
            guidance_scale=3.0,
            num_inference_steps=8,
            sigmas=sigmas,
            seed=0,
            **size,
            **tiles,
        )
    (steps,) = masks(pipe).values()
    assert "R" in steps and steps[-1] in "Cc"


@pytest.mark.parametrize("goes_to_zero", [True, False])
def test_the_last_step_before_a_timestep_of_zero_is_computed_too(goes_to_zero: bool) -> None:
    pipe = pipeline("flux", scheduler=FlowMatchEulerDiscreteScheduler())
    apply_dicache(pipe, DiCacheConfig(**ALWAYS))
    sigmas = torch.linspace(1.0, 0.0 if goes_to_zero else 0.1, 8).tolist()
    run("flux", pipe, 8, sigmas=sigmas)
    assert masks(pipe) == {"cond": "CRRRRRCC" if goes_to_zero else "CRRRRRRC"}


# --- noise ---------------------------------------------------------------------------------------


def noisy(name: str = "FlowMatchEulerDiscreteScheduler", **options: Any) -> Any:
    return getattr(diffusers, name)(**options)


NOISY: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a setting": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, True),
    "not that setting": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}, False),
    "an algorithm": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_flow_sigmas": True},
        True,
    ),
    "not that algorithm": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_flow_sigmas": True},
        False,
    ),
    "a class": ("DDPMScheduler", {}, True),
    "a class for few steps": ("FlowMatchLCMScheduler", {}, True),
    "a deterministic class": ("UniPCMultistepScheduler", {}, False),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}, False),
    "DDIM": ("DDIMScheduler", {}, False),
}


@pytest.mark.parametrize(("name", "options", "expected"), NOISY.values(), ids=NOISY)
def test_schedulers_that_add_noise_are_known(
    name: str, options: dict[str, Any], expected: bool
) -> None:
    assert schedule.adds_noise(noisy(name, **options)) is expected


def test_a_subclass_of_a_noisy_scheduler_is_noisy() -> None:
    kind = type("Mine", (diffusers.FlowMatchLCMScheduler,), {})
    assert schedule.adds_noise(kind())


def test_the_default_rules_compute_where_every_step_has_new_noise_and_say_why() -> None:
    outputs = {}
    for rules in (None, DiCacheConfig()):
        pipe = pipeline("flux", scheduler=noisy(stochastic_sampling=True))
        torch.manual_seed(0)
        if rules is None:
            outputs[None] = run("flux", pipe, 12)
            continue
        apply_dicache(pipe, rules)
        with told("adds new noise in every step"):
            torch.manual_seed(0)
            outputs[rules] = run("flux", pipe, 12)
        assert masks(pipe) == {"cond": "C" * 12}
    assert torch.equal(*outputs.values())


@pytest.mark.parametrize("rules", [DiCacheConfig(**ALWAYS), DiCacheConfig(schedule="CCRRRRRRRRRC")])
def test_rules_of_ones_own_reuse_all_the_same_and_are_told(rules: DiCacheConfig) -> None:
    pipe = pipeline("flux", scheduler=noisy(stochastic_sampling=True))
    apply_dicache(pipe, rules)
    with told("adds new noise in every step"):
        run("flux", pipe, 12)
    assert masks(pipe)["cond"].count("R") >= 9


def re_noised(model: Any, inputs: dict[str, Any], num_steps: int, noise: float) -> list[Tensor]:
    """What a loop of one's own does that takes new noise in every step; the models' answers."""
    generator = torch.Generator().manual_seed(3)
    times = torch.linspace(1, 0, num_steps + 1).tolist()
    x, answers = inputs["hidden_states"], []
    for now, then in zip(times, times[1:], strict=False):
        velocity = model(**{**inputs, "hidden_states": x, "timestep": torch.tensor([now])})[0]
        picture, old = x - now * velocity, x + (1 - now) * velocity
        drawn = torch.randn(x.shape, generator=generator)
        x = (1 - then) * picture + then * ((1 - noise**2) ** 0.5 * old + noise * drawn)
        answers.append(velocity)
    return answers


@pytest.fixture(scope="module")
def trained() -> tuple[Any, dict[str, Any]]:
    pipe, seen = demo.load_pipeline("flux"), []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True
    )
    pipe(**demo.pipeline_inputs("flux", demo.default_prompts("flux")[0], 0, 2))
    handle.remove()
    return pipe.transformer, seen[0]


@pytest.mark.parametrize("num_steps", [6, 12, 30])
@pytest.mark.parametrize("noise", [1.0, 0.8])
def test_noise_shows_in_the_tokens_of_a_bare_transformer(
    trained: Any, num_steps: int, noise: float
) -> None:
    model, inputs = trained
    plain = re_noised(model, inputs, num_steps, noise)
    apply_dicache(model, DiCacheConfig(num_inference_steps=num_steps))
    try:
        with told("adds new noise in every step"):
            answers = re_noised(model, inputs, num_steps, noise)
        assert "R" not in masks(model)["branch0"]
    finally:
        remove_dicache(model)
    assert all(torch.equal(a, b) for a, b in zip(answers, plain, strict=True))


@pytest.mark.parametrize("num_steps", [4, 12, 30])
def test_without_noise_none_is_told(trained: Any, num_steps: int) -> None:
    """Four steps of this model lie far apart, which is another word: see `test_few_steps`."""
    model, inputs = trained
    apply_dicache(model, DiCacheConfig(num_inference_steps=num_steps))
    try:
        with told("None of the 4 steps") if num_steps == 4 else told():
            re_noised(model, inputs, num_steps, 0.0)
    finally:
        remove_dicache(model)


@pytest.mark.parametrize("name", ("z-image", "lumina2"))
def test_tokens_that_the_timestep_moves_tell_nothing_of_noise(name: str) -> None:
    """Refiners see the timestep before block 0: Z-Image's first moves point against each other."""
    pipe = pipeline(name)
    apply_dicache(pipe, DiCacheConfig(threshold=math.inf, num_inference_steps=12))
    with told():
        run(name, pipe, 12)
    assert all(mask.count("R") > 6 for mask in masks(pipe).values())


def test_a_threshold_of_ones_own_is_told_of_noise_and_obeyed(trained: Any) -> None:
    model, inputs = trained
    apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=12))
    try:
        with told("adds new noise in every step"):
            re_noised(model, inputs, 12, 1.0)
        assert masks(model) == {"branch0": "CRRRRRRRRRRC"}
    finally:
        remove_dicache(model)


def test_tokens_are_looked_at_only_where_nobody_knows_the_sampler() -> None:
    for is_noisy in (False, None, True):
        session = DiCacheSession(DiCacheConfig(**ALWAYS, num_inference_steps=9))
        with told(*["adds new noise in every step"] * (is_noisy is not False)):
            for index in range(5):
                x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(index))
                with session.step(Where("cond", moment=index, is_noisy=is_noisy)) as step:
                    if step.needs_probe:
                        step.probe(x, x + 1)
                    step.reuse(x) if step.action == "reuse" else step.record(x, x + 1, x + 2)
        assert mask(session.stats.contexts["cond"]) == "CRRRR"


# --- more than one scheduler, or state of one ----------------------------------------------------


def side_by_side(pipe: Any, kind: str, contexts: bool, seeds: tuple[int, ...]) -> list[Tensor]:
    """Pictures in lockstep, each with a state of the scheduler's, or a scheduler, of its own."""
    scheduler, shape = pipe.scheduler, calls("flux", 2, batch=1)[0]
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    scheduler.set_begin_index(0)
    latents = [torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(k)) for k in seeds]
    states = [copy.deepcopy(vars(scheduler)) for _ in seeds]
    own = [copy.deepcopy(scheduler) for _ in seeds]
    for time in scheduler.timesteps:
        for k, latent in enumerate(latents):
            if kind == "states":
                vars(scheduler).update(states[k])
            else:
                pipe.scheduler = own[k]
            inputs = {**shape, "hidden_states": latent, "timestep": time[None] / 1000}
            with pipe.transformer.cache_context("cond") if contexts else nullcontext():
                velocity = pipe.transformer(**inputs)[0]
            latents[k] = pipe.scheduler.step(velocity, time, latent, return_dict=False)[0]
            states[k] = copy.deepcopy(vars(scheduler))
    return latents


@pytest.mark.parametrize("contexts", [True, False])
@pytest.mark.parametrize("kind", ["states", "schedulers"])
def test_pictures_in_lockstep_are_one_run_whoever_counts_their_steps(
    kind: str, contexts: bool
) -> None:
    pipe = pipeline("flux")
    apply_dicache(pipe, DiCacheConfig(schedule="CCCRRRCRRC"))
    with told():
        made = side_by_side(pipe, kind, contexts, (0, 1))
    assert list(masks(pipe).values()) == ["CCCRRRCRRC"] * 2
    remove_dicache(pipe)
    apply_dicache(pipe, DiCacheConfig(schedule="CCCRRRCRRC"))
    for seed, picture in enumerate(made):
        (alone,) = side_by_side(pipe, kind, contexts, (seed,))
        assert torch.equal(picture, alone)


def test_a_run_that_was_given_up_in_its_first_step_leaves_nothing_to_the_next() -> None:
    """Both have equal timesteps, and one prompt: the next one looks like a call beside it."""
    answers = []
    for is_aborted in (False, True):
        pipe = pipeline("flux")
        apply_dicache(pipe, DiCacheConfig(threshold=math.inf, retention_ratio=0.4))
        if is_aborted:
            with pytest.raises(KeyError):
                run("flux", pipe, 10, seed=1, callback_on_step_end=lambda *_: {}["abort"])
        answers.append(run("flux", pipe, 10))
        assert masks(pipe)["cond"].endswith("RC")
    assert torch.equal(*answers)


def test_timesteps_in_a_list_are_left_alone() -> None:
    pipe = pipeline("flux")
    pipe.scheduler.timesteps = [1.0, 0.5]
    apply_dicache(pipe, DiCacheConfig(**ALWAYS, num_inference_steps=6))
    for inputs in calls("flux", 6):
        pipe.transformer(**inputs)
    assert masks(pipe) == {"branch0": "CRRRRC"}


@pytest.mark.parametrize("num_steps", [30, 100])
def test_timesteps_that_bf16_makes_equal_do_not_hide_the_last_step(num_steps: int) -> None:
    """On a bare transformer, where they are all that tells a step from a call."""
    pipe = pipeline("flux", scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.transformer.to(torch.bfloat16)
    apply_dicache(pipe.transformer, DiCacheConfig(**ALWAYS, num_inference_steps=num_steps))
    given = PIPELINES["flux"].arguments()
    half = {k: v.bfloat16() for k, v in given.items() if isinstance(v, Tensor)}
    with told():
        run("flux", pipe, num_steps, **half)
    steps = masks(pipe)
    assert steps["cond"].endswith("RC")
    assert (len(steps) > 1) == (num_steps == 100)  # neighbours do round to one number there


# --- one step, equal timesteps, many prompts -----------------------------------------------------


@pytest.mark.parametrize("applied_to", ["transformer", "pipeline"])
def test_requests_of_one_step_leave_nothing_behind(applied_to: str) -> None:
    """Of a distilled model; each has a prompt of its own and the same timestep."""
    pipe = pipeline("flux")
    rules = DiCacheConfig(num_inference_steps=1 if applied_to == "transformer" else None)
    apply_dicache(pipe if applied_to == "pipeline" else pipe.transformer, rules)
    with told():
        for seed in range(40):
            if applied_to == "pipeline":
                run("flux", pipe, 1, seed=seed)
            else:
                pipe.transformer(**calls("flux", 1, seed=seed)[0])
    stats = get_stats(pipe)["transformer"]
    assert len(stats.contexts) == 1 and stats.num_computed == 1


def test_one_steps_guidance_has_both_branches() -> None:
    model = build("flux")
    apply_dicache(model, DiCacheConfig(num_inference_steps=1))
    first, second = calls("flux", 1, seed=0)[0], calls("flux", 1, seed=10)[0]
    with told():
        for _ in range(20):
            for inputs in (first, second):
                model(**inputs)
    assert len(get_stats(model).contexts) <= 2


def test_timesteps_that_never_move_keep_no_endless_records() -> None:
    """Somebody who times a model, say; and the number of steps is unknown."""
    model = build("flux")
    apply_dicache(model, DiCacheConfig(threshold=0.1))
    (inputs, *_) = calls("flux", 2, batch=1)
    with told("The number of steps is unknown", "calls at one timestep are one step"):
        for _ in range(40):
            model(**inputs)
    assert sum(len(records) for records in get_stats(model).contexts.values()) <= 40
    assert get_stats(model).cache_tensors <= 4


def test_a_run_without_end_keeps_the_last_records() -> None:
    rules = DiCacheConfig(threshold=0.0, retention_ratio=0, num_inference_steps=10**6)
    session = DiCacheSession(rules)
    x = torch.ones(1, 1, 4)
    for _ in range(MOST_RECORDS + 10):
        with session.step("main") as step:
            if step.needs_probe:
                step.probe(x, 2 * x)
            step.record(x, 2 * x, 3 * x)
    records = session.stats.contexts["main"]
    assert MOST_RECORDS // 2 <= len(records) < MOST_RECORDS
    assert records[-1].step == MOST_RECORDS + 9


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["cache first", "sparse first"])
def test_a_timestep_is_read_once_a_call_however_many_features_ask(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    as_number = locate.as_number
    monkeypatch.setattr(
        locate, "as_number", lambda value: (read.append(value), as_number(value))[1]
    )
    model = build("wan")
    sparse = SparseVideoGenConfig(density=0.5, block_size=16, num_inference_steps=4)
    features = [
        lambda: apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=4)),
        lambda: apply_sparse_videogen(model, sparse),
    ]
    for put_on in features if order == "cache first" else features[::-1]:
        put_on()
    for inputs in calls("wan", 4):
        read.clear()
        model(**inputs)
        assert len(read) == 1 and isinstance(read[0], Tensor)
