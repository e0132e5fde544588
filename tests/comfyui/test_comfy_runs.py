"""Sampling runs of the real ComfyUI with the cache on, held against plain runs and the formula."""

import comfy.controlnet
import comfy.model_management
import comfy.patcher_extension
import pytest
import torch
from comfy_twin import Twin
from tiny_comfy import CONFIGS, ROWS, latent, make_model, prompt, sample

from dicache import DiCacheConfig
from dicache.adapters.comfyui.attach import APPLY_MODEL, KEY, OUTER_SAMPLE, Cache, apply

SCHEDULE = "CCCRRCRCRRRC"
LETTERS = {"compute": "C", "resume": "c", "reuse": "R"}
MAIN = ("flux", "wan", "hunyuan_video")


def cache_of(model) -> Cache:
    (wrapper,) = model.get_wrappers(OUTER_SAMPLE, KEY)
    return wrapper.__self__


def masks(model) -> dict[str, str]:
    """A letter a step of every branch of the last run: C computed, c resumed, R reused."""
    found: dict[str, str] = {}
    for stats in cache_of(model).last:
        for name, records in stats.contexts.items():
            found[name] = found.get(name, "") + "".join(LETTERS[each.action] for each in records)
    return found


def close(actual, expected) -> bool:
    return bool((actual - expected).norm() <= 2e-5 * expected.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_at_threshold_zero_a_run_is_the_plain_run_bit_by_bit(name):
    model = make_model(name)
    cached = apply(model, DiCacheConfig(threshold=0.0))
    assert torch.equal(sample(cached, name, cfg=3.0), sample(model, name, cfg=3.0))
    assert masks(cached) == {"uncond+cond": "C" + 10 * "c" + "C"}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "heun", "dpm_2", "dpmpp_2m_sde"])
@pytest.mark.parametrize("name", MAIN)
def test_so_it_is_with_every_kind_of_sampler(name, sampler):
    model = make_model(name)
    cached = apply(model, DiCacheConfig(threshold=0.0))
    plain = sample(model, name, sampler, cfg=3.0)
    assert torch.equal(sample(cached, name, sampler, cfg=3.0), plain)


@pytest.mark.parametrize(
    "cfg", [1.0, pytest.param(3.0, marks=pytest.mark.backs("guidance", rows=ROWS))]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_reused_step_is_the_formula(name, cfg):
    model = make_model(name)
    cached = apply(model, DiCacheConfig(schedule=SCHEDULE))
    actual = sample(cached, name, cfg=cfg)
    with Twin(model, name, SCHEDULE).on() as twin:
        expected = sample(model, name, cfg=cfg)
    assert len(twin.gammas) == SCHEDULE.count("R")
    assert close(actual, expected)
    assert not close(actual, sample(model, name, cfg=cfg))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
@pytest.mark.parametrize("name", MAIN)
def test_what_a_threshold_reuses_is_the_formula(name, sampler):
    model = make_model(name)
    cached = apply(model, DiCacheConfig(threshold=0.1, probe_depth=2))
    actual = sample(cached, name, sampler)
    (mask,) = masks(cached).values()
    assert mask.count("R") >= 3, mask
    # uni_pc ends with a call at another sigma than it was given; it belongs to no step
    with Twin(model, name, mask + "C", probe_depth=2).on():
        expected = sample(model, name, sampler)
    assert close(actual, expected)


def test_the_probe_may_reach_into_the_blocks_of_one_stream():
    for name in ("flux", "hunyuan_video"):
        model = make_model(name)
        cached = apply(model, DiCacheConfig(schedule=SCHEDULE, probe_depth=5))
        actual = sample(cached, name)
        with Twin(model, name, SCHEDULE, probe_depth=5).on():
            assert close(actual, sample(model, name))


@pytest.mark.parametrize("name", MAIN)
def test_the_model_that_went_in_stays_as_it_was(name):
    model = make_model(name)
    plain = sample(model, name)
    options = {key: dict(value) for key, value in model.model_options.items()}
    cached = apply(model, DiCacheConfig(threshold=1.0))
    reused = sample(cached, name)
    assert model.wrappers == {} and model.model_options == options
    assert torch.equal(sample(model, name), plain)
    assert torch.equal(sample(cached, name), reused), "a second run is the first one"


def test_branches_in_two_calls_have_a_history_each(monkeypatch):
    model = make_model("wan")
    cached = apply(model, DiCacheConfig(schedule=SCHEDULE))
    together = sample(cached, "wan", cfg=3.0)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 0)
    apart = sample(cached, "wan", cfg=3.0)
    assert masks(cached) == {"uncond": SCHEDULE, "cond": SCHEDULE}
    # Apart each has its own gamma, and as its own twin it would be without the other.
    assert not torch.equal(apart, together)
    zero = apply(model, DiCacheConfig(threshold=0.0))
    assert torch.equal(sample(zero, "wan", cfg=3.0), sample(model, "wan", cfg=3.0))


