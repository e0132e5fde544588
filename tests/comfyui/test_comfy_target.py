"""`target_speedup` in the real ComfyUI: a run is recorded, and those of its kind have its plan."""

import logging

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_twin import Twin
from test_comfy_runs import cache_of, close, masks
from tiny_comfy import CONFIGS, latent, make_model, prompt, sample
from trained_comfy import SIDE, picture, trained_flux, trained_prompt

from dicache.adapters.comfyui.attach import apply, config_for
from dicache.adapters.comfyui.target import MOST_KINDS

STEPS = 12
MODELS = {"flux": (7, 2.0), "hunyuan_video": (7, 2.0), "wan": (6, 1.95), "sd3": (4, 2.0)}
LISTS = ("double_blocks", "single_blocks", "blocks", "joint_blocks")


def targeted(model, target=2.0):
    return apply(model, config_for("default", 0.0, target))


class Blocks:
    """Counts the calls of a model's blocks, by torch's own hooks."""

    def __init__(self, model):
        lists = [getattr(model.model.diffusion_model, name, ()) for name in LISTS]
        self.count = 0
        for block in (block for each in lists for block in each):
            block.register_forward_hook(self._note)

    def _note(self, *args):
        self.count += 1

    def of(self, run):
        self.count = 0
        run()
        return self.count


def is_computed(model) -> bool:
    return all({*mask} == {"C"} for mask in masks(model).values())


def is_planned(model) -> bool:
    (stats,) = cache_of(model).last
    reused = [each for each in stats.records() if each.action == "reuse"]
    return bool(stats.planned) and bool(reused) and all(each.weights for each in reused)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_run_is_the_plain_one_and_the_next_meets_the_target(name, cfg):
    num_blocks, target = MODELS[name]
    model = make_model(name)
    cached, blocks = targeted(model, target), Blocks(model)
    plain = sample(model, name, cfg=cfg)
    assert torch.equal(sample(cached, name, cfg=cfg), plain) and is_computed(cached)
    new = {"noise_seed": 8, "positive": prompt(5, name), "negative": prompt(6, name)}
    work = blocks.of(lambda: sample(cached, name, cfg=cfg, **new))
    assert STEPS * num_blocks / work == pytest.approx(target, rel=0.05)
    assert is_planned(cached) and cache_of(cached).last[0].num_vetoes == 0
    first = masks(cached)
    sample(cached, name, cfg=cfg, noise_seed=9, positive=prompt(7, name))
    assert masks(cached) == first, "whatever ids a prompt's conditions have"


@pytest.mark.parametrize("name", ["flux", "wan", "hunyuan_video"])
def test_a_planned_step_is_the_formula_of_three_steps(name):
    model = make_model(name)
    cached = targeted(model)
    sample(cached, name, cfg=3.0)
    actual = sample(cached, name, cfg=3.0, noise_seed=8)
    ((branch, mask),) = masks(cached).items()
    weights = [each.weights for each in cache_of(cached).last[0].contexts[branch]]
    with Twin(model, name, mask, weights=weights).on():
        expected = sample(model, name, cfg=3.0, noise_seed=8)
    assert close(actual, expected)


def test_of_every_model_a_run_is_planned():
    for name in CONFIGS:
        cached = targeted(make_model(name))
        for seed in (1, 2):
            sample(cached, name, cfg=3.0, noise_seed=seed)
        assert is_planned(cached), name


