"""Run, step and branch of a call are found in every way that a caller gives them away.

Where it cannot, the steps are computed. Offloading, which rewrites a model's `forward` behind the
cache's back, leaves it alive.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers import mask
from tiny_models import build, calls
from tiny_pipelines import pipeline, run
from torch import nn

from dicache import DiCacheConfig, DiCacheWarning, apply_dicache, get_stats, remove_dicache
from dicache.adapters.schedule import _index_of

ALWAYS = DiCacheConfig(threshold=float("inf"), retention_ratio=0, compute_last_step=False)
LETTERS = {"compute": "C", "resume": "c", "reuse": "R"}


def schedule(model: Any, context: str) -> str:
    stats = get_stats(model)
    stats = stats["transformer"] if isinstance(stats, dict) else stats
    return "".join(LETTERS[record.action] for record in stats.contexts[context])


def test_offloading_between_runs_leaves_the_cache_alive():
    pipe = pipeline("flux")
    transformer = pipe.transformer
    for _ in range(3):  # what enable_model_cpu_offload does: hook on, run, hook off
        add_hook_to_module(transformer, ModelHook())
        if not transformer.is_cache_enabled:
            apply_dicache(pipe, DiCacheConfig(schedule="CCRRRC"))
        run("flux", pipe)
        assert schedule(pipe, "cond") == "CCRRRC"
        remove_hook_from_module(transformer)


def test_removal_keeps_a_hook_that_was_put_on_later():
    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, counter = build("flux"), Counter()
    apply_dicache(model, ALWAYS)
    add_hook_to_module(model, counter)
    remove_dicache(model)
    model(**calls("flux", 1)[0])
    assert counter.calls == 1


def test_branches_stay_apart_when_a_run_is_longer_than_announced():
    model, cached = build("wan"), build("wan")
    apply_dicache(cached, DiCacheConfig(schedule="CRRRRRRR", num_inference_steps=3))
    steps = calls("wan", 8)
    shape = steps[0]["encoder_hidden_states"].shape
    texts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for index, inputs in enumerate(steps):
        for text in texts:
            inputs = {**inputs, "encoder_hidden_states": text}
            got, plain = cached(**inputs)[0], model(**inputs)[0]
            if index % 3 == 0:  # a run of three steps begins: nothing of the other branch is used
                assert torch.equal(got, plain)
    assert schedule(cached, "branch0") == schedule(cached, "branch1") == "CR"


def test_the_pipelines_number_of_steps_wins_over_the_configurations():
    pipe = pipeline("flux")
    config = DiCacheConfig(threshold=float("inf"), retention_ratio=0, num_inference_steps=4)
    apply_dicache(pipe, config)
    run("flux", pipe, num_steps=10)
    assert schedule(pipe, "cond") == "CRRRRRRRRC"


@pytest.mark.parametrize("before", ["never ran", "aborted", "finished"])
def test_a_pipeline_with_another_scheduler_is_computed_with_a_warning(before):
    bound = pipeline("flux")
    other = pipeline("flux", transformer=bound.transformer)
    other.scheduler = copy.deepcopy(bound.scheduler)
    apply_dicache(bound, DiCacheConfig(threshold=float("inf"), retention_ratio=0.2))

    def abort(pipe: Any, index: int, *_: Any) -> Any:
        raise KeyError(index)

    if before == "aborted":
        with pytest.raises(KeyError):
            run("flux", bound, num_steps=20, callback_on_step_end=abort)
    elif before == "finished":
        run("flux", bound, num_steps=8)
    with pytest.warns(DiCacheWarning, match="apply_dicache"):
        run("flux", other, num_steps=6)
    assert set(schedule(bound, "cond")) == {"C"}


def test_branches_of_different_size_are_both_cached():
    model = build("flux")
    apply_dicache(model, ALWAYS)
    for small, large in zip(calls("flux", 4, size=2), calls("flux", 4, size=4), strict=True):
        with model.cache_context("small"):
            model(**small)
        with model.cache_context("large"):
            model(**large)
    assert schedule(model, "small") == schedule(model, "large") == "CRRR"


def test_a_run_may_leave_inference_mode():
    model = build("flux")
    apply_dicache(model, DiCacheConfig(schedule="CCRCR"))
    for index, inputs in enumerate(calls("flux", 5)):
        with torch.inference_mode(index < 2):
            model(**inputs)
    assert schedule(model, "branch0") == "CCRCR"


def test_an_interrupted_call_leaves_nothing_behind():
    model = build("flux")
    apply_dicache(model, ALWAYS)
    steps = calls("flux", 4)
    model(**steps[0])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.proj_out.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**steps[1])
    handle.remove()
    model(**steps[2])
    assert schedule(model, "branch0") == "C"


@pytest.mark.parametrize("aborted_after", [0, 1, 2])
def test_a_pipeline_that_follows_an_aborted_one_reuses_nothing_of_it(aborted_after):
    """Its first call looks like the aborted run's next one, but for the timestep."""
    bound = pipeline("flux")
    other = pipeline("flux", transformer=bound.transformer)
    other.scheduler = copy.deepcopy(bound.scheduler)
    rules = {"threshold": float("inf"), "retention_ratio": 0, "compute_last_step": False}
    apply_dicache(bound, DiCacheConfig(**rules, num_inference_steps=6))

    def abort(pipe: Any, index: int, *_: Any) -> Any:
        if index == aborted_after:
            raise KeyError(index)
        return {}

    first_calls = []
    with pytest.raises(KeyError):
        run("flux", bound, num_steps=6, callback_on_step_end=abort)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        first_calls.append(schedule(bound, "cond"))

    handle = bound.transformer.proj_out.register_forward_hook(note)
    run("flux", other, num_steps=6)
    handle.remove()
    assert first_calls[0] == "C"