def test_a_batch_of_another_composition_is_another_branch(monkeypatch):
    model = make_model("wan")
    cached = apply(model, DiCacheConfig(threshold=10.0))
    free = iter([2**40] * 6 + [0] * 100)
    memory = {"now": 0}

    def callback(*args):
        memory["now"] = next(free)

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *a, **k: memory["now"])
    memory["now"] = next(free)
    sample(cached, "wan", cfg=3.0, callback=callback)
    found = masks(cached)
    assert set(found) == {"uncond+cond", "uncond", "cond"}
    assert all(each.startswith("CR") for each in found.values()), found


@pytest.mark.parametrize("cached_first", [True, False])
@pytest.mark.parametrize("key", [("double_block", 1), ("single_block", 3), ("double_block", 0)])
def test_another_nodes_patch_runs_on_computed_steps(key, cached_first):
    calls = []

    def patch(arguments, extra):
        calls.append(1)
        out = extra["original_block"](arguments)
        return {**out, "img": 0.9 * out["img"]}

    def with_patch(model):
        model = model.clone()
        model.set_model_patch_replace(patch, "dit", *key)
        return model

    def both(config):
        return (
            with_patch(apply(model, config)) if cached_first else apply(with_patch(model), config)
        )

    model = make_model("flux")
    plain = sample(with_patch(model), "flux")
    assert not torch.equal(plain, sample(model, "flux"))
    assert torch.equal(sample(both(DiCacheConfig(threshold=0.0)), "flux"), plain)
    calls.clear()
    sample(both(DiCacheConfig(schedule=SCHEDULE)), "flux")
    is_in_probe = key == ("double_block", 0)
    assert len(calls) == (12 if is_in_probe else SCHEDULE.count("C"))


def test_a_patch_that_comes_in_the_middle_of_a_run_begins_another_branch():
    def patch(arguments, extra):
        return extra["original_block"](arguments)

    def late(executor, *args, **kwargs):
        if float(args[1][0]) < 0.8:
            options = dict(args[5])
            options["patches_replace"] = {"dit": {("double_block", 2): patch}}
            args = [*args[:5], options]
        return executor(*args, **kwargs)

    model = make_model("flux").clone()
    model.add_wrapper_with_key(APPLY_MODEL, "late", late)
    cached = apply(model, DiCacheConfig(threshold=10.0))
    sample(cached, "flux")
    found = masks(cached)
    assert set(found) == {"cond", "cond#2"} and found["cond#2"].startswith("CR")


@pytest.mark.parametrize("since", [1.0, 0.6])
def test_a_patch_that_takes_the_place_of_ours_costs_computed_steps(since, caplog):
    """Always, so that nothing is recorded; or in a reused step, which then has no end."""

    def run_block(arguments, extra):
        return extra["original_block"](arguments)

    def replace(executor, *args, **kwargs):
        if float(args[1][0]) <= since:
            args[-1].setdefault("patches_replace", {}).setdefault("dit", {})[
                ("single_block", 3)
            ] = run_block
        return executor(*args, **kwargs)

    model = make_model("flux")
    plain = sample(model, "flux")
    cached = apply(model, DiCacheConfig(schedule=9 * "C" + "RRC"))
    place = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    cached.add_wrapper_with_key(place, "other", replace)
    assert torch.equal(sample(cached, "flux"), plain)
    assert ("took the place of the last block's" in caplog.text) == (since < 1)


