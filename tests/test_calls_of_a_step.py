"""Several calls of one branch in one step: tiles, windows, averages, guidance that skips layers.

Each has a history of its own where its place in the step tells it from the others, and is computed
where it does not. On a trained model the answer of every call is compared with the un-cached one.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from helpers import masks
from tiny_models import build, calls
from tiny_pipelines import pipeline
from torch import Tensor

from dicache import DiCacheConfig, DiCacheWarning, apply_dicache, get_stats, remove_dicache
from dicache.core.branches import MOST_BRANCHES
from dicache.demo import pipelines as demo

NUM_STEPS = 30
Asked = tuple[dict[str, Any], Tensor]  # a call, and its un-cached answer


@pytest.fixture(scope="module")
def flux() -> Any:
    """The trained Flux, and three runs of one prompt from other noise: tiles, say."""
    pipe = demo.load_pipeline("flux")
    model, runs = pipe.transformer, []
    with torch.no_grad():
        for seed in range(3):
            made: list[Asked] = []
            handle = model.register_forward_hook(
                lambda _, __, inputs, output, made=made: made.append((inputs, output[0])),
                with_kwargs=True,
            )
            arguments = demo.pipeline_inputs("flux", demo.default_prompts("flux")[0], seed, 30)
            pipe(**arguments)
            handle.remove()
            runs.append(made)
    prompt = runs[0][0][0]["encoder_hidden_states"]
    for run in runs:
        for inputs, _ in run:
            inputs["encoder_hidden_states"] = prompt
    return model, runs


def ask(
    model: Any, order: list[Asked], context: str | None, rules: DiCacheConfig
) -> tuple[float, Any, list[str]]:
    """The worst relative deviation of an answer, the statistics, and what was told."""
    apply_dicache(model, rules)
    worst = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for inputs, expected in order:
            with nullcontext() if context is None else model.cache_context(context):
                output = model(**inputs)[0]
            worst = max(worst, float((output - expected).norm() / expected.norm()))
    stats = get_stats(model)
    remove_dicache(model)
    told = [str(each.message) for each in caught if issubclass(each.category, DiCacheWarning)]
    return worst, stats, told


def in_order(runs: list[list[Asked]]) -> Iterator[list[Asked]]:
    """The steps, each a list of calls."""
    for step in zip(*runs, strict=True):
        yield list(step)


DEFAULT = DiCacheConfig(num_inference_steps=NUM_STEPS)
PUBLISHED = DiCacheConfig.preset("flux", num_inference_steps=NUM_STEPS)


@pytest.mark.parametrize("rules", [DEFAULT, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("context", [None, "cond"])
@pytest.mark.parametrize("count", [2, 3])
def test_tiles_are_cached_as_well_as_each_alone(
    flux: Any, count: int, context: str | None, rules: DiCacheConfig
) -> None:
    model, runs = flux
    alone = [ask(model, run, context, rules) for run in runs[:count]]
    order = [call for step in in_order(runs[:count]) for call in step]
    worst, stats, told = ask(model, order, context, rules)
    assert worst <= max(deviation for deviation, _, _ in alone) * 1.01
    assert stats.num_reused == sum(single.num_reused for _, single, _ in alone)
    assert not told and len(stats.contexts) == count


def test_the_number_of_calls_may_be_given_for_the_number_of_steps(flux: Any) -> None:
    """As somebody counts who looks at the transformer alone: the leading steps are more then."""
    model, runs = flux
    order = [call for step in in_order(runs[:2]) for call in step]
    worst, stats, told = ask(model, order, None, DiCacheConfig(num_inference_steps=2 * NUM_STEPS))
    assert worst < 0.1 and stats.num_reused > 20 and not told


Shuffle = Callable[[int, list[Asked]], list[Asked]]
ORDERS: dict[str, Shuffle] = {
    "there and back": lambda index, step: step if index % 2 else step[::-1],
    "at random": lambda index, step: random.Random(index).sample(step, len(step)),
    "turned around once": lambda index, step: step if index < 12 else step[::-1],
    "rolled once": lambda index, step: step if index < 12 else [*step[1:], step[0]],
}


@pytest.mark.parametrize("context", [None, "cond"])
@pytest.mark.parametrize("shuffle", ORDERS.values(), ids=ORDERS)
def test_calls_in_another_order_than_before_are_computed_with_one_warning(
    flux: Any, shuffle: Shuffle, context: str | None
) -> None:
    model, runs = flux
    alone = max(ask(model, run, context, DEFAULT)[0] for run in runs)
    steps = [shuffle(index, step) for index, step in enumerate(in_order(runs))]
    worst, _, told = ask(model, [call for step in steps for call in step], context, DEFAULT)
    assert worst <= alone * 1.01
    assert len(told) == 1 and "in another order" in told[0]


NUMBERS: dict[str, Callable[[int], slice]] = {
    "more and more": lambda index: slice(0, 1 + index // 10),
    "fewer and fewer": lambda index: slice(index // 10, 3),
    "a second one for a while, behind": lambda index: slice(0, 2 if 5 <= index < 20 else 1),
    "a second one for a while, in front": lambda index: slice(0 if 5 <= index < 20 else 1, 2),
}


@pytest.mark.parametrize("rules", [DEFAULT, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("which", NUMBERS.values(), ids=NUMBERS)
def test_a_changing_number_of_calls_costs_no_quality(
    flux: Any, which: Callable[[int], slice], rules: DiCacheConfig
) -> None:
    """As guidance does that skips layers in some steps."""
    model, runs = flux
    alone = [ask(model, run, None, rules) for run in runs]
    steps = [step[which(index)] for index, step in enumerate(in_order(runs))]
    worst, stats, told = ask(model, [call for step in steps for call in step], None, rules)
    # A history that begins in the middle has other steps to reuse than one from the beginning.
    assert worst <= 1.5 * max(deviation for deviation, _, _ in alone)
    assert stats.num_reused > 0 and len(told) <= 2


def test_a_number_that_never_stays_is_told_once(flux: Any) -> None:
    model, runs = flux
    steps = [step[: 2 + index % 2] for index, step in enumerate(in_order(runs))]
    worst, stats, told = ask(model, [call for step in steps for call in step], None, DEFAULT)
    assert worst == 0.0 and stats.num_reused == 0
    assert len(told) == 1 and "number of these calls changed" in told[0]


def test_no_more_than_so_many_calls_of_a_step_have_a_history() -> None:
    """The others are computed, and neither memory nor statistics grow with them."""
    model, plain = build("flux"), build("flux")
    rules = DiCacheConfig(threshold=math.inf, retention_ratio=0, num_inference_steps=6)
    apply_dicache(model, rules)
    tiles = [calls("flux", 6, seed=10 * k, batch=1) for k in range(MOST_BRANCHES + 3)]
    prompt = tiles[0][0]["encoder_hidden_states"]
    with pytest.warns(DiCacheWarning, match=f"more than {MOST_BRANCHES} times a step") as caught:
        for step in zip(*tiles, strict=True):
            for number, inputs in enumerate(step):
                inputs = {**inputs, "encoder_hidden_states": prompt}
                output = model(**inputs)[0]
                if number >= MOST_BRANCHES:
                    assert torch.equal(output, plain(**inputs)[0])
    assert len([each for each in caught if each.category is DiCacheWarning]) == 1
    found = masks(model)
    assert len(found) == MOST_BRANCHES + 1 and found["untold"] == "C" * 3 * 6
    assert found["branch0"] == "CCRRRC" and found["branch31"] == "CCRRRC"


def test_calls_of_a_step_that_never_come_back_take_no_memory() -> None:
    """As somebody does who times a model: the same call, again and again."""
    model = build("flux")
    apply_dicache(model, DiCacheConfig(num_inference_steps=30))
    (inputs, *_) = calls("flux", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(100):
            model(**inputs)
    assert get_stats(model).cache_tensors == 4
    assert get_stats(model).num_computed == 100


def test_averages_over_fresh_noise_as_flowedit_makes_them(flux: Any) -> None:
    """Every call of every step has noise of its own: nothing may be taken from the step before."""
    model, runs = flux
    generator, order = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for index, (inputs, _) in enumerate(runs[0]):
            picture = runs[0][-1][0]["hidden_states"]
            time = float(inputs["timestep"].flatten()[0])
            for _ in range(3):
                noise = torch.randn(picture.shape, generator=generator)
                asked = {**inputs, "hidden_states": (1 - time) * picture + time * noise}
                order.append((asked, model(**asked)[0]))
            assert len(order) == 3 * (index + 1)
    alone = max(ask(model, run, None, DEFAULT)[0] for run in runs)
    worst, _, _ = ask(model, order, None, DEFAULT)
    assert worst <= 1.5 * alone


# --- tiles of several sizes ----------------------------------------------------------------------

GUIDED = {"cond": 0, "uncond": 50}


def edge_tiles(family: str, sizes: list[int], seed: int = 0) -> list[list[dict[str, Any]]]:
    """Of every step the calls for tiles of these sizes, with one prompt."""
    runs = [calls(family, 9, seed=seed + k, batch=1, size=size) for k, size in enumerate(sizes)]
    text = {
        name: value
        for name, value in runs[0][0].items()
        if name.startswith("encoder") or name == "pooled_projections"
    }
    return [[{**inputs, **text} for inputs in step] for step in zip(*runs, strict=True)]


@pytest.mark.parametrize("contexts", [True, False])
@pytest.mark.parametrize("family", ["flux", "qwen-image", "wan"])
@pytest.mark.parametrize("sizes", [[4, 2], [4, 4, 2, 2], [2, 4, 6, 4]], ids=str)
def test_tiles_of_other_sizes_are_cached_each_for_itself(
    family: str, sizes: list[int], contexts: bool
) -> None:
    """As at the edges of a picture; with both branches of guidance of every tile."""
    # Two steps are computed before one is reused: of the second one of two equal tiles the first
    # step is not kept, because nobody knows yet that it is going to come back.
    rules = DiCacheConfig(schedule="CCCRRCRRC", num_inference_steps=9)
    model, alone = build(family), build(family)
    guided = {name: edge_tiles(family, sizes, seed) for name, seed in GUIDED.items()}
    answers: dict[tuple[str, int], list[Tensor]] = {}
    apply_dicache(model, rules)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        for step in range(9):
            for tile in range(len(sizes)):
                for name, steps in guided.items():
                    with model.cache_context(name) if contexts else nullcontext():
                        answer = model(**steps[step][tile])[0]
                    answers.setdefault((name, tile), []).append(answer)
    assert list(masks(model).values()) == ["CCCRRCRRC"] * 2 * len(sizes)
    for (name, tile), found in answers.items():
        apply_dicache(alone, rules)
        for step, answer in enumerate(found):
            assert torch.equal(alone(**guided[name][step][tile])[0], answer)
        remove_dicache(alone)


@pytest.mark.parametrize("contexts", [True, False])
def test_branches_of_a_tile_decide_together_whatever_the_size_of_others(contexts: bool) -> None:
    model = build("flux")
    apply_dicache(model, DiCacheConfig(threshold=0.2, retention_ratio=0, num_inference_steps=9))
    guided = {name: edge_tiles("flux", [4, 2], seed) for name, seed in GUIDED.items()}
    for step in range(9):
        for tile in range(2):
            for name, steps in guided.items():
                with model.cache_context(name) if contexts else nullcontext():
                    model(**steps[step][tile])
    first, second, third, fourth = masks(model).values()
    assert first == second and third == fourth and "R" in first and first != third


def test_a_picture_of_another_size_is_another_run() -> None:
    """With the same prompt, at a later timestep than the run began: no tile of it."""
    model, fresh = build("flux"), build("flux")
    for each in (model, fresh):
        apply_dicache(each, DiCacheConfig(schedule="CCRRRRRRR"))
    large, small = (edge_tiles("flux", [size]) for size in (4, 2))
    prompt = large[0][0]["encoder_hidden_states"]
    for (inputs,) in large[:4]:
        model(**inputs)
    for (inputs,) in small[4:]:
        inputs = {**inputs, "encoder_hidden_states": prompt}
        assert torch.equal(model(**inputs)[0], fresh(**inputs)[0])
    assert masks(model) == {"branch0": "CCRRR"}


# --- pipelines and schedulers --------------------------------------------------------------------

RULES = DiCacheConfig(threshold=math.inf, retention_ratio=0)


def denoise_tiles(pipe: Any, scheduler: Any, tiles: int, contexts: bool) -> list[Tensor]:
    """What a tiled pipeline does: in every step both branches of every tile, then the scheduler."""
    model = pipe.transformer
    shape = calls("flux", 2, batch=1)[0]
    texts = [torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    latents = [
        torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(10 + tile))
        for tile in range(tiles)
    ]
    outputs = []
    for time in scheduler.timesteps:
        velocities = []
        for tile in range(tiles):
            for name, prompt in zip(("cond", "uncond"), texts, strict=True):
                inputs = {
                    **shape,
                    "hidden_states": latents[tile],
                    "encoder_hidden_states": prompt,
                    "timestep": time.expand(1) / 1000,
                }
                with model.cache_context(name) if contexts else nullcontext():
                    outputs.append(model(**inputs)[0])
            velocities.append(outputs[-1] + 3 * (outputs[-2] - outputs[-1]))
        moved = scheduler.step(torch.cat(velocities), time, torch.cat(latents)).prev_sample
        latents = list(moved.split(1))
    return outputs


@pytest.mark.parametrize("contexts", [True, False])
@pytest.mark.parametrize("applied_to", ["pipeline", "transformer"])
def test_tiles_with_guidance_on_a_pipeline_are_cached_each_for_itself(
    applied_to: str, contexts: bool
) -> None:
    """A tile's answers are the same whether one more tile is made beside it or two are."""
    outputs = {}
    for tiles in (2, 3):
        pipe = pipeline("flux")
        pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
        pipe.scheduler.set_begin_index(0)
        rules = DiCacheConfig(schedule="CCRRRRRRRC", num_inference_steps=10)
        apply_dicache(pipe if applied_to == "pipeline" else pipe.transformer, rules)
        outputs[tiles] = denoise_tiles(pipe, pipe.scheduler, tiles, contexts)
        assert set(masks(pipe.transformer).values()) == {"CCRRRRRRRC"}
        assert len(masks(pipe.transformer)) == 2 * tiles
    for step in range(10):
        for call in range(4):
            assert torch.equal(outputs[2][4 * step + call], outputs[3][6 * step + call])


