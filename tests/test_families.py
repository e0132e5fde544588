"""Every supported model family: the cache computes what its formulas say, and nothing else.

Each test runs on a tiny model of each family. The expected values come from an un-cached twin and
formulas written down a second time in `twin.py`.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch
from helpers import masks
from tiny_models import FAMILIES, blocks, branches, build, calls, run_model
from torch import Tensor, nn
from twin import Twin, assert_close, expected_run

from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache
from dicache.driver.families import supported_families

ALL = tuple(FAMILIES)
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "least-squares-delta-y": {"error": "delta_y", "gamma_range": (0.5, 0.9)},
    "l1-delta-y": {"error": "delta_y", "alignment": "l1"},
    "l1-delta-minus": {"error": "delta_minus", "alignment": "l1", "gamma_range": (1.0, 1.5)},
}
NEVER = {"threshold": 0, "retention_ratio": 0, "compute_last_step": False}
EVERY_SECOND = {**NEVER, "threshold": float("inf"), "max_consecutive_reuse": 1}

OF_DIFFUSERS = [each for each in supported_families() if each.module == "diffusers"]


def run(model: nn.Module, steps: list[dict[str, Any]]) -> list[Tensor]:
    return [run_model(model, inputs) for inputs in steps]


def check_schedule(name: str, mask: str, probe_depth: int = 1, **config: Any) -> None:
    """The cached model returns, on every step, what the twin's formula gives."""
    rules = DiCacheConfig(probe_depth=probe_depth, **{"schedule": mask, **config})
    model, steps = build(name), calls(name, len(mask))
    twin = Twin(name, build(name), probe_depth)
    expected = expected_run(twin, steps, mask, rules.alignment, rules.gamma_range)
    apply_dicache(model, rules)
    for output, step in zip(run(model, steps), expected, strict=True):
        assert_close(output, step.output)
    records = get_stats(model).contexts["branch0"]
    for record, step in zip(records, expected, strict=True):
        reused = step.gamma is not None
        assert (record.action == "reuse") == reused
        assert record.gamma == (pytest.approx(step.gamma, rel=1e-4) if reused else None)


def test_every_registered_family_is_tested():
    """Those of original code are in tests/test_original.py."""
    assert {family.model_class for family in OF_DIFFUSERS} <= {
        family.model_class for family in FAMILIES.values()
    }


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ALL)
def test_a_run_without_reuse_equals_no_cache_bit_by_bit(name, rules):
    model, steps = build(name), calls(name)
    plain = run(model, steps)
    apply_dicache(model, DiCacheConfig(**{**NEVER, **RULES[rules]}))
    for output, expected in zip(run(model, steps), plain, strict=True):
        assert torch.equal(output, expected)
    stats = get_stats(model)
    assert (stats.num_computed, stats.num_resumed, stats.num_reused) == (1, 5, 0)
    assert stats.block_calls == len(steps) * len(blocks(name, model))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ALL)
def test_a_reused_step_equals_the_formula(name, rules):
    check_schedule(name, "CCRRCR", **RULES[rules])


@pytest.mark.parametrize("name", ALL)
def test_one_window_entry_adds_the_newest_residual(name):
    check_schedule(name, "CR")


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ALL)
def test_a_resumed_step_is_recorded_like_a_computed_one(name, rules):
    check_schedule(name, "CRCRCR", schedule=None, **{**EVERY_SECOND, **RULES[rules]})


# Depth 3 of four blocks: in families with two stacks the probe ends behind the seam.
@pytest.mark.parametrize("depth", (2, 3))
@pytest.mark.parametrize("name", ALL)
def test_the_probe_may_be_deeper(name, depth):
    check_schedule(name, "CCRRCR", probe_depth=depth)
    model = build(name)
    apply_dicache(model, DiCacheConfig(probe_depth=depth, schedule="CCRR"))
    run(model, calls(name, 4))
    assert get_stats(model).block_calls == 2 * 4 + 2 * depth