def test_an_interrupted_run_leaves_nothing_behind():
    class InterruptError(Exception):
        pass

    def interrupt(step, *args):
        if step == 5:
            raise InterruptError

    model = make_model("wan")
    cached, fresh = (apply(model, DiCacheConfig(threshold=0.05)) for _ in range(2))
    with pytest.raises(InterruptError):
        sample(cached, "wan", callback=interrupt)
    assert cache_of(cached)._run is None
    assert torch.equal(sample(cached, "wan"), sample(fresh, "wan"))


def test_an_exception_inside_of_a_block_leaves_nothing_behind():
    model = make_model("flux")
    cached, fresh = (apply(model, DiCacheConfig(threshold=0.05)) for _ in range(2))
    calls = iter(range(100))

    def fail(*args):
        if next(calls) == 6:
            raise RuntimeError("out of memory")

    hook = model.model.diffusion_model.double_blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(cached, "flux")
    hook.remove()
    assert cache_of(cached)._run is None
    assert torch.equal(sample(cached, "flux"), sample(fresh, "flux"))


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that adds fixed residuals to some blocks' image tokens, in place."""

    def __init__(self, inputs, outputs, until=0.0):
        super().__init__()
        self.residuals, self.until = (inputs, outputs), until

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        if float(t[0]) < self.until:
            return None
        inputs, outputs = self.residuals
        return {"input": list(inputs), "output": list(outputs)}

    def copy(self):
        return self

    def get_models(self):
        return []


def residuals(name, until=0.0):
    generator = torch.Generator().manual_seed(5)
    width, tokens = 256 if name == "sd3" else 48, 48 if name == "hunyuan_video" else 16
    drawn = [0.5 * torch.randn(1, tokens, width, generator=generator) for _ in range(4)]
    if name == "qwen_image":
        return Residuals([drawn[0], None, drawn[1], None, drawn[2]], [], until)
    return Residuals([drawn[0], None, drawn[1]], [None, drawn[2], None, drawn[3]], until)


CONTROLLED = ("flux", "chroma", "hunyuan_video", "qwen_image", "sd3")


@pytest.mark.rules_out("control", rows=ROWS)
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {*CONTROLLED}))
def test_other_models_take_nothing_of_a_controlnet(name):
    positive = prompt(1, name, control=residuals(name), control_apply_to_uncond=False)
    model = make_model(name)
    assert torch.equal(sample(model, name, positive=positive), sample(model, name))


@pytest.mark.backs("control", rows=ROWS)
@pytest.mark.parametrize("name", CONTROLLED)
def test_what_a_controlnet_adds_in_place_stays_right(name):
    model = make_model(name)
    positive = prompt(1, control=residuals(name), control_apply_to_uncond=False)
    plain = sample(model, name, positive=positive)
    assert not torch.equal(plain, sample(model, name))
    zero = apply(model, DiCacheConfig(threshold=0.0))
    assert torch.equal(sample(zero, name, positive=positive), plain)
    actual = sample(apply(model, DiCacheConfig(schedule=SCHEDULE)), name, positive=positive)
    with Twin(model, name, SCHEDULE).on():
        assert close(actual, sample(model, name, positive=positive))


def test_a_controlnet_that_ends_begins_the_trajectory_anew():
    model = make_model("flux")
    cached = apply(model, DiCacheConfig(threshold=10.0))
    positive = prompt(1, control=residuals("flux", until=0.55), control_apply_to_uncond=False)
    sample(cached, "flux", positive=positive, steps=16)
    (mask,) = masks(cached).values()
    end = mask.index("C", 1)
    assert mask[:end] == "C" + "R" * (end - 1), mask
    assert mask[end:] == "CC" + "R" * (13 - end) + "C", mask


