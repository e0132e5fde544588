"""`calibrate` sees what a model computes, leaves no cache behind, and says what it cannot use."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import mask
from made_profiles import World
from original_models import WanT2V, ask, branches, steps
from original_models import build as build_original
from tiny_models import build, calls, latents_of, run_model, with_latents
from tiny_pipelines import pipeline, run
from torch import Tensor
from twin import Twin

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    Profile,
    apply_dicache,
    calibrate,
    get_stats,
    remove_dicache,
)
from dicache.core.extrapolation import Extrapolation
from dicache.core.readback import Readback

NUM_STEPS = 8
DEEP = {"num_layers": 4, "num_single_layers": 4}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        yield


def tiny(kind: str, **parts: Any) -> Any:
    if kind == "wan-2.2":
        experts = {
            name: build("wan", seed=seed, num_layers=5)
            for seed, name in enumerate(("transformer", "transformer_2"))
        }
        return pipeline("wan", **experts, boundary_ratio=0.875)
    overrides = DEEP if kind == "flux" else {"num_layers": 5}
    return pipeline(kind, transformer=build(kind, **overrides), **parts)


def generate(kind: str, pipe: Any, seed: int = 0, **changes: Any) -> Tensor:
    return run("wan" if kind == "wan-2.2" else kind, pipe, NUM_STEPS, seed, **changes)


def is_plain(pipe: Any) -> bool:
    """Whether nothing of a cache is left on a pipeline, or model."""
    try:
        get_stats(pipe)
    except ValueError:
        return True
    return False


def seen_by_hooks(model: Any, block_lists: list[str], go: Any) -> list[tuple[Tensor, ...]]:
    """x, p and y of every call, by forward hooks, without a cache."""
    blocks = [block for name in block_lists for block in getattr(model, name)]
    found: list[dict[str, Tensor]] = []

    def image(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[1]

    def before(module: Any, args: Any, kwargs: Any) -> None:
        found.append({"x": (args[0] if args else kwargs["hidden_states"]).double()})

    hooks = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[0].register_forward_hook(lambda m, a, out: found[-1].update(p=image(out).double())),
        blocks[-1].register_forward_hook(lambda m, a, out: found[-1].update(y=image(out).double())),
    ]
    go()
    for hook in hooks:
        hook.remove()
    return [(each["x"], each["p"], each["y"]) for each in found]


def world_of(recorded: list[tuple[Tensor, ...]]) -> World:
    x, p, y = (np.stack([each[k].flatten().numpy() for each in recorded]) for k in range(3))
    return World(x, p - x, y - x)


# --- what is recorded ----------------------------------------------------------------------------


def test_moments_are_those_of_what_hooks_see() -> None:
    pipe = tiny("wan")
    made = calibrate(pipe, lambda i: generate("wan", pipe, i), samples=2, gains=0)
    assert is_plain(pipe)
    assert (made.num_steps, made.samples, made.gains) == (NUM_STEPS, 2, None)
    pipe.scheduler.set_timesteps(NUM_STEPS)
    assert np.allclose(made.timesteps, pipe.scheduler.timesteps)
    (model,) = made.models.values()
    assert (model.identity.model, model.identity.num_blocks) == ("WanTransformer3DModel", 5)
    assert model.probe_depth == 1 and [*model.contexts] == ["cond", "uncond"]
    per_sample = []
    for seed in (0, 1):
        seen = seen_by_hooks(pipe.transformer, ["blocks"], lambda s=seed: generate("wan", pipe, s))
        assert len(seen) == 2 * NUM_STEPS
        per_sample.append([world_of(seen[k::2]).moments() for k in (0, 1)])
    assert made.elements == seen[0][0].numel()
    for branch, moments in enumerate(model.contexts.values()):
        assert moments.first == 0
        for name in ("rr", "qq", "rq", "pp"):
            one, two = (getattr(each[branch], name) for each in per_sample)
            expected = (one + two) / 2
            assert torch.allclose(getattr(moments, name), expected, rtol=1e-5, atol=1e-9), name
    outputs = torch.stack([generate("wan", pipe, seed) for seed in (0, 1)])
    assert made.peak == pytest.approx(float(outputs.max() - outputs.min()))


def test_of_many_elements_the_same_few_are_taken_in_every_step() -> None:
    pipe = tiny("wan")
    few, same, deep = (
        calibrate(pipe, lambda i: generate("wan", pipe, i), 1, gains=0, **options)
        for options in ({"elements": 100}, {"elements": 100}, {"probe_depth": 2})
    )
    (one,), (two,), (three,) = (each.models.values() for each in (few, same, deep))
    assert few.elements == 100 and three.probe_depth == 2
    moments = one.contexts["cond"]
    assert torch.equal(moments.rr, two.contexts["cond"].rr)
    assert torch.linalg.matrix_rank(moments.rr) == NUM_STEPS  # of one choice: a Gram matrix
    assert (torch.linalg.eigvalsh(moments.rr) > -1e-9 * moments.rr.max()).all()
    # A fair choice: about the moments of all elements.
    whole = calibrate(pipe, lambda i: generate("wan", pipe, i), 1, gains=0).models["transformer"]
    assert torch.allclose(moments.pp, whole.contexts["cond"].pp, rtol=0.5)
    assert (three.contexts["cond"].qq.diagonal() != whole.contexts["cond"].qq.diagonal()).all()


def test_gains_are_those_of_a_step_that_is_filled_in_by_hand() -> None:
    """The last block's tokens are replaced by a hook, in an un-cached run."""
    model = build("flux", **DEEP)
    loop = Loop(model)
    made = calibrate(model, loop, samples=1, gains=NUM_STEPS - 2)
    (known,) = made.models["transformer"].contexts.values()
    plain, change = loop(0), {}
    for step in range(2, NUM_STEPS):  # a plan reuses none before
        filled = loop(0, fill=(step, Extrapolation(known)))
        change[step] = float((filled - plain).square().mean().sqrt()) / loop.error
    # The assumed shape, bent by a parabola towards these; the last step has its own.
    assert made.gains[-1] == pytest.approx(change[NUM_STEPS - 1], rel=1e-3)
    times = made.timesteps
    shape = [made.step_size(k) * (1 - 0.8 * times[k] / times[0]) for k in range(NUM_STEPS)]
    places, inner = np.linspace(-1, 1, NUM_STEPS), [*range(2, NUM_STEPS - 1)]
    logs = np.array([math.log(change[k] / shape[k]) for k in inner])
    powers = np.vander(places[inner], 3, increasing=True)
    bend = np.linalg.solve(powers.T @ powers + np.diag([0, 2, 2]), powers.T @ logs)
    for step in range(NUM_STEPS - 1):
        expected = shape[step] * math.exp(bend @ places[step] ** np.arange(3))
        assert made.gains[step] == pytest.approx(expected, rel=1e-3)