@pytest.mark.parametrize("name", ALL)
def test_the_window_and_the_probe_are_all_that_is_held(name):
    for rules, tensors in (("default", 4), ("l1-delta-y", 5), ("l1-delta-minus", 6)):
        model = build(name)
        apply_dicache(model, DiCacheConfig(schedule="CCR", **RULES[rules]))
        run(model, calls(name, 3))
        assert get_stats(model).cache_tensors == tensors


@pytest.mark.parametrize("name", ALL)
def test_remove_restores_the_model(name):
    model, steps = build(name), calls(name)
    plain = run(model, steps)
    before = describe(model)
    apply_dicache(model, DiCacheConfig(schedule="CCRRRR"))
    run(model, steps)
    remove_dicache(model)
    assert describe(model) == before
    for copied in (model, copy.deepcopy(model)):
        for output, expected in zip(run(copied, steps), plain, strict=True):
            assert torch.equal(output, expected)


@pytest.mark.parametrize("name", ALL)
def test_branches_of_guidance_on_a_bare_transformer(name):
    """Nobody names them there, so that only their prompts tell them apart."""
    mask, runs = "CCRRCR", branches(name, 6)
    model, twin = build(name), Twin(name, build(name))
    apply_dicache(model, DiCacheConfig(schedule=mask))
    outputs: list[list[Tensor]] = [[], []]
    for pair in zip(*runs, strict=True):
        for made, inputs in zip(outputs, pair, strict=True):
            made.append(run_model(model, inputs))
    assert masks(model, resumed="C") == {"branch0": mask, "branch1": mask}
    rules = DiCacheConfig()
    for made, steps in zip(outputs, runs, strict=True):
        expected = expected_run(twin, steps, mask, rules.alignment, rules.gamma_range)
        for output, step in zip(made, expected, strict=True):
            assert_close(output, step.output)


@pytest.mark.parametrize("name", ALL)
def test_a_second_run_on_a_bare_transformer_equals_a_first_one(name):
    used, fresh = build(name), build(name)
    for model in (used, fresh):
        apply_dicache(model, DiCacheConfig(**EVERY_SECOND))
    run(used, calls(name, seed=3))
    for output, expected in zip(run(used, calls(name)), run(fresh, calls(name)), strict=True):
        assert torch.equal(output, expected)
    assert get_stats(used) == get_stats(fresh)


# What diffusers' models call that which they add or change behind their first block.
BEHIND = ("control", "skip_layers", "attention_kwargs", "residual", "face", "kv_cache_mode")


@pytest.mark.parametrize("family", OF_DIFFUSERS, ids=lambda family: family.name)
def test_what_is_added_behind_the_probe_is_named_in_the_row(family):
    forward = getattr(diffusers, family.model_class).forward
    arguments = inspect.signature(forward).parameters
    added = {name for name in arguments if any(word in name for word in BEHIND)}
    assert added <= set(family.behind_probe)
    assert family.timestep in arguments and family.text in arguments


@pytest.mark.parametrize(
    "change",
    [
        {"spatio_temporal_guidance_blocks": [2]},
        {"spatio_temporal_guidance_blocks": [2], "perturbation_mask": torch.tensor([0.0, 1.0])},
        {"isolate_modalities": True},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_ltx_2_changes_behind_the_probe_begins_the_trajectory_anew(change):
    model, steps = build("ltx2", perturbed_attn=True), calls("ltx2", 9)
    rules = {**NEVER, "threshold": float("inf"), "num_inference_steps": 9}
    if "perturbation_mask" in change:
        steps = [{**inputs, "spatio_temporal_guidance_blocks": [2]} for inputs in steps]
    apply_dicache(model, DiCacheConfig(**rules))
    for inputs in (*steps[:5], *({**inputs, **change} for inputs in steps[5:])):
        model(**inputs)
    assert masks(model, resumed="C") == {"branch0": "CRRRRCCRR"}


def describe(model: nn.Module) -> dict[str, Any]:
    """The module tree as a user can see it: modules, hooks of any kind, and which code runs."""
    return {
        name: (
            type(module),
            getattr(module.forward, "__func__", None),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            list(getattr(getattr(module, "_diffusers_hook", None), "hooks", ())),
            getattr(module, "_cache_config", None),
        )
        for name, module in model.named_modules()
    }
