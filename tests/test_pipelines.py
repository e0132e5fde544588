"""Real pipelines: the cache knows the run's length and branches, and every run starts clean.

A pipeline's transformer is watched from outside. What the un-cached twin and the paper's formulas
give for the inputs that the pipeline really passed is what the cached transformer must have
returned, on every step of every branch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import (
    MiniMaxH3CoreDenoiseStep,
    MiniMaxH3FL2VACoreDenoiseStep,
)
from tiny_models import build, calls
from tiny_pipelines import PIPELINES, by_branch, pipeline, record, run, scheduler, text
from torch import Tensor, nn
from twin import Twin, assert_close, expected_run

from dicache import (
    DiCacheConfig,
    RunStats,
    apply_dicache,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from dicache.core.trajectory import Trajectory

# The gate never stops: of six steps floor(0.34 * 6) = 2 are retained, and the last is computed.
# Whoever counts steps or branches wrongly gets another mask.
RULES = DiCacheConfig(
    threshold=float("inf"), retention_ratio=0.34, compute_last_step=True, gamma_range=(0.0, 2.0)
)
MASK = "CCRRRC"
LETTERS = {"compute": "C", "resume": "C", "reuse": "R"}


def masks(stats: RunStats) -> dict[str, str]:
    """What was computed and reused, by context."""
    return {
        name: "".join(LETTERS[step.action] for step in steps)
        for name, steps in stats.contexts.items()
    }


def check_calls(family: str, transformer: nn.Module, calls: list[Any], mask: str) -> None:
    """The calls of one branch follow the formulas."""
    twin = Twin(family, transformer)
    steps = [call.inputs for call in calls]
    expected = expected_run(twin, steps, mask, RULES.alignment, RULES.gamma_range)
    for call, step in zip(calls, expected, strict=True):
        assert_close(call.output, step.output)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_branch_follows_the_formulas(name):
    row = PIPELINES[name]
    pipe = pipeline(name)
    calls = record(pipe.transformer)
    apply_dicache(pipe, RULES)
    run(name, pipe)
    assert masks(get_stats(pipe)["transformer"]) == dict.fromkeys(row.branches, MASK)
    twin = build(row.family, **(row.overrides or {}))
    branches = by_branch(calls)
    assert len(branches) == len(row.branches)
    for branch in branches:
        check_calls(row.family, twin, branch, MASK)


@pytest.mark.parametrize("name", PIPELINES)
def test_threshold_zero_equals_no_cache_bit_by_bit(name):
    plain = run(name, pipeline(name))
    pipe = pipeline(name)
    apply_dicache(pipe, DiCacheConfig(threshold=0))
    assert torch.equal(run(name, pipe), plain)


def test_every_section_of_framepack_is_a_run_of_its_own():
    """A long video is made in sections, each from noise, with what was made before beside it."""
    pipe = pipeline("framepack")
    calls = record(pipe.transformer)
    apply_dicache(pipe, RULES)
    run("framepack", pipe, num_frames=9)
    assert len(calls) == 2 * len(MASK)
    for section in (calls[: len(MASK)], calls[len(MASK) :]):
        check_calls("framepack", build("framepack"), section, MASK)


def minimax_h3(blocks: type[Any]) -> Any:
    """The modular pipeline's core; its model has as many latents as the pipeline expects."""
    pipe = blocks().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    schedulers = {"scheduler": MiniMaxH3Scheduler(12), "audio_scheduler": MiniMaxH3Scheduler(3)}
    pipe.update_components(transformer=build("minimax-h3", **H3), **schedulers)
    return pipe


def run_minimax_h3(pipe: Any, num_steps: int, **arguments: Any) -> Tensor:
    """Video and audio; of N sigmas the last one is the picture itself."""
    state = pipe(
        prompt_embeds=text(0),
        text_token_tags=torch.ones(5, dtype=torch.long),
        height=64,
        width=64,
        num_frames=124,
        num_inference_steps=num_steps + 1,
        generator=torch.Generator().manual_seed(0),
        **arguments,
    )
    return torch.cat([state.get(name).flatten() for name in ("latents", "audio_latents")])