class Loop:
    """A denoising loop of one's own around a bare Flux transformer."""

    def __init__(self, model: Any, num_steps: int = NUM_STEPS) -> None:
        self.model, self.num_steps = model, num_steps
        self.error = 0.0  # of the tokens that were filled in, rms

    def __call__(self, index: int, fill: Any = None) -> Tensor:
        given = calls("flux", self.num_steps, seed=index)
        latents = latents_of("flux", given[0])
        times = [float(each["timestep"].max()) for each in given]
        twin, window = Twin("flux", self.model), []
        for step, inputs in enumerate(given):
            inputs = with_latents("flux", inputs, latents)
            if fill is None:
                with self.model.cache_context("cond"):
                    velocity = run_model(self.model, inputs)
            else:
                velocity = self._step(twin, inputs, window, step, *fill)
            following = times[step + 1] if step + 1 < self.num_steps else 0.0
            latents = latents + (following - times[step]) / times[0] * velocity
        return latents

    def _step(
        self, twin: Twin, inputs: Any, window: list[Any], step: int, at: int, known: Extrapolation
    ) -> Tensor:
        call = twin.call(inputs)
        r, q = call.y - call.x, call.p - call.x
        if step != at:
            window.insert(0, (r, q))
            return call.output
        entries = tuple(range(step - 1, max(step - 4, -1), -1))
        w1, w2, w3 = known.weights(step, entries)
        (ra, qa), (rb, _), (rc, _) = (window[:3] + window[:3][-1:] * 2)[:3]
        filled = ra + w1 * (ra - rb) + w2 * (rb - rc) + w3 * (q - qa)
        self.error = float((filled - r).square().mean().sqrt())
        window.insert(0, (r, q))
        return twin.head(inputs, call.x + filled)