def test_a_second_evaluation_on_a_bare_transformer_stays_right(flux: Any) -> None:
    """Of a two-stage scheduler, which repeats a timestep with latents that moved."""
    model, runs = flux
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(15)
    latents, order = runs[0][0][0]["hidden_states"], []
    with torch.no_grad():
        for time in scheduler.timesteps:
            inputs = {
                **runs[0][0][0],
                "hidden_states": latents,
                "timestep": time.expand(1) / 1000,
            }
            order.append((inputs, model(**inputs)[0]))
            latents = scheduler.step(order[-1][1], time, latents).prev_sample
    assert len(order) == 29
    for steps in (15, 29):
        worst, stats, _ = ask(model, order, None, DiCacheConfig(num_inference_steps=steps))
        assert worst < 0.1 and stats.num_reused > 0


def test_guidance_that_skips_layers_has_a_history_of_its_own() -> None:
    """Its calls differ from the first branch's in nothing but what lies behind the probe."""
    model, plain = build("flux"), build("flux")
    steps = calls("flux", 12)
    apply_dicache(
        model, DiCacheConfig(threshold=math.inf, retention_ratio=0, num_inference_steps=12)
    )
    skipped = {"joint_attention_kwargs": {"scale": 1.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        for index, inputs in enumerate(steps):
            model(**inputs)
            if 3 <= index < 8:
                model(**inputs, **skipped)
    assert masks(model) == {"branch0": "CRRRCRRRRCRC", "branch1": "CCRRR"}
    assert torch.equal(model(**steps[0])[0], plain(**steps[0])[0])


def test_a_scheduler_that_moves_tells_steps_from_calls() -> None:
    """Equal timesteps, as rounded ones are, are steps where the scheduler moved on between them."""
    pipe = pipeline("flux", scheduler=FlowMatchEulerDiscreteScheduler())
    apply_dicache(pipe, RULES)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(sigmas=[1.0, 1.0, 1.0, 0.5, 0.2])
    scheduler.set_begin_index(0)
    inputs, latents = calls("flux", 2, batch=1)[0], torch.randn(1, 16, 16)
    for time in scheduler.timesteps:
        output = pipe.transformer(**{**inputs, "hidden_states": latents, "timestep": time[None]})[0]
        latents = scheduler.step(output, time, latents).prev_sample
    assert masks(pipe) == {"branch0": "CRRRC"}