H3 = {"in_channels": 24, "audio_in_channels": 32}
KEYFRAME = {"keyframe_anchors": ("first",), "condition_latents": [torch.ones(1, 24, 1, 4, 4)]}


@pytest.mark.parametrize(
    ("blocks", "arguments"),
    [(MiniMaxH3CoreDenoiseStep, {}), (MiniMaxH3FL2VACoreDenoiseStep, KEYFRAME)],
    ids=["text", "keyframe"],
)
def test_minimax_h3(blocks: type[Any], arguments: dict[str, Any]) -> None:
    """A keyframe's rows have a timestep of their own, near the schedule's end, in all steps."""
    pipe = minimax_h3(blocks)
    plain, made = run_minimax_h3(pipe, 6, **arguments), record(pipe.transformer)
    apply_dicache(pipe, DiCacheConfig(threshold=0))
    assert torch.equal(run_minimax_h3(pipe, 6, **arguments), plain)
    remove_dicache(pipe)
    apply_dicache(pipe, RULES)
    for mask in (MASK, MASK, "CCRRRRRC"):
        made.clear()
        run_minimax_h3(pipe, len(mask), **arguments)
        assert masks(get_stats(pipe)["transformer"]) == {"branch0": mask}
        check_calls("minimax-h3", build("minimax-h3", **H3), made, mask)


def test_references_that_are_clean_in_every_step_do_not_hide_where_a_run_stands() -> None:
    """Where timesteps rise, a reference's is larger than any; here nothing else tells steps."""
    model, steps = build("minimax-h3"), calls("minimax-h3", len(MASK))
    for inputs in steps:
        inputs["timestep"] = torch.cat([inputs["timestep"], torch.ones(1)])
        inputs["timestep_indices"] = torch.zeros_like(inputs["timestep_indices"])
        inputs["timestep_indices"][-4:] = 1
    made = record(model)
    apply_dicache(model, replace(RULES, num_inference_steps=len(MASK)))
    for _ in range(2):
        made.clear()
        for inputs in steps:
            model(**inputs)
        assert masks(get_stats(model)) == {"branch0": MASK}
        check_calls("minimax-h3", build("minimax-h3"), made, MASK)


# Every disturbance leaves the transformer with a history that the next run must not see.


class AbortError(Exception):
    """Raised by a test in the middle of a run."""