# --- every kind of model -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flux", "wan", "wan-2.2"])
def test_a_pipeline_is_calibrated_and_then_follows_its_plan(kind: str, tmp_path: Any) -> None:
    pipe, told = tiny(kind), []
    plain = generate(kind, pipe, 5)
    made = calibrate(
        pipe,
        lambda i: generate(kind, pipe, i),
        gains=4,
        about={"guidance": 5},
        progress=lambda done, of: told.append((done, of)),
    )
    assert is_plain(pipe) and torch.equal(generate(kind, pipe, 5), plain)
    assert told == [(k, 6) for k in range(1, 7)]
    assert made.about["guidance"] == 5 and made.peak > 0
    assert len(made.gains) == NUM_STEPS and min(made.gains) > 0
    spans = {
        name: {(each.first, each.num_steps) for each in model.contexts.values()}
        for name, model in made.models.items()
    }
    if kind == "wan-2.2":
        ((one,), (two,)) = spans.values()
        assert one[0] == 0 < one[1] == two[0] and sum(two) == NUM_STEPS and two[1] >= 3
    else:
        assert spans == {"transformer": {(0, NUM_STEPS)}}
    made.save(tmp_path / "a.json")
    apply_dicache(pipe, DiCacheConfig(profile=tmp_path / "a.json", target_speedup=1.5))
    for _ in range(2):
        generate(kind, pipe, 5)
        done = get_stats(pipe)
        reused = {
            name: [mask(each).count("R") for each in stats.contexts.values()]
            for name, stats in done.items()
        }
        assert all(len({*each}) == 1 for each in reused.values())  # branches as one
        blocks = made.models["transformer"].identity.num_blocks
        total = sum(each[0] for each in reused.values())
        work = NUM_STEPS * blocks - total * (blocks - 1)
        assert abs(work - NUM_STEPS * blocks / 1.5) <= (blocks - 1) / 2
    remove_dicache(pipe)


def test_a_calibrated_pipeline_is_nearer_to_the_uncached_one() -> None:
    """At the same steps: by weights of its own against the rules' gamma."""
    pipe = tiny("flux")
    made = calibrate(pipe, lambda i: generate("flux", pipe, i), gains=0)
    plain = generate("flux", pipe, 7)
    away = {}
    for profile in (made, None):
        apply_dicache(pipe, DiCacheConfig(profile=profile, schedule="CCCRCRCC"))
        away[profile] = float((generate("flux", pipe, 7) - plain).square().mean())
        remove_dicache(pipe)
    assert away[made] < 0.9 * away[None]


def test_a_model_of_ones_own_loop_is_calibrated_and_then_follows_its_plan() -> None:
    model = build("flux", **DEEP)
    made = calibrate(model, Loop(model), samples=1, gains=3)
    apply_dicache(
        model, DiCacheConfig(profile=made, target_speedup=1.5, num_inference_steps=NUM_STEPS)
    )
    Loop(model)(3)
    assert get_stats(model).num_reused == 3
    remove_dicache(model)