OTHERS = {
    "steps": {"steps": 13},
    "a part of a run": {"steps": 16, "start_step": 4},
    "size": {"image": latent("flux", 12)},
    "sampler": {"sampler": "dpmpp_2m"},
    "guidance": {"cfg": 3.0},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_kind_of_run_is_calibrated_and_both_are_kept(what):
    cached, other = targeted(make_model("flux")), OTHERS[what]
    sample(cached, "flux")
    sample(cached, "flux", **other)
    assert is_computed(cached)
    sample(cached, "flux", **other)
    assert is_planned(cached)
    sample(cached, "flux")
    assert is_planned(cached)


def test_a_batch_of_pictures_and_the_strength_of_guidance_are_of_the_same_kind():
    cached = targeted(make_model("flux"))
    sample(cached, "flux", cfg=3.0)
    sample(cached, "flux", cfg=4.0, image=torch.zeros(2, 16, 8, 8))
    assert is_planned(cached)


def test_an_interrupted_run_teaches_nothing_however_often():
    class InterruptError(Exception):
        pass

    def interrupt(step, *args):
        runs.append(cache_of(cached)._run)
        if step == 5:
            raise InterruptError

    cached, runs = targeted(make_model("wan")), []
    for _ in range(4):
        with pytest.raises(InterruptError):
            sample(cached, "wan", callback=interrupt)
    assert not any(each._session.recorder._steps for each in runs)
    sample(cached, "wan")
    assert is_computed(cached)
    with pytest.raises(InterruptError):
        sample(cached, "wan", callback=interrupt)
    sample(cached, "wan")
    assert is_planned(cached), "what is known stays"


def test_conditions_in_a_batch_and_one_by_one_are_two_kinds(monkeypatch):
    model = make_model("wan")
    cached, memory = targeted(model, 1.95), {"free": 2**40}
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *a, **k: memory["free"])
    sample(cached, "wan", cfg=3.0)
    memory["free"] = 0
    plain = sample(model, "wan", cfg=3.0)
    assert torch.equal(sample(cached, "wan", cfg=3.0), plain) and is_computed(cached)
    blocks = Blocks(model)
    work = blocks.of(lambda: sample(cached, "wan", cfg=3.0, noise_seed=8))
    assert 2 * STEPS * 6 / work == pytest.approx(1.95, rel=0.05)
    assert is_planned(cached) and masks(cached).keys() == {"cond", "uncond"}
    memory["free"] = 2**40
    sample(cached, "wan", cfg=3.0)
    assert is_planned(cached) and masks(cached).keys() == {"uncond+cond"}


def test_a_batch_that_splits_in_a_planned_run_is_no_reason_to_learn_anew(monkeypatch, recwarn):
    model = make_model("wan")
    cached, memory = targeted(model), {"free": 2**40}
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *a, **k: memory["free"])
    sample(cached, "wan", cfg=3.0)

    def split(step, *args):
        memory["free"] = 0 if step == 4 else memory["free"]

    sample(cached, "wan", cfg=3.0, callback=split)
    found = masks(cached)
    assert {*found} == {"uncond+cond", "uncond", "cond"} and found["cond"].startswith("C")
    assert any("does not know the branch 'uncond'" in str(each.message) for each in recwarn)
    memory["free"] = 2**40
    sample(cached, "wan", cfg=3.0)
    assert is_planned(cached) and not is_computed(cached)


def test_conditions_that_nobody_knew_are_learned_in_the_next_run():
    cached, parts = (
        targeted(make_model("flux")),
        prompt(1) + prompt(4, area=(8, 4, 0, 0), strength=1.0),
    )
    sample(cached, "flux")
    with pytest.warns(match="does not know the branch 'cond#2'"):
        sample(cached, "flux", positive=parts)
    sample(cached, "flux", positive=parts)
    assert is_computed(cached)
    sample(cached, "flux", positive=parts)
    assert is_planned(cached) and len({*masks(cached).values()}) == 1
    sample(cached, "flux")
    assert is_planned(cached), "one of the two is known"


def test_what_a_model_taught_is_kept_with_it():
    model = make_model("flux")
    cached = targeted(model)
    sample(cached, "flux")
    for again in (cached.clone(), targeted(model, 1.5), targeted(model.clone())):
        sample(again, "flux", noise_seed=8)
        assert is_planned(again)
    (slow,) = masks(targeted_after(targeted(model, 1.5))).values()
    (fast,) = masks(targeted_after(targeted(model, 2.5))).values()
    assert slow.count("C") > fast.count("C")
    with_lora = model.clone()
    weight = model.model.diffusion_model.double_blocks[2].img_mlp[0].weight
    with_lora.add_patches({"diffusion_model.double_blocks.2.img_mlp.0.weight": (weight,)}, 0.01)
    for other in (with_lora, make_model("flux")):
        assert is_computed(targeted_after(targeted(other)))


def targeted_after(cached):
    """A cached model that ran once."""
    sample(cached, "flux")
    return cached


def test_kinds_that_no_run_was_of_for_longest_are_forgotten():
    cached = targeted(make_model("flux"))
    for steps in range(8, 8 + MOST_KINDS):
        sample(cached, "flux", steps=steps)
    sample(cached, "flux", steps=8)
    assert is_planned(cached)
    sample(cached, "flux", steps=8 + MOST_KINDS)  # takes the place of nine steps
    for steps, planned in ((8, True), (10, True), (9, False)):
        sample(cached, "flux", steps=steps)
        assert (is_planned if planned else is_computed)(cached), steps


