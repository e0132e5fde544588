"""Putting the cache on models and taking it off: errors, warnings, diffusers' own switches.

Whatever is refused leaves the model unchanged, and whatever the cache cannot judge is computed.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny_models import build, calls
from tiny_pipelines import pipeline, run
from torch import Tensor, nn

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    RunStats,
    apply_dicache,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from dicache.adapters.diffusers.attach import sessions

ALWAYS = DiCacheConfig(threshold=float("inf"), retention_ratio=0, compute_last_step=False)
FIRST_BLOCK = FirstBlockCacheConfig(threshold=10.0)


def outputs(model: nn.Module, steps: list[dict[str, Any]]) -> list[Tensor]:
    return [model(**inputs)[0] for inputs in steps]


def actions(model: nn.Module, context: str = "branch0") -> list[str]:
    return [step.action for step in get_stats(model).contexts[context]]


def test_applying_twice_is_refused_and_keeps_the_first():
    model = build("flux")
    apply_dicache(model, ALWAYS)
    # The words that diffusers' own tests of caches look for, too.
    twice = pytest.raises(ValueError, match="Caching has already been enabled.*DiCache.*remove_dic")
    with twice:
        apply_dicache(model, DiCacheConfig())
    with twice:
        apply_dicache(pipeline("flux", transformer=model))
    with twice:
        model.enable_cache(ALWAYS)
    outputs(model, calls("flux", 3))
    assert actions(model) == ["compute", "reuse", "reuse"]


def test_no_cache_stacks_on_another():
    model = build("flux")
    model.enable_cache(FIRST_BLOCK)
    for apply in (apply_dicache, lambda model: model.enable_cache(ALWAYS)):
        with pytest.raises(ValueError, match="FirstBlockCacheConfig.*disable_cache"):
            apply(model)
    model.disable_cache()
    apply_dicache(model, ALWAYS)
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(FIRST_BLOCK)
    outputs(model, calls("flux", 2))
    assert actions(model) == ["compute", "reuse"]


def test_a_refused_pipeline_keeps_all_its_transformers_free():
    pipe = pipeline("wan", transformer_2=build("wan", seed=1), boundary_ratio=0.5)
    apply_dicache(pipe.transformer_2)
    with pytest.raises(ValueError):
        apply_dicache(pipe)
    assert not pipe.transformer.is_cache_enabled


def test_an_unsupported_model_is_named():
    with pytest.raises(ValueError, match=r"Linear.*FluxTransformer2DModel"):
        apply_dicache(nn.Linear(2, 2))


def test_a_probe_as_deep_as_the_model_is_refused():
    with pytest.raises(ValueError, match="probe_depth is 4.*4 blocks"):
        apply_dicache(build("wan"), DiCacheConfig(probe_depth=4))


def test_a_foreign_configuration_is_refused():
    with pytest.raises(TypeError, match="FirstBlockCacheConfig"):
        apply_dicache(build("wan"), FIRST_BLOCK)


@pytest.mark.parametrize("make", (lambda: build("flux"), lambda: pipeline("flux")))
def test_without_a_cache_removing_warns_and_asking_raises(make):
    model = make()
    with pytest.warns(DiCacheWarning, match="no DiCache"):
        remove_dicache(model)
    for ask in (get_stats, reset_dicache):
        with pytest.raises(ValueError, match="apply_dicache first"):
            ask(model)


def test_stats_of_a_pipeline_come_by_component():
    pipe = pipeline("flux")
    apply_dicache(pipe)
    stats = get_stats(pipe)
    assert isinstance(stats, dict) and list(stats) == ["transformer"]
    assert isinstance(get_stats(pipe.transformer), RunStats)
    assert stats["transformer"] is get_stats(pipe.transformer)


def test_diffusers_own_switches_serve_both_kinds_of_cache():
    model, steps = build("flux"), calls("flux", 4)
    plain = outputs(model, steps)
    for config in (ALWAYS, FIRST_BLOCK, ALWAYS):
        model.enable_cache(config)
        assert model.is_cache_enabled
        with model.cache_context("cond"):
            cached = outputs(model, steps)
        assert not torch.equal(cached[-1], plain[-1])
        if config is ALWAYS:
            assert actions(model, "cond") == ["compute", "reuse", "reuse", "reuse"]
        model.disable_cache()
        assert not model.is_cache_enabled
    for output, expected in zip(outputs(model, steps), plain, strict=True):
        assert torch.equal(output, expected)


def test_a_pipeline_that_ran_before_takes_the_cache():
    """diffusers remembers which modules carry hooks; ours have to be found after that."""
    pipe = pipeline("flux")
    run("flux", pipe)
    apply_dicache(pipe, ALWAYS)
    run("flux", pipe)
    assert list(get_stats(pipe)["transformer"].contexts) == ["cond"]


SCRIPTS = {
    "dicache needs neither diffusers nor Triton": (
        "import sys, dicache; print(not {'diffusers', 'triton'} & set(sys.modules))"
    ),
    "dicache first": (
        "import dicache; from diffusers.models.cache_utils import CacheMixin as Mixin; "
        "print('__wrapped__' in vars(Mixin.enable_cache))"
    ),
    "dicache first, the module looked up before": (
        "import dicache, importlib.util; importlib.util.find_spec('diffusers.models.cache_utils'); "
        "from diffusers.models.cache_utils import CacheMixin as Mixin; "
        "print('__wrapped__' in vars(Mixin.enable_cache))"
    ),
    "diffusers first": (
        "from diffusers.models.cache_utils import CacheMixin as Mixin; import dicache; "
        "print('__wrapped__' in vars(Mixin.enable_cache))"
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_import_order(script):
    command = [sys.executable, "-c", SCRIPTS[script]]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("config", "entry", "expected"),
    [
        (DiCacheConfig(), None, 0.07),  # the family's, on the scale of the alignment errors
        (DiCacheConfig(), 0.03, 0.03),  # the model's own
        (DiCacheConfig(error="delta_y", alignment="l1"), 0.03, 0.4),  # the published one
        (DiCacheConfig.preset("flux"), 0.03, 0.4),
        (DiCacheConfig(threshold=0.5), 0.03, 0.5),
    ],
)
def test_a_threshold_of_none_is_the_models_or_the_familys(config, entry, expected):
    model = build("flux")
    if entry is not None:
        model.register_to_config(_dicache_threshold=entry)
    apply_dicache(model, config)
    assert sessions(model)["transformer"].config.threshold == expected


def test_an_unknown_number_of_steps_computes_and_warns_once():
    model = build("flux")
    apply_dicache(model, DiCacheConfig(threshold=float("inf")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs(model, calls("flux", 5))
    told = [warning for warning in caught if issubclass(warning.category, DiCacheWarning)]
    assert len(told) == 1 and "num_inference_steps" in str(told[0].message)
    assert actions(model) == ["compute"] * 5


def test_a_given_number_of_steps_is_enough_for_a_transformer():
    model = build("flux")
    apply_dicache(
        model, DiCacheConfig(threshold=float("inf"), retention_ratio=0.4, num_inference_steps=5)
    )
    for _ in range(2):  # the second run is noticed by its timesteps and its length
        outputs(model, calls("flux", 5))
        assert actions(model) == ["compute", "compute", "reuse", "reuse", "compute"]


def test_text_embeddings_that_change_are_computed_with_a_warning():
    model = build("flux")
    apply_dicache(model, ALWAYS)
    with pytest.warns(DiCacheWarning, match="cache_context"):
        for inputs in calls("flux", 4):
            model(**{**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()})
    assert get_stats(model).num_computed == 4


@pytest.mark.parametrize("block", (0, 3))  # NaN in the probe, and only behind it
@pytest.mark.parametrize("rules", ("default", "l1"))
def test_nan_in_one_step_is_computed_and_forgotten(block, rules):
    config = {"threshold": float("inf"), "retention_ratio": 0, "compute_last_step": False}
    if rules == "l1":
        config |= {"error": "delta_minus", "alignment": "l1"}
    model, steps = build("flux"), calls("flux", 7)
    plain = outputs(model, steps)
    apply_dicache(model, DiCacheConfig(**config, max_consecutive_reuse=1))
    poison(model, block, on_call=3 if block == 0 else 2)  # counts the block's own calls
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disturbed = outputs(model, steps)
    assert len([each for each in caught if issubclass(each.category, DiCacheWarning)]) == 1
    broken = [not output.isfinite().all() for output in disturbed]
    assert sum(broken) == 1, "NaN stays in the step where it arose"
    # The next step finds NaN in the window, drops it and is recorded as the only entry.
    assert actions(model)[broken.index(True) :][:3] == ["resume", "resume", "reuse"]
    clean = outputs(model, steps)  # the next run
    assert all(output.isfinite().all() for output in clean)
    assert torch.equal(clean[0], plain[0])
    assert actions(model)[:3] == ["compute", "reuse", "resume"]


def poison(model: nn.Module, block: int, on_call: int) -> None:
    """Let one call of a block return NaN in its image tokens."""
    count = 0
    target = [*model.transformer_blocks, *model.single_transformer_blocks][block]
    inner = target.attn

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        if count != on_call:
            return output
        parts = output if isinstance(output, tuple) else (output,)
        spoiled = tuple(part * float("nan") for part in parts)
        return spoiled if isinstance(output, tuple) else spoiled[0]

    inner.register_forward_hook(hook)


@pytest.mark.parametrize("name", ("flux", "hunyuan-video", "wan", "chroma"))
def test_half_precision_models_reuse_in_their_own_dtype(name):
    model, steps = build(name).to(torch.bfloat16), calls(name)
    for inputs in steps:
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "timestep":
                inputs[key] = value.bfloat16()
    text_embedding = steps[0]["encoder_hidden_states"]
    for inputs in steps:
        inputs["encoder_hidden_states"] = text_embedding
    plain = outputs(model, steps)
    apply_dicache(model, DiCacheConfig(schedule="CCRRCR"))
    cached = outputs(model, steps)
    for letter, output, expected in zip("CCRRCR", cached, plain, strict=True):
        assert output.dtype == torch.bfloat16
        if letter == "C":
            assert torch.equal(output, expected)
        assert output.isfinite().all()
    assert get_stats(model).num_reused == 3