def test_steps_outside_of_the_window_are_computed():
    model = make_model("flux")
    cached = apply(model, DiCacheConfig(threshold=10.0), 0.4, 0.8)
    sample(cached, "flux", steps=20)
    (mask,) = masks(cached).values()
    sampling = model.get_model_object("model_sampling")
    most, least = (float(sampling.percent_to_sigma(each)) for each in (0.4, 0.8))
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 20)[:-1].tolist()
    inside = [index for index, sigma in enumerate(sigmas) if least <= sigma <= most]
    assert [index for index, letter in enumerate(mask) if letter == "R"] == inside


@pytest.mark.parametrize("name", MAIN)
def test_heuns_two_calls_at_a_sigma_have_a_history_each(name):
    """The second call of a step is at the next step's sigma, and so is that one's first."""
    model = make_model(name)
    cached = apply(model, DiCacheConfig(threshold=0.1))
    actual = sample(cached, name, "heun")
    found = masks(cached)
    assert len(cache_of(cached).last) == 1, "one run"
    assert found["cond"].count("R") >= 2 and found["cond#2"].count("R") >= 2, found
    # Their number in a step was one and is two: only from the third sigma on it is certain whose
    # is whose, and both histories begin there.
    assert found["cond"][2] == found["cond#2"][1] == "C"
    pairs = zip(found["cond"][1:], found["cond#2"], strict=True)
    mask = found["cond"][0] + "".join(first + second for first, second in pairs)
    mask = mask[:3] + "NN" + mask[5:]
    with Twin(model, name, mask, branches="0" + "01" * 11).on():
        assert close(actual, sample(model, name, "heun"))


@pytest.mark.parametrize("name", MAIN)
def test_a_call_between_two_sigmas_is_computed_and_belongs_to_no_history(name):
    model = make_model(name)
    cached = apply(model, DiCacheConfig(threshold=0.1))
    actual = sample(cached, name, "dpm_2")
    (steps,) = masks(cached).values()
    assert steps.count("R") >= 2
    mask = "".join(letter + "C" for letter in steps)[:-1]
    with Twin(model, name, mask, branches="01" * len(steps)).on() as twin:
        assert close(actual, sample(model, name, "dpm_2"))
    assert twin.calls == len(mask)


def test_the_names_of_the_wrappers_are_comfyuis():
    names = comfy.patcher_extension.WrappersMP
    assert (names.OUTER_SAMPLE, names.APPLY_MODEL) == (OUTER_SAMPLE, APPLY_MODEL)


def test_noise_in_every_step_is_seen():
    model = make_model("flux")
    cached = apply(model, DiCacheConfig())
    with pytest.warns(match="adds new noise in every step"):
        noisy = sample(cached, "flux", "euler_ancestral", steps=16)
    assert torch.equal(noisy, sample(model, "flux", "euler_ancestral", steps=16))


def test_a_part_of_a_run_is_a_run():
    """As Wan 2.2's two experts have it: the second sampler goes on where the first one ended."""
    model = make_model("wan")
    cached = apply(model, DiCacheConfig(threshold=0.1))
    half = sample(cached, "wan", steps=20, start_step=0, last_step=10, force_full_denoise=False)
    assert len(masks(cached)["cond"]) == 10 and "R" in masks(cached)["cond"]
    sample(cached, "wan", steps=20, start_step=10, image=half)
    assert len(masks(cached)["cond"]) == 10 and "R" in masks(cached)["cond"]


def test_pictures_of_any_size_follow_each_other():
    model = make_model("flux")
    cached = apply(model, DiCacheConfig(threshold=0.0))
    for size in (8, 12, 8):
        image = latent("flux", size)
        actual = sample(cached, "flux", image=image)
        assert torch.equal(actual, sample(model, "flux", image=image))