def abort_after(step: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise AbortError
        return {}

    return callback


def abort_between_steps(name: str, pipe: Any, step: int, **changes: Any) -> None:
    with pytest.raises(AbortError):
        run(name, pipe, seed=1, callback_on_step_end=abort_after(step), **changes)


def abort_in_model(name: str, pipe: Any, call: int) -> None:
    part, left = list(pipe.transformer.children())[-1], [call]

    def fail(module: nn.Module, args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise AbortError

    called = part[-1] if isinstance(part, nn.ModuleList) else part
    hook = called.register_forward_pre_hook(fail)
    with pytest.raises(AbortError):
        run(name, pipe, seed=1)
    hook.remove()


def run_in_double(name: str, pipe: Any) -> None:
    pipe.transformer.double()  # and back: every float32 survives that
    embeddings = {
        key: [each.double() for each in value] if isinstance(value, list) else value.double()
        for key, value in PIPELINES[name].arguments().items()
        if isinstance(value, (Tensor, list))
    }
    run(name, pipe, seed=1, **embeddings)
    pipe.transformer.float()


def run_larger(name: str, pipe: Any) -> None:
    given = {"flux-img2img": (1, 36, 16), "wan-v2v": (1, 4, 2, 12, 12)}
    latents = {"latents": torch.ones(given[name])} if name in given else {}
    run(name, pipe, seed=1, height=96, width=96, **latents)


DISTURBANCES: dict[str, Callable[[str, Any], None]] = {
    "same call": lambda name, pipe: run(name, pipe, seed=1),
    "more steps": lambda name, pipe: run(name, pipe, 9, seed=1),
    "fewer steps": lambda name, pipe: run(name, pipe, 3, seed=1),
    "two steps": lambda name, pipe: run(name, pipe, 2, seed=1),
    "other size": run_larger,
    "other dtype": run_in_double,
    "abort after step 0": lambda name, pipe: abort_between_steps(name, pipe, 0),
    "abort after step 3": lambda name, pipe: abort_between_steps(name, pipe, 3),
    "abort after step 3 of 9": lambda name, pipe: abort_between_steps(name, pipe, 3, num_steps=9),
    "error in the first call": lambda name, pipe: abort_in_model(name, pipe, 0),
    "error in the third call": lambda name, pipe: abort_in_model(name, pipe, 2),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize(
    "name", ("flux-true-guidance", "flux-img2img", "wan", "wan-v2v", "mochi", "z-image")
)
def test_a_run_after_another_equals_a_fresh_one(name, disturbance):
    fresh, used = pipeline(name), pipeline(name)
    for pipe in (fresh, used):
        apply_dicache(pipe, RULES)
    DISTURBANCES[disturbance](name, used)
    assert torch.equal(run(name, used), run(name, fresh))
    assert get_stats(used) == get_stats(fresh)


def test_wan_2_2_counts_the_steps_of_each_expert():
    experts = {"transformer": build("wan"), "transformer_2": build("wan", seed=1)}
    pipe = pipeline("wan", **experts, boundary_ratio=0.5)
    calls = {name: record(expert) for name, expert in experts.items()}
    apply_dicache(pipe, DiCacheConfig(threshold=float("inf"), retention_ratio=0.2))
    abort_between_steps("wan", pipe, 9, num_steps=12)  # both experts have a history now
    for each in calls.values():
        each.clear()
    run("wan", pipe, num_steps=12)
    stats = get_stats(pipe)
    assert list(stats) == ["transformer", "transformer_2"]
    high, low = (len(each) // 2 for each in calls.values())  # two branches
    assert high + low == 12 and min(high, low) > 3
    # floor(0.2 * 12) = 2 retained steps in each; the run's last step is the low-noise expert's.
    expected = {"transformer": "CC" + "R" * (high - 2), "transformer_2": f"CC{'R' * (low - 3)}C"}
    for name, mask in expected.items():
        assert masks(stats[name]) == {"cond": mask, "uncond": mask}


def test_image_to_image_on_the_same_transformer_after_an_aborted_run():
    fresh = pipeline("flux-img2img")
    apply_dicache(fresh, RULES)
    pipe = pipeline("flux")
    apply_dicache(pipe, RULES)
    abort_between_steps("flux", pipe, 3, num_steps=9)
    image_pipe = FluxImg2ImgPipeline.from_pipe(pipe)
    image_pipe.set_progress_bar_config(disable=True)
    del pipe  # the usual `pipe = ....from_pipe(pipe)`
    gc.collect()
    assert torch.equal(run("flux-img2img", image_pipe), run("flux-img2img", fresh))
    assert get_stats(image_pipe) == get_stats(fresh)


def test_alternating_pipelines_on_one_transformer():
    names = ("flux", "flux-img2img", "flux")
    transformer, shared_scheduler = build("flux"), scheduler("flux")
    shared = {"transformer": transformer, "scheduler": shared_scheduler}
    pipes = {name: pipeline(name, **shared) for name in set(names)}
    apply_dicache(pipes["flux"], RULES)
    for name, num_steps in zip(names, (6, 6, 8), strict=True):
        fresh = pipeline(name)
        apply_dicache(fresh, RULES)
        assert torch.equal(run(name, pipes[name], num_steps), run(name, fresh, num_steps))
        assert get_stats(transformer) == get_stats(fresh)["transformer"]


def test_a_new_layout_keeps_branches_apart():
    """A run that begins where another one was given up: without a pipeline nothing but its layout
    tells it from one more call of that step, so it has branches of its own beside those.
    """
    model, texts = build("wan"), (text(0), text(1))
    apply_dicache(model, DiCacheConfig(schedule="CR", gamma_range=RULES.gamma_range))
    calls = record(model)
    for side, steps in ((4, 1), (8, 2)):
        calls.clear()
        for step in range(steps):
            for prompt in texts:
                model(
                    hidden_states=torch.randn(1, 4, 2, side, side),
                    timestep=torch.tensor([1000.0 - step]),
                    encoder_hidden_states=prompt,
                    return_dict=False,
                )
    given_up, made = {"branch0": "C", "branch1": "C"}, {"branch2": "CR", "branch3": "CR"}
    assert masks(get_stats(model)) == given_up | made
    for branch in by_branch(calls):
        check_calls("wan", build("wan"), branch, "CR")


@pytest.fixture
def new_objects():
    """Hides what exists already from the garbage collector, so that looking is quick."""
    gc.freeze()
    yield
    gc.unfreeze()


def alive(kind: type) -> list[Any]:
    """All new objects of a class that something still holds."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is kind]


def held_tensors() -> int:
    """Allocations that hold tensors of the tiny models' hidden-state size."""
    # Exact types: torch.compile leaves fake ones behind, which have no memory.
    real = [t for t in alive(Tensor) if type(t) in (Tensor, nn.Parameter)]
    large = [t for t in real if t.ndim >= 3 and t.numel() >= 16 * 24]
    return len({tensor.untyped_storage().data_ptr() for tensor in large})


FREEING: dict[str, Callable[[str, Any], Any]] = {
    "the pipeline ends": run,
    "reset_dicache": lambda name, pipe: (abort_between_steps(name, pipe, 3), reset_dicache(pipe)),
    "the model raises": lambda name, pipe: abort_in_model(name, pipe, 4),
    "remove_dicache": lambda name, pipe: (abort_between_steps(name, pipe, 3), remove_dicache(pipe)),
}


@pytest.mark.parametrize("event", FREEING)
@pytest.mark.parametrize("name", ("flux-true-guidance", "wan-v2v", "sd3"))
def test_state_is_freed_when(name, event, new_objects):
    pipe = pipeline(name)
    run(name, pipe)
    before = held_tensors()
    apply_dicache(pipe, RULES)
    FREEING[event](name, pipe)
    assert held_tensors() == before
    assert not alive(Trajectory)


def test_state_is_held_during_a_run(new_objects):
    """The counterpart of the test above: what it counts does exist while a run lasts."""
    pipe = pipeline("wan")
    run("wan", pipe)
    before = held_tensors()
    apply_dicache(pipe, RULES)
    abort_between_steps("wan", pipe, 3)
    assert len(alive(Trajectory)) == 2
    assert held_tensors() == before + 4  # two windows in each of two contexts
    assert get_stats(pipe)["transformer"].cache_tensors == 8


def test_stats_outlive_the_state_until_the_next_run_begins():
    pipe = pipeline("wan")
    apply_dicache(pipe, RULES)
    run("wan", pipe)
    first = get_stats(pipe)["transformer"]
    expected = first.to_dict()
    reset_dicache(pipe)
    assert get_stats(pipe)["transformer"] is first
    abort_between_steps("wan", pipe, 0)
    assert masks(get_stats(pipe)["transformer"]) == {"cond": "C", "uncond": "C"}
    assert first.to_dict() == expected


def test_half_precision_pipelines():
    """bf16 timesteps repeat; the run is still one run, and the head still gets bf16."""
    pipe = pipeline("flux", transformer=build("flux").to(torch.bfloat16))
    apply_dicache(pipe, RULES)
    half = {key: text(0).bfloat16() for key in ("prompt_embeds",)}
    pooled = {"pooled_prompt_embeds": text(0)[:, 0].bfloat16()}
    latents = run("flux", pipe, 40, **half, **pooled)
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    assert masks(get_stats(pipe)["transformer"]) == {"cond": "C" * 13 + "R" * 26 + "C"}