@pytest.mark.parametrize("names", [("model",), ("high_noise_model", "low_noise_model")])
def test_an_original_model_is_calibrated_by_its_holder(names: tuple[str, ...]) -> None:
    kind = "t2v" if len(names) == 1 else "2.2"
    holder = WanT2V(**{name: build_original(kind, k) for k, name in enumerate(names)})

    def generation(index: int) -> Tensor:
        """A loop whose steps follow from each other."""
        latents, made = None, None
        given = branches(kind, seed=10)
        moments = [*steps(kind, 12, seed=index)]
        for (start, time), (_, following) in pairwise([*moments, (None, torch.zeros(1))]):
            latents = start if latents is None else latents
            name = names[0] if float(time) >= 500 else names[-1]
            cond, uncond = (ask(getattr(holder, name), latents, time, each, kind) for each in given)
            made = uncond + 2.0 * (cond - uncond)
            step = (float(following) - float(time)) / 1000
            latents = [each + step * v for each, v in zip(latents, made, strict=True)]
        return torch.stack(latents)

    made = calibrate(holder, generation, gains=3)
    assert is_plain(holder)
    spans = [
        [(each.first, each.num_steps) for each in model.contexts.values()]
        for model in made.models.values()
    ]
    assert [*made.models] == [*names]
    assert spans == ([[(0, 12)] * 2] if kind == "t2v" else [[(0, 7)] * 2, [(7, 5)] * 2])
    config = DiCacheConfig(profile=made, target_speedup=1.6, num_inference_steps=12)
    apply_dicache(holder, config)
    generation(4)
    stats = get_stats(holder)
    stats = stats if isinstance(stats, dict) else {"model": stats}
    reused = [mask(each).count("R") for one in stats.values() for each in one.contexts.values()]
    assert sum(reused) == 2 * round(12 * (1 - (1 / 1.6 - 0.2) / 0.8))
    remove_dicache(holder)


@pytest.mark.parametrize(("kind", "branches_"), [("flux", 1), ("wan", 2)])
def test_a_pipelines_planned_step_waits_for_no_decision(
    kind: str, branches_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny(kind)
    made = calibrate(pipe, lambda i: generate(kind, pipe, i), 1, gains=0)
    apply_dicache(pipe, DiCacheConfig(profile=made, target_speedup=1.7, veto=None))
    generate(kind, pipe)  # what is learned of a model is learned once
    read: list[list[Any]] = []
    wait = Readback.wait
    monkeypatch.setattr(Readback, "wait", lambda each: read.append(wait(each)) or read[-1])
    generate(kind, pipe)
    reused = get_stats(pipe)["transformer"].num_reused
    read = [each for each in read if each]
    # The run's timesteps; and of a reused step its timestep, when the next one is there.
    assert read[0] == [pytest.approx([*made.timesteps])]
    assert len(read) - 1 <= reused and reused == 4 * branches_
    scale = 1000 if kind == "flux" else 1  # what the model is given, which is read
    assert {round(scale * number) for (number,) in read[1:]} <= {*map(round, made.timesteps)}


def test_compiled_blocks_are_calibrated_and_planned_as_others() -> None:
    outputs, profiles = [], []
    for compiles in (False, True):
        pipe = tiny("flux")
        if compiles:
            torch._dynamo.reset()
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        profiles.append(calibrate(pipe, lambda i, p=pipe: generate("flux", p, i), 1, gains=2))
        apply_dicache(pipe, DiCacheConfig(profile=profiles[-1], target_speedup=1.5))
        outputs.append(
            (generate("flux", pipe, 4), mask(get_stats(pipe)["transformer"].contexts["cond"]))
        )
    assert profiles[0].gains == pytest.approx(profiles[1].gains, rel=1e-3)
    (plain, done), (compiled, also) = outputs
    assert done == also and "R" in done
    assert torch.allclose(plain, compiled, atol=1e-4)


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("fails_in", [0, 1, 2])
def test_a_run_that_fails_leaves_no_cache_behind(fails_in: int) -> None:
    pipe, count = tiny("wan"), []

    def broken(index: int) -> Tensor:
        count.append(index)
        if len(count) == fails_in + 1:
            raise RuntimeError("out of memory")
        return generate("wan", pipe, index)

    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(pipe, broken, samples=2, gains=2)
    assert is_plain(pipe)


def test_a_model_that_has_a_cache_is_refused_and_keeps_it() -> None:
    pipe = tiny("wan")
    apply_dicache(pipe, DiCacheConfig(threshold=0.5))
    with pytest.raises(ValueError, match="remove_dicache"):
        calibrate(pipe, lambda i: generate("wan", pipe, i))
    assert not is_plain(pipe)
    remove_dicache(pipe)


def outputs_of(kind: str) -> Any:
    latents = torch.zeros(1, 3, 4, 4)
    return {
        "uint8": latents.to(torch.uint8),
        "list": [latents],
        "array": latents.numpy(),
        "nothing": None,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "named"),
    [("uint8", "torch.uint8"), ("list", "list"), ("array", "ndarray"), ("nothing", "NoneType")],
)
def test_a_run_that_returns_no_numbers_is_told_what_to_return(kind: str, named: str) -> None:
    pipe = tiny("wan")
    with pytest.raises(TypeError) as error:
        calibrate(pipe, lambda i: outputs_of(kind), samples=1)
    assert f"run(0) returned {named}. Expected a floating-point tensor" in str(error.value)
    assert is_plain(pipe)


