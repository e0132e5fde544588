"""ControlNet residuals, which models add between blocks, count once on every kind of step.

The expected values come from an un-cached twin that gets the same residuals: x is what enters
block 0, y what leaves the last block; the last block's own control residual is added by the model
behind y, on computed and reused steps alike.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch
from tiny_models import FAMILIES, build, calls, run_model
from twin import Twin, assert_close, expected_run

from dicache import DiCacheConfig, apply_dicache, get_stats

# How many residuals the model gets for its two stacks, or its one, of blocks. Fewer residuals than
# blocks are spread over them; Chroma adds its single-stream residuals in place.
CONTROLS: dict[str, list[dict[str, int]]] = {
    "flux": [{"block": 2, "single_block": 2}, {"block": 1}, {"single_block": 2}],
    "chroma": [{"block": 2, "single_block": 2}, {"block": 1}, {"single_block": 2}],
    "qwen-image": [{"block": 4}, {"block": 2}],
    "bria": [{"block": 2}, {"block": 1}],
    "cosmos": [{"hidden_states": 2}],
    "sana": [{"block": 2}],
    "sd3": [{"hidden_states": 4}, {"hidden_states": 2}],
    "z-image": [{"block": 4}, {"block": 2}],
    "wan-vace": [{}],  # its calls bring what its own blocks make residuals of
}
CASES = [(name, counts) for name, cases in CONTROLS.items() for counts in cases]
WIDTH = 24
TOKENS = {"z-image": 32 + 32, "cosmos": 32}  # picture and text, filled up to 32 each; 2 frames
NAMES = {
    "block": "controlnet_block_samples",
    "single_block": "controlnet_single_block_samples",
    "hidden_states": "block_controlnet_hidden_states",
}


def controlled_calls(name: str, counts: dict[str, int], num_steps: int) -> list[dict[str, Any]]:
    """Residuals that differ a little from step to step, as a ControlNet's do."""
    generator = torch.Generator().manual_seed(7)
    steps = calls(name, num_steps)
    for kind, count in counts.items():
        first, way = torch.randn(2, count, 2, TOKENS.get(name, 16), WIDTH, generator=generator)
        for index, inputs in enumerate(steps):
            added = [*(first + 0.1 * index * way)]
            is_by_place = name == "z-image"  # of every other block, where there are but two
            places = range(0, 4, 4 // count)
            inputs[NAMES[kind]] = dict(zip(places, added, strict=True)) if is_by_place else added
    return steps


# They take residuals that no case is written for: HunyuanDiT's go to its skips, and it empties the
# list that it is given.
NO_CASE = ("hunyuan-dit",)


@pytest.mark.rules_out("control")
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in CONTROLS and n not in NO_CASE])
def test_a_model_without_a_case_takes_no_residuals(name):
    """One that does needs a case in `CONTROLS`."""
    forward = getattr(diffusers, FAMILIES[name].model_class).forward
    assert not [each for each in inspect.signature(forward).parameters if "control" in each]


@pytest.mark.backs("control")
@pytest.mark.parametrize("probe_depth", (1, 3))
@pytest.mark.parametrize(("name", "counts"), CASES)
def test_reused_steps_count_control_residuals_once(name, counts, probe_depth):
    mask = "CCRRCR"
    rules = DiCacheConfig(schedule=mask, probe_depth=probe_depth)
    steps = controlled_calls(name, counts, len(mask))
    twin = Twin(name, build(name), probe_depth)
    expected = expected_run(twin, steps, mask, rules.alignment, rules.gamma_range)
    model = build(name)
    apply_dicache(model, rules)
    for inputs, step in zip(steps, expected, strict=True):
        assert_close(run_model(model, inputs), step.output)
    assert get_stats(model).num_reused == 3


@pytest.mark.parametrize(("name", "counts"), CASES)
def test_resumed_steps_equal_no_cache_bit_by_bit(name, counts):
    model = build(name)
    steps = controlled_calls(name, counts, 4)
    plain = [run_model(model, inputs) for inputs in steps]
    apply_dicache(model, DiCacheConfig(threshold=0, retention_ratio=0, compute_last_step=False))
    for inputs, expected in zip(steps, plain, strict=True):
        assert torch.equal(run_model(model, inputs), expected)
    assert get_stats(model).num_resumed == 3


def test_gradients_of_what_is_added_reach_it_though_the_model_is_frozen():
    """As truncated back-propagation wants them: the first steps record none."""
    gradients = []
    for is_cached in (False, True):
        model = build("flux").requires_grad_(False)
        if is_cached:
            apply_dicache(model, DiCacheConfig(threshold=float("inf"), retention_ratio=0))
        steps = controlled_calls("flux", {"block": 2}, 5)
        for index, inputs in enumerate(steps):
            added = inputs["controlnet_block_samples"] = [
                each.clone().requires_grad_() for each in inputs["controlnet_block_samples"]
            ]
            with torch.set_grad_enabled(index >= 3), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = model(**inputs)[0].square().sum()
            if index >= 3:
                loss.backward()
                gradients.append(added[0].grad)
    assert all(each is not None and each.any() for each in gradients)
    assert all(torch.equal(*pair) for pair in zip(gradients[:2], gradients[2:], strict=True))


def test_control_residuals_of_this_step_reach_the_head_on_a_reused_step():
    """The last block's residual is not part of the cache: a new one shows at once."""
    model, steps = build("flux"), controlled_calls("flux", {"single_block": 2}, 3)
    outputs = []
    for factor in (1, 3):
        steps[2]["controlnet_single_block_samples"] = [
            factor * sample for sample in steps[2]["controlnet_single_block_samples"]
        ]
        apply_dicache(model, DiCacheConfig(schedule="CCR"))
        outputs.append([run_model(model, inputs) for inputs in steps][-1])
        model.disable_cache()
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
