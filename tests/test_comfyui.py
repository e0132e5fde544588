"""The ComfyUI adapter without ComfyUI: small stand-ins speak its patcher's protocol.

What the real one does with it is tested in `tests/comfyui` (`make test-comfyui`).
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dicache import DiCacheConfig, DiCacheWarning
from dicache.adapters.comfyui.attach import APPLY_MODEL, KEY, OUTER_SAMPLE, apply, config_for
from dicache.adapters.comfyui.locate import Locator, Sigmas, adds_noise
from dicache.adapters.comfyui.table import FIRST, LAST, MODELS, Block, find_model
from dicache.config import PRESETS
from dicache.error_rules import ERROR_RULES

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0])
SCHEDULE = "CCRCRC"
CONTROL = {"input": [torch.full((1, 4, 6), 0.2), torch.full((1, 4, 6), -0.1)], "output": []}


class Flux(nn.Module):
    """Two blocks of two streams and two of one, [text, image]; all of them write in place."""

    __module__ = "comfy.ldm.flux.model"

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.double_blocks = nn.ModuleList(nn.Identity() for _ in range(2))
        self.single_blocks = nn.ModuleList(nn.Identity() for _ in range(2))
        self.weights = 0.3 * torch.randn(4, 6, 6, generator=generator)
        self.calls: list[tuple[str, int]] = []
        self.fails_at = -1

    def block(self, key, arguments):
        kind, index = key
        self.calls.append(key)
        if len(self.calls) == self.fails_at:
            raise RuntimeError("out of memory")
        weight = self.weights[index + 2 * (kind == "single_block")]
        img = arguments["img"]
        img += torch.sin(img @ weight) * arguments["vec"]
        return {**arguments, "img": img} if kind == "double_block" else {"img": img}

    def run(self, key, arguments, replace):
        def original(given):
            return self.block(key, given)

        if key in replace:
            return replace[key](arguments, {"original_block": original})
        return original(arguments)

    def forward(self, x, sigma, control, options):
        replace = options.get("patches_replace", {}).get("dit", {})
        txt, vec = torch.full((x.shape[0], 2, 6), 0.1), 0.5 + sigma
        img = x.clone()
        for index in range(2):
            out = self.run(("double_block", index), {"img": img, "txt": txt, "vec": vec}, replace)
            img, txt = out["img"], out["txt"]
            if control is not None:
                img += control["input"][index]
        img = torch.cat([txt, img], dim=1)
        for index in range(2):
            out = self.run(("single_block", index), {"img": img, "vec": vec}, replace)
            img = out["img"]
        return img[:, 2:]


class Patcher:
    """As much of a `ModelPatcher` as the adapter uses."""

    def __init__(self, model=None):
        self.model = model or SimpleNamespace(diffusion_model=Flux(), current_patcher=None)
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        clone = Patcher(self.model)
        clone.wrappers = {
            place: {key: list(each) for key, each in keys.items()}
            for place, keys in self.wrappers.items()
        }
        return clone

    def add_wrapper_with_key(self, place, key, wrapper):
        self.wrappers.setdefault(place, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, place, key):
        self.wrappers.get(place, {}).pop(key, None)

    def get_model_object(self, name):
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)

    def wrapped(self, place, owner, function):
        def executor(*args, **kwargs):
            return function(*args, **kwargs)

        executor.class_obj = owner
        for wrapper in self.wrappers.get(place, {}).get(KEY, ()):
            inner, executor = executor, lambda *a, w=wrapper, e=executor, **k: w(e, *a, **k)
            executor.class_obj = inner.class_obj
        return executor


def sample(
    patcher, options=None, sigmas=SIGMAS, calls=None, before=lambda step: None, control=None
):
    """An Euler sampler: x, then a step for every sigma; `calls` are the uuids of each batch."""
    model = patcher.model
    guider = SimpleNamespace(model_patcher=patcher, model_options=patcher.model_options)

    def apply_model(x, t, c_concat, c_crossattn, control, transformer_options):
        return model.diffusion_model(x, t[0], control, transformer_options)

    def run(noise, latent, sampler, sigmas, *rest):
        x = noise
        for step, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            before(step)
            for uuids in [("a",)] if calls is None else calls:
                given = {"uuids": list(uuids), "cond_or_uncond": [0], **(options or {})}
                given["sigmas"] = sigma.reshape(1)
                call = patcher.wrapped(APPLY_MODEL, model, apply_model)
                out = call(x, given["sigmas"], None, None, control, given)
                assert given.get("patches_replace") is (options or {}).get("patches_replace")
            x = x + (after - sigma) * out
        return x

    noise = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    sampler = SimpleNamespace(sampler_function=run, extra_options={})
    return patcher.wrapped(OUTER_SAMPLE, guider, run)(noise, None, sampler, sigmas, None)


def cache_of(patcher):
    return patcher.wrappers[OUTER_SAMPLE][KEY][0].__self__


def actions(patcher):
    letters = {"compute": "C", "resume": "c", "reuse": "R"}
    (stats,) = cache_of(patcher).last
    return {n: "".join(letters[r.action] for r in each) for n, each in stats.contexts.items()}


def test_importing_dicache_imports_no_comfyui_and_no_compiler():
    code = (
        "import sys, dicache, dicache.adapters.comfyui.attach; "
        "tops = {name.partition('.')[0] for name in sys.modules}; "
        "print(sorted(tops & {'comfy', 'comfy_api', 'diffusers'}), 'torch._dynamo' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] False"


@pytest.mark.parametrize("added", [False, True])
def test_a_computed_run_is_the_plain_run_though_blocks_write_in_place(added):
    plain, control = Patcher(), CONTROL if added else None
    cached = apply(plain, DiCacheConfig(threshold=0.0))
    assert torch.equal(sample(cached, control=control), sample(plain, control=control))
    assert actions(cached) == {"cond": "CccccC"}


def by_hand(depth, control):
    """The run with SCHEDULE, by the formula, on a plain model whose blocks are looked at."""
    model, entries = Flux(), []
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    keys = [(kind, index) for kind in ("double_block", "single_block") for index in (0, 1)]
    for letter, sigma, after in zip(SCHEDULE, SIGMAS[:-1], SIGMAS[1:], strict=True):
        seen = []

        def note(arguments, extra, seen=seen):
            out = extra["original_block"](arguments)
            seen.append(out["img"][:, -4:].clone())
            return out

        y = model(x, sigma, control, {"patches_replace": {"dit": dict.fromkeys(keys, note)}})
        q, r = seen[depth - 1] - x, y - x
        if letter == "C":
            entries = [*entries[-1:], (q, r)]
        else:
            (q_old, r_old), (q_new, r_new) = entries
            a, d = q - q_old, q_new - q_old
            gamma = ((a * d).sum() / (d * d).sum()).clamp(0, 2)
            y = x + r_old + gamma * (r_new - r_old)
        x = x + (after - sigma) * y
    return x


@pytest.mark.parametrize("control", [None, CONTROL], ids=["plain", "controlnet"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_reused_step_is_x_plus_the_residual_of_the_formula(depth, control):
    cached = apply(Patcher(), DiCacheConfig(schedule=SCHEDULE, probe_depth=depth))
    actual = sample(cached, control=control)
    torch.testing.assert_close(actual, by_hand(depth, control), rtol=1e-5, atol=1e-5)


def test_a_reused_step_runs_the_probe_alone(caplog):
    cached = apply(Patcher(), DiCacheConfig(schedule=SCHEDULE))
    with caplog.at_level(logging.INFO, "dicache"):
        sample(cached)
    assert len(cached.model.diffusion_model.calls) == 4 * 4 + 2 * 1
    (message,) = caplog.messages
    assert "cond: 4 computed, 0 resumed, 2 reused. 75% of the blocks ran." in message


def test_a_patch_of_another_node_runs_inside_of_ours():
    seen = []

    def patch(arguments, extra):
        seen.append(extra["original_block"])
        return extra["original_block"](arguments)

    options = {"patches_replace": {"dit": {("single_block", 0): patch}}}
    cached = apply(Patcher(), DiCacheConfig(schedule=SCHEDULE))
    assert torch.equal(
        sample(cached, options), sample(apply(Patcher(), DiCacheConfig(schedule=SCHEDULE)))
    )
    assert len(seen) == SCHEDULE.count("C")


def test_an_exception_frees_the_run():
    cached, fresh = (apply(Patcher(), DiCacheConfig(schedule=SCHEDULE)) for _ in range(2))
    cached.model.diffusion_model.fails_at = 7
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(cached)
    assert cache_of(cached)._run is None and cache_of(cached).last == []
    assert torch.equal(sample(cached), sample(fresh))


@pytest.mark.parametrize("fails_at", [-1, 12])
def test_no_tensor_outlives_its_run_whoever_holds_the_run(fails_at):
    cached, runs = apply(Patcher(), DiCacheConfig(schedule=SCHEDULE)), []
    cached.model.diffusion_model.fails_at = fails_at
    try:
        sample(cached, before=lambda step: runs.append(cache_of(cached)._run))
    except RuntimeError:
        assert fails_at > 0
    assert runs[0] is runs[-1] and list(runs[0]._session.timeline.run.branches) == []


def test_a_run_inside_of_a_run_is_a_run_of_its_own():
    cached = apply(Patcher(), DiCacheConfig(schedule=SCHEDULE))
    expected = sample(cached)
    inner = []

    def before(step):
        if step == 3:
            inner.append(sample(cached))

    assert torch.equal(sample(cached, before=before), expected)
    assert torch.equal(inner[0], expected)


def test_calls_that_cannot_be_told_are_left_alone(caplog):
    caplog.set_level(logging.INFO, "dicache")
    plain = Patcher()
    for options in ({"uuids": None}, {"sigmas": None}):
        cached = apply(plain, DiCacheConfig(schedule=SCHEDULE))
        if "sigmas" in options:  # between the run's sigmas
            shifted = cached.wrappers[APPLY_MODEL][KEY][0]

            def call(executor, *args, inner=shifted):
                moved = {**args[5], "sigmas": args[5]["sigmas"] - 0.05}
                return inner(executor, *args[:5], moved)

            cached.wrappers[APPLY_MODEL][KEY] = [call]
            options = {}
        assert torch.equal(sample(cached, options), sample(plain))
        assert cache_of(cached).last == []
        assert "no step could be told" in caplog.messages[-1]


def test_a_call_outside_of_a_run_and_one_of_another_model_are_left_alone():
    cached = apply(Patcher(), DiCacheConfig(threshold=1.0))
    call = cached.wrappers[APPLY_MODEL][KEY][0]
    seen = []

    def executor(*args):
        seen.append(args)

    executor.class_obj = cached.model
    options = {"uuids": ["a"], "sigmas": SIGMAS[:1]}
    call(executor, 1, 2, None, None, None, options)
    cache_of(cached)._run = SimpleNamespace(model=object(), is_off=False)
    call(executor, 1, 2, None, None, None, options)
    assert all(each[5] is options for each in seen) and len(seen) == 2


def test_conditions_have_a_history_each_by_their_ids():
    cached = apply(Patcher(), DiCacheConfig(schedule=SCHEDULE))
    sample(cached, calls=[("a",), ("b",)])
    assert actions(cached) == {"cond": SCHEDULE, "cond#2": SCHEDULE}


def test_a_lost_end_is_computed_and_told(caplog):
    plain, cached = Patcher(), apply(Patcher(), DiCacheConfig(schedule="CCCCRC"))
    inner = cached.wrappers[APPLY_MODEL][KEY][0]

    def call(executor, *args):
        def without_last(*given):
            if given[5]["sigmas"] == SIGMAS[4]:
                given[5].get("patches_replace", {}).get("dit", {}).pop(("single_block", 1), None)
            return executor(*given)

        without_last.class_obj = executor.class_obj
        return inner(without_last, *args)

    cached.wrappers[APPLY_MODEL][KEY] = [call]
    assert torch.equal(sample(cached), sample(plain))
    assert "took the place" in caplog.text


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_every_row_has_a_family_to_take_its_threshold_from(row):
    thresholds = [
        row.threshold_for(ERROR_RULES[name]) for name in ("weighted_alignment", "delta_y")
    ]
    assert 0 < thresholds[0] < thresholds[1]


def test_models_are_known_by_their_class_and_module():
    assert find_model(Flux()).name == "Flux"
    for module in ("comfy.ldm.flux.other", "flux"):
        kind = type("Flux", (nn.Module,), {"__module__": module})
        with pytest.raises(ValueError, match=rf"does not know the model class Flux \({module}\)"):
            find_model(kind())
    with pytest.raises(ValueError, match="Radiance"):  # whatever derives from it runs otherwise
        find_model(type("Radiance", (Flux,), {"__module__": Flux.__module__})())


def test_blocks_that_a_model_leaves_out_have_no_place():
    (row,) = [each for each in MODELS if each.name == "Chroma"]
    model = SimpleNamespace(
        double_blocks=range(3), single_blocks=range(4), skip_mmdit=[1], skip_dit=[0, 3]
    )
    keys = [block.key for block in row.blocks(model)]
    double, single = "double_block", "single_block"
    assert keys == [(double, 0), (double, 2), (single, 1), (single, 2)]
    with pytest.raises(ValueError, match="has no block list 'single_blocks'"):
        row.blocks(SimpleNamespace(double_blocks=range(3)))


@pytest.mark.parametrize(("image", "first"), [(FIRST, 0), (LAST, 3)])
def test_the_image_is_one_part_of_a_single_stream(image, first):
    block, tokens = Block(("single_block", 0), image), torch.arange(10.0).reshape(1, 5, 2)
    before = tokens.clone()
    assert torch.equal(block.image_of(tokens, 2), tokens[:, first : first + 2])
    changed = block.with_image(tokens, -torch.ones(1, 2, 2))
    assert (changed[:, first : first + 2] == -1).all() and (changed == -1).sum() == 4
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("rules", ["default", *PRESETS])
def test_the_widgets_stand_for_a_configuration(rules):
    own = DiCacheConfig() if rules == "default" else DiCacheConfig.preset(rules)
    assert config_for(rules, 0.0) == own
    assert config_for(rules, 0.25).threshold == 0.25


@pytest.mark.parametrize(
    "given", [("flux", 0.0, 2.5), ("default", 0.1, 2.5), ("default", 0.0, 0.5)]
)
def test_a_target_goes_with_the_default_rules_alone(given):
    found = config_for("default", 0.0, 2.5)
    assert found == DiCacheConfig(profile="auto", target_speedup=2.5)
    rules, threshold, target = given
    said = f"target_speedup is {target}, rules '{rules}' and threshold {threshold}. Expected"
    with pytest.raises(ValueError, match=re.escape(said)):
        config_for(*given)


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    for config, window, message in (
        (DiCacheConfig(profile="auto", threshold=1.0), (0, 1), "there is no target_speedup"),
        (DiCacheConfig(granularity="sample"), (0, 1), "Expected 'batch'"),
        (DiCacheConfig(probe_depth=4), (0, 1), "probe_depth is 4 and Flux has 4 blocks"),
        (DiCacheConfig(), (0.6, 0.4), "start_percent is 0.6 and end_percent 0.4"),
    ):
        patcher = Patcher()
        with pytest.raises(ValueError, match=message):
            apply(patcher, config, *window)
        assert patcher.wrappers == {}


def test_another_cache_that_comes_later_switches_ours_off(caplog):
    plain, cached = Patcher(), apply(Patcher(), DiCacheConfig(threshold=10.0))
    cached.model_options["transformer_options"]["easycache"] = object()
    assert torch.equal(sample(cached), sample(plain))
    assert "Two caches do not stack" in caplog.text and cache_of(cached).last == []


def test_steps_outside_of_the_window_are_computed():
    cached = apply(Patcher(), DiCacheConfig(threshold=100.0), 0.2, 0.5)
    sample(cached)
    assert actions(cached) == {"cond": "CcRRcC"}  # sigmas 1.0 to 0.2, of which 0.8 to 0.5 may


def test_few_steps_that_are_never_alike_are_told_once_a_node():
    """Every sampling run has a session of its own."""
    cached = apply(Patcher(), DiCacheConfig(threshold=1e-9))
    with pytest.warns(DiCacheWarning, match="None of the 6 steps"):
        sample(cached)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        sample(cached)
        # Steps outside of the window were computed because somebody said so.
        sample(apply(Patcher(), DiCacheConfig(threshold=100.0), 0.0, 0.01))


# --- where a call stands ---


def where(locator, sigma=1.0, x=None, control=None, hooks=None, **options):
    given = {"uuids": ["a"], "cond_or_uncond": [0], **options}
    return locator.where(given, torch.zeros(1, 4, 6) if x is None else x, sigma, control, hooks)


def test_a_step_is_found_by_its_sigma():
    sigmas = Sigmas([1.0, 0.5, 0.1, 0.0])
    assert [sigmas.position(each) for each in (1.0, 0.50001, 0.1)] == [0, 1, 2]
    assert [sigmas.position(each) for each in (0.7, 0.0, 0.001)] == [None, None, None]
    assert [sigmas.timestep(each) for each in (1.0, 0.5, 0.0)] == [1.0, 0.5, 0.0]
    part = Sigmas([1.0, 0.9, 0.8])  # as the first expert of Wan 2.2 has it
    assert part.timestep(1.0) == 1.0 and part.timestep(0.9) == pytest.approx(0.5)
    assert Sigmas([0.0]).position(0.0) is None and Sigmas([1.0, 1.0]).timestep(1.0) == 1.0


def test_the_last_step_is_the_one_before_the_last_sigma():
    locator = Locator([1.0, 0.5, 0.0])
    first, last = where(locator, 1.0), where(locator, 0.5)
    assert (first.moment, first.is_last, last.moment, last.is_last) == (0, False, 1, True)
    assert first.num_steps == 2 and where(locator, 0.0) is None


def test_a_branch_is_named_by_its_conditions_and_told_by_all_that_makes_it():
    locator = Locator([1.0, 0.0])
    names = [
        where(locator).context,
        where(locator, uuids=["b"]).context,
        where(locator, uuids=["a", "b"], cond_or_uncond=[1, 0]).context,
        where(locator, x=torch.zeros(1, 8, 6)).context,
        where(locator, context_window=SimpleNamespace(index_list=[0, 1])).context,
        where(locator, patches_replace={"dit": {("double_block", 1): len}}).context,
        where(locator, uuids=["c"], cond_or_uncond=[2]).context,
    ]
    expected = ["cond", "cond#2", "uncond+cond", "cond#3", "cond#4", "cond#5", "cond2"]
    assert names == expected
    assert where(locator).context == "cond"


def test_what_lies_behind_the_probe_is_told_by_identity():
    locator, replace = Locator([1.0, 0.0]), lambda patch: {"dit": {("double_block", 1): patch}}
    same = [where(locator, patches_replace=replace(len)) for _ in range(2)]
    other = where(locator, patches_replace=replace(max))
    assert same[0].computes_in == same[1].computes_in != other.computes_in
    assert same[0].context == other.context
    patches = [where(locator, patches={"attn2_patch": [each]}).computes_in for each in (len, max)]
    assert patches[0] != patches[1]
    hook = SimpleNamespace(hook_ref=object(), strength=1.0)
    hooks = SimpleNamespace(hooks=[hook])
    before = where(locator, hooks=hooks).computes_in
    assert before == where(locator, hooks=hooks).computes_in
    hook.strength = 0.5
    assert before != where(locator, hooks=hooks).computes_in


def test_residuals_of_a_controlnet_are_looked_at():
    locator, added = Locator([1.0, 0.0]), [torch.ones(1, 4, 6), None, torch.ones(1, 4, 6)]
    control = {"input": added, "output": []}
    assert where(locator, control=control).behind[0].shape == (1, 48)
    assert where(locator).behind == ()
    assert where(locator, control=control).computes_in != where(locator).computes_in


@pytest.mark.parametrize(
    ("name", "eta", "noisy"),
    [
        ("sample_euler", None, False),
        ("sample_dpmpp_2m", None, False),
        ("sample_euler_ancestral", None, True),
        ("sample_euler_ancestral", 0.0, False),
        ("sample_dpmpp_2m_sde_gpu", None, True),
        ("sample_lcm", None, True),
    ],
)
def test_samplers_that_add_noise_are_known_by_name(name, eta, noisy):
    options = {} if eta is None else {"eta": eta}

    def function():
        pass

    function.__name__ = name
    sampler = SimpleNamespace(sampler_function=function, extra_options=options)
    assert adds_noise(sampler) is noisy
    assert where(Locator([1.0, 0.0], sampler)).is_noisy is (True if noisy else None)
    assert not adds_noise(object())