def test_runs_of_two_kinds_are_refused() -> None:
    pipe = tiny("wan")
    for changes in ({"num_inference_steps": 5}, {"guidance_scale": 1.0}):
        with pytest.raises(ValueError, match="The runs differ in their contexts or steps"):
            calibrate(
                pipe, lambda i, c=changes: generate("wan", pipe, i, **(c if i else {})), gains=0
            )


def test_a_run_that_drives_another_model_is_refused() -> None:
    pipe, other = tiny("wan"), tiny("wan")
    with pytest.raises(ValueError, match="No step of the model was seen"):
        calibrate(pipe, lambda i: generate("wan", other, i), gains=0)


def test_a_profile_of_one_expert_is_none_of_both() -> None:
    pipe = tiny("wan-2.2")
    one = pipeline("wan", transformer=pipe.transformer_2)
    made = calibrate(pipe, lambda i: generate("wan", one, i), 1, gains=0)
    with pytest.raises(ValueError, match="does not know this model, transformer: WanTransformer3D"):
        apply_dicache(pipe, DiCacheConfig(profile=made, target_speedup=1.5))
    assert is_plain(pipe)


@pytest.mark.parametrize("where", ["model", "output"])
def test_nan_is_refused(where: str) -> None:
    warnings.simplefilter("ignore", DiCacheWarning)
    pipe = tiny("wan")
    if where == "model":
        pipe.transformer.blocks[-1].ffn.net[0].proj.bias.data[0] = math.nan
    spoils = 1.0 if where == "model" else math.nan
    with pytest.raises(ValueError, match="NaN|not finite"):
        calibrate(pipe, lambda i: spoils * generate("wan", pipe, i).nan_to_num(), gains=0)


def test_pictures_that_are_rounded_are_told_from_what_can_be_measured() -> None:
    pipe = tiny("wan")
    with pytest.raises(ValueError, match="changed nothing at the end of any run"):
        calibrate(pipe, lambda i: (generate("wan", pipe, i) / 1e6).round(), samples=1, gains=2)
    assert is_plain(pipe)


@pytest.mark.parametrize("numbers", [{"samples": 0}, {"gains": -1}])
def test_numbers_of_runs_are_checked_before_any(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Expected >= 1 and >= 0"):
        calibrate(object(), lambda i: pytest.fail("was run"), **numbers)


def test_a_short_run_measures_as_many_gains_as_it_has_steps_to_reuse() -> None:
    model, told = build("flux", **DEEP), []
    made = calibrate(
        model, Loop(model, 4), 1, gains=8, progress=lambda done, of: told.append((done, of))
    )
    assert told[-1] == (3, 3) and isinstance(made, Profile) and len(made.gains) == 4


def test_an_expert_alone_is_told_from_the_other_one_by_its_pipeline() -> None:
    pipe = tiny("wan-2.2")
    made = calibrate(pipe, lambda i: generate("wan-2.2", pipe, i), 1, gains=0)
    with pytest.raises(ValueError, match="knows several models like this one"):
        apply_dicache(pipe.transformer_2, DiCacheConfig(profile=made, target_speedup=1.5))
    with pytest.raises(ValueError, match="does not know this model"):
        apply_dicache(tiny("flux"), DiCacheConfig(profile=made, target_speedup=1.5))
    assert is_plain(pipe)
