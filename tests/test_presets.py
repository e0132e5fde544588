"""The presets reproduce the published rules: same actions, same outputs.

The rules are written down here a second time, as a plain loop over lists in fp64 that keeps every
tensor it ever saw, and run beside the session on the same synthetic steps.
"""

import math

import pytest
import torch

from dicache import DiCacheConfig, DiCacheSession

# error, threshold, reuse at the threshold, retained steps of N, last step computed, gamma's clip
RULES = {
    "flux": ("delta_y", 0.4, False, lambda n: math.floor(0.2 * n) + 1, True, (1.0, 1.5)),
    "flux-delta-minus": ("delta_minus", 0.08, False, lambda n: 1, True, (1.0, 1.5)),
    "hunyuan-video": ("delta_y", 0.1, True, lambda n: math.floor(0.2 * n), False, (1.0, 1.5)),
    "wan2.1": ("delta_y", 0.08, False, lambda n: math.floor(0.2 * n + 0.5), False, (1.0, 2.0)),
}


def synthetic_run(steps, batch=1, seed=0):
    """x, p, y of a made-up model whose inputs move slowly, then faster."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, batch, 6, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    for step in range(steps):
        phase = (step / steps) ** 1.5 * 2.0
        x = math.cos(phase) * first + math.sin(phase) * second
        p = x + 0.5 * torch.tanh(x @ weight)
        yield x, p, p + torch.tanh(p @ weight.T) * (1 + phase)


def published_run(rule, run):
    """Actions and outputs by the published rule."""
    error_kind, threshold, at_threshold, retained, computes_last, (low, high) = RULES[rule]
    mean = lambda value: value.abs().mean().item()  # noqa: E731
    actions, outputs, window, accumulated = [], [], [], 0.0
    for step, (x, p, y) in enumerate(run):
        action = "compute"
        forced = step < retained(len(run)) or (computes_last and step == len(run) - 1)
        if not forced and window:
            x_prev, p_prev, _ = run[step - 1]
            error = mean(p - p_prev) / mean(p_prev)
            if error_kind == "delta_minus":
                error = abs(error - mean(x - x_prev) / mean(x_prev))
            accumulated += error
            reuse = accumulated < threshold or (at_threshold and accumulated == threshold)
            action = "reuse" if reuse else "resume"
        if action == "reuse":
            (r_old, q_old), (r_new, q_new) = window[-2:] if len(window) > 1 else window * 2
            gamma = 1.0
            if len(window) > 1:
                gamma = min(max(mean(p - x - q_old) / mean(q_new - q_old), low), high)
            y = x + r_old + gamma * (r_new - r_old)
        else:
            window.append((y - x, p - x))
            accumulated = 0.0
        actions.append(action)
        outputs.append(y)
    return actions, outputs


def session_run(config, run):
    session = DiCacheSession(config)
    actions, outputs = [], []
    for index, (x, p, y) in enumerate(run):
        with session.step("cond", timestep=-index, num_inference_steps=len(run)) as step:
            if step.needs_probe:
                step.probe(x, p)
            if step.action == "reuse":
                y = step.reuse(x)
            else:
                step.record(x, p, y)
        actions.append(step.action)
        outputs.append(y)
    assert [record.action for record in session.stats.contexts["cond"]] == actions
    return actions, outputs


@pytest.mark.parametrize("steps", [4, 13, 30, 50])
@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_preset_takes_the_published_decisions_and_gives_their_outputs(preset, steps, scale):
    run = list(synthetic_run(steps))
    threshold = RULES[preset][1] * scale
    rule = (RULES[preset][0], threshold, *RULES[preset][2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, preset, rule)
        actions, outputs = published_run(preset, run)
    got_actions, got_outputs = session_run(DiCacheConfig.preset(preset, threshold=threshold), run)
    assert got_actions == actions
    for got, expected in zip(got_outputs, outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_these_runs_exercise_every_action():
    seen = {preset: set() for preset in RULES}
    for preset in RULES:
        for steps in (13, 30, 50):
            seen[preset].update(published_run(preset, list(synthetic_run(steps)))[0])
    assert all(actions == {"compute", "resume", "reuse"} for actions in seen.values())


def test_a_preset_has_the_published_fields():
    for preset, (error, threshold, at_threshold, _, last, clip) in RULES.items():
        config = DiCacheConfig.preset(preset)
        assert config.error == error
        assert config.threshold == threshold
        assert config.reuse_at_threshold == at_threshold
        assert config.compute_last_step == last
        assert config.gamma_range == clip
        assert (config.alignment, config.probe_depth) == ("l1", 1)
        assert (config.schedule, config.max_consecutive_reuse) == (None, None)