@pytest.mark.parametrize("family", ["flux", "qwen-image", "hunyuan-video"])
@pytest.mark.parametrize("aborted_after", [0, 3, 5])
def test_such_a_pipeline_has_a_run_of_its_own_also_where_its_first_steps_are_computed(
    family: str, aborted_after: int
) -> None:
    """Then nothing is read in its first call that could tell that it is another run's."""
    answers = []
    for is_aborted in (False, True):
        bound = pipeline(family)
        other = pipeline(family, transformer=bound.transformer)
        other.scheduler = copy.deepcopy(bound.scheduler)
        rules = {"threshold": float("inf"), "retention_ratio": 0.4, "num_inference_steps": 10}
        apply_dicache(bound, DiCacheConfig(**rules))

        def abort(pipe: Any, index: int, *_: Any) -> Any:
            if index == aborted_after:
                raise KeyError(index)
            return {}

        if is_aborted:
            with pytest.raises(KeyError):
                run(family, bound, num_steps=10, seed=1, callback_on_step_end=abort)
        answers.append(run(family, other, num_steps=10))
        assert mask(get_stats(bound)["transformer"].contexts["cond"])[-1] == "C"
    assert torch.equal(*answers)


def test_after_another_pipeline_with_its_own_scheduler_ours_is_read_again():
    """Its timesteps are those of the run before, in another tensor."""
    bound = pipeline("flux")
    other = pipeline("flux", transformer=bound.transformer)
    other.scheduler = copy.deepcopy(bound.scheduler)
    apply_dicache(bound, DiCacheConfig(threshold=float("inf"), retention_ratio=0))
    for pipe, expected in ((bound, "CRRRRC"), (other, None), (bound, "CRRRRC")):
        with warnings.catch_warnings():
            if expected is not None:
                warnings.simplefilter("error", DiCacheWarning)
            else:
                warnings.simplefilter("ignore")
            run("flux", pipe, num_steps=6)
        if expected is not None:
            assert schedule(bound, "cond") == expected


def test_the_first_timestep_in_thousandths_is_not_taken_for_the_last():
    timesteps = [1000.0, 500.0, 1.0]
    assert _index_of(1.0, timesteps) == 0  # t / 1000
    assert _index_of(500.0, timesteps) == 1
    assert _index_of(0.77, timesteps) == 0
    assert _index_of(None, timesteps) == 0


def test_a_block_in_two_places_is_refused_and_the_model_left_alone():
    model = build("wan")
    model.blocks[2] = model.blocks[1]
    with pytest.raises(ValueError, match="several places"):
        apply_dicache(model, ALWAYS)
    model(**calls("wan", 1)[0])


def test_a_cached_model_is_not_copied():
    model = build("flux")
    apply_dicache(model, ALWAYS)
    model(**calls("flux", 1)[0])
    with pytest.raises(TypeError, match="remove_dicache"):
        copy.deepcopy(model)
    remove_dicache(model)
    copy.deepcopy(model)


def test_one_transformer_under_two_names_is_cached_once():
    pipe = pipeline("wan")
    pipe.register_modules(transformer_2=pipe.transformer)
    apply_dicache(pipe, ALWAYS)
    assert list(get_stats(pipe)) == ["transformer"]
    remove_dicache(pipe)
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("index", [0, -1])
def test_replaced_blocks_are_computed_with_a_warning(index):
    model, plain = build("wan"), build("wan")
    apply_dicache(model, ALWAYS)
    model.blocks[index] = build("wan", seed=1).blocks[index]
    plain.blocks[index] = build("wan", seed=1).blocks[index]
    with pytest.warns(DiCacheWarning, match="replaced"):
        for inputs in calls("wan", 4):
            assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
