"""Two caches on one transformer: whichever comes second is refused, and nothing is half put on."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks import HookRegistry, ModelHook
from helpers import masks
from tiny_models import build, calls
from tiny_pipelines import pipeline, run
from torch import nn

from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache

Apply = Callable[[Any], None]
RULES = DiCacheConfig(schedule="CCRRCR")


def _now() -> int:
    return 500


def _function(name: str, **options: Any) -> Apply:
    config = getattr(hooks, f"{name}Config")(**options)
    words = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    apply = getattr(hooks, f"apply{words.replace('_taylor_seer', '_taylorseer')}")
    return lambda model: apply(model, config)


FUNCTIONS: dict[str, Apply] = {
    "first_block_cache": _function("FirstBlockCache", threshold=0.1),
    "mag_cache": _function("MagCache", mag_ratios=[1.0] * 6, num_inference_steps=6),
    "taylorseer_cache": _function("TaylorSeerCache"),
    "sea_cache": _function("SeaCache"),
    "pyramid_attention_broadcast": _function(
        "PyramidAttentionBroadcast",
        spatial_attention_block_skip_range=2,
        current_timestep_callback=_now,
    ),
    "faster_cache": _function(
        "FasterCache", current_timestep_callback=_now, is_guidance_distilled=True
    ),
}


def hooks_on(model: nn.Module) -> list[str]:
    """Every hook of diffusers' on a model's modules."""
    registries = [getattr(each, "_diffusers_hook", None) for each in model.modules()]
    return [
        name
        for each in registries
        if isinstance(each, HookRegistry)
        for name in each.hooks
        if name != "dicache"
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_diffusers_after_ours_is_refused(name: str) -> None:
    model, plain = build("flux"), build("flux")
    apply_dicache(model, RULES)
    steps = calls("flux", 6)
    for inputs in steps[:3]:
        model(**inputs)
    with pytest.raises(ValueError, match=f"DiCache, so {name} is refused.*remove_dicache"):
        FUNCTIONS[name](model)
    assert not [each for each in hooks_on(model) if name.partition("_")[0] in each]
    for inputs in steps[3:]:
        model(**inputs)
    assert masks(model) == {"branch0": "CCRRCR"}
    remove_dicache(model)
    for inputs in steps:
        assert torch.equal(model(**inputs)[0], plain(**inputs)[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ours_after_a_function_of_diffusers_is_refused(name: str) -> None:
    model = build("flux")
    FUNCTIONS[name](model)
    before = hooks_on(model)
    with pytest.raises(ValueError, match=f"already been enabled.*{name}"):
        apply_dicache(model, RULES)
    assert hooks_on(model) == before
    assert not hasattr(model, "_cache_config") or model._cache_config is None


def test_a_pipelines_run_has_no_second_cache() -> None:
    pipe = pipeline("flux")
    apply_dicache(pipe, DiCacheConfig(threshold=0))
    with pytest.raises(ValueError, match="DiCache"):
        FUNCTIONS["first_block_cache"](pipe.transformer)
    assert torch.equal(run("flux", pipe, 6), run("flux", pipeline("flux"), 6))


def test_other_models_and_other_hooks_are_none_of_our_business() -> None:
    cached, other = build("flux"), build("flux")
    apply_dicache(cached, RULES)
    FUNCTIONS["first_block_cache"](other)  # on another model

    class Passes(ModelHook):
        calls = 0

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.fn_ref.original_forward(*args, **kwargs)

    hook = Passes()
    registry = HookRegistry.check_if_exists_or_initialize(cached.transformer_blocks[0])
    registry.register_hook(hook, "passes")
    for inputs in calls("flux", 6):
        cached(**inputs)
    assert hook.calls == 6 and masks(cached) == {"branch0": "CCRRCR"}


def test_after_removal_another_cache_may_come() -> None:
    model = build("flux")
    for _ in range(2):
        apply_dicache(model, RULES)
        remove_dicache(model)
    FUNCTIONS["first_block_cache"](model)
    assert hooks_on(model)


# --- other packages: they replace `forward`, and mark the model ----------------------------------


def put_on(model: nn.Module) -> None:
    """As cache-dit and ParaAttention do."""
    module = types.ModuleType("some_cache.adapters")
    exec("def forward(self, *args, **kwargs):\n    return self._old(*args, **kwargs)", vars(module))
    module.forward.__module__ = "some_cache.adapters"
    sys.modules[module.__name__] = module
    model._old = model.forward
    model.forward = types.MethodType(module.forward, model)  # type: ignore[method-assign]
    model._is_cached = True


def take_off(model: nn.Module) -> None:
    del model._is_cached, model._old
    vars(model).pop("forward", None)


def test_ours_after_another_packages_is_refused() -> None:
    model, plain = build("flux"), build("flux")
    put_on(model)
    with pytest.raises(ValueError, match="with a cache of some_cache, and two caches do not stack"):
        apply_dicache(model, RULES)
    take_off(model)
    apply_dicache(model, RULES)
    (inputs, *_) = calls("flux", 2)
    assert torch.equal(model(**inputs)[0], plain(**inputs)[0])


@pytest.mark.parametrize("num_calls", [0, 3])
def test_another_packages_after_ours_is_refused_in_the_next_call(num_calls: int) -> None:
    model = build("flux")
    apply_dicache(model, RULES)
    steps = calls("flux", 6)
    for inputs in steps[:num_calls]:
        model(**inputs)
    put_on(model)
    with pytest.raises(ValueError, match="a cache of some_cache"):
        model(**steps[num_calls])
    remove_dicache(model)
    assert torch.equal(model(**steps[0])[0], build("flux")(**steps[0])[0])  # theirs stays


def test_a_mark_that_says_no_is_no_cache() -> None:
    model = build("flux")
    model._is_cached = False
    apply_dicache(model, RULES)
    model(**calls("flux", 2)[0])
    assert get_stats(model).num_computed == 1