def test_of_a_run_with_steps_that_are_missing_nothing_is_learned(caplog):
    """Heun has a second call in all sigmas but the first."""
    cached = targeted(make_model("flux"))
    with caplog.at_level(logging.INFO, "dicache"):
        for _ in range(3):
            sample(cached, "flux", "heun")
    assert "calibrating" in caplog.messages[0]
    assert caplog.text.count("learned nothing from this run, so the threshold 0.07 decides") == 1
    assert "Steps of it are missing" in caplog.text
    assert all("DiCache (threshold 0.07)" in each for each in caplog.messages[-2:])
    sample(cached, "flux")
    assert is_computed(cached)


def test_a_target_that_so_few_steps_cannot_have_costs_no_run(caplog):
    # Of 12 steps and 7 blocks 2 computed and 10 probes are 24 of 84.
    cached = targeted(make_model("flux"), 3.6)
    with caplog.at_level(logging.INFO, "dicache"):
        for _ in range(2):
            sample(cached, "flux")
    assert "R" in masks(cached)["cond"]
    (said,) = [each for each in caplog.messages if "target_speedup" in each]
    assert "is 3.6, and runs of 12 steps can have 3.50 at most, so the threshold 0.07" in said
    for _ in range(2):
        sample(cached, "flux", steps=20)
    assert is_planned(cached)


@pytest.mark.parametrize("target", [1.0, 2.0])
def test_runs_of_hardly_any_steps_are_computed_and_teach_nothing(target, caplog):
    model = make_model("flux")
    cached = targeted(model, target)
    with caplog.at_level(logging.INFO, "dicache"):
        for steps in (1, 2, 1, 2):
            assert torch.equal(
                sample(cached, "flux", steps=steps), sample(model, "flux", steps=steps)
            )
    assert len(caplog.messages) == 4 and all("threshold 0.07" in each for each in caplog.messages)


def test_a_sampler_that_adds_noise_is_not_recorded(caplog):
    cached = targeted(make_model("flux"))
    with caplog.at_level(logging.INFO, "dicache"), pytest.warns(match="adds new noise"):
        sample(cached, "flux", "euler_ancestral", steps=16)
    assert is_computed(cached) and "calibrat" not in caplog.text


def test_the_log_tells_what_a_run_is_for(caplog):
    cached = targeted(make_model("flux"))
    with caplog.at_level(logging.INFO, "dicache"):
        sample(cached, "flux")
        sample(cached, "flux")
    first, calibrated, second = caplog.messages
    counts = "12 computed, 0 resumed, 0 reused. 100% of the blocks ran."
    assert first == f"DiCache (calibrating): cond: {counts}"
    assert calibrated.startswith("DiCache has calibrated: ") and "2x less work" in calibrated
    counts = "5 computed, 0 resumed, 7 reused. 50% of the blocks ran."
    assert second == f"DiCache (target 2x): cond: {counts}"


def test_no_recorded_tensor_outlives_its_run():
    cached, runs = targeted(make_model("flux")), []
    sample(cached, "flux", callback=lambda *a: runs.append(cache_of(cached)._run))
    assert runs[0] is runs[-1] and not runs[0]._session.recorder._steps


def test_a_trained_model_draws_nearly_what_it_does_without_the_cache():
    """The demo model `flux`, calibrated on one picture, on others: it has 51.5 and 52.5 dB."""
    model = trained_flux()
    cached, blocks = targeted(model), Blocks(model)

    def run(of, text, seed):
        given = {"positive": trained_prompt(text), "image": torch.zeros(1, 12, SIDE, SIDE)}
        return picture(of, sample(of, "flux", steps=30, noise_seed=seed, **given))

    run(cached, "green cross center on gray", 0)
    for seed, text in enumerate(("red circle left on white", "pink ring top on black"), start=1):
        plain = run(model, text, seed)
        blocks.count = 0
        error = (run(cached, text, seed) - plain).square().mean()
        assert 30 * 9 / blocks.count == pytest.approx(2.0, rel=0.05)
        assert 0 < error < 10**-4.5  # 45 dB
