"""What long-lived servers and impatient users do to a pipeline, on real diffusers classes.

The reference is what the same call gives on a fresh pipeline, or without a cache. Tests marked as
expected failures are defects that are known: they begin to fail, as "unexpectedly passing", when
the defect is gone, and the mark has to go with it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    CacheMixin,
    FlowMatchHeunDiscreteScheduler,
    WanImageToVideoPipeline,
)
from tiny_models import FAMILIES, blocks, build, calls, run_model
from tiny_pipelines import PIPELINES, by_branch, pipeline, record, run, scheduler, text
from torch import Tensor, nn
from twin import Twin, assert_close, expected_run

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    apply_dicache,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from dicache.adapters.diffusers.attach import sessions
from dicache.demo import pipelines as demo

# Of six steps floor(0.34 * 6) = 2 are retained, the last is computed, and all between are reused:
# whoever counts steps wrongly, or begins in the middle, gets another mask.
RULES = DiCacheConfig(
    threshold=math.inf, retention_ratio=0.34, compute_last_step=True, gamma_range=(0.0, 2.0)
)
MASK = "CCRRRC"
NEVER = DiCacheConfig(threshold=0)  # no step is reused, but every step goes through the cache
LETTERS = {"compute": "C", "resume": "C", "reuse": "R"}
ORDERS = ("cache first", "cache last")


def cached(name: str, rules: DiCacheConfig = RULES, **parts: Any) -> Any:
    """A fresh pipeline with a cache."""
    pipe = pipeline(name, **parts)
    apply_dicache(pipe, rules)
    return pipe


def masks(model: Any) -> dict[str, str]:
    """What a transformer, or a pipeline's only one, computed and reused, by context."""
    stats = get_stats(model)
    stats = stats["transformer"] if isinstance(stats, dict) else stats
    return {
        name: "".join(LETTERS[step.action] for step in steps)
        for name, steps in stats.contexts.items()
    }


def outputs(model: nn.Module, steps: list[dict[str, Any]]) -> list[Tensor]:
    return [run_model(model, inputs) for inputs in steps]


def check_next_run(name: str, used: Any, fresh: Any, num_steps: int = 6, **changes: Any) -> None:
    """The next call of a used pipeline gives what it gives on a fresh one, on the same schedule."""
    expected = run(name, fresh, num_steps, **changes)
    assert torch.equal(run(name, used, num_steps, **changes), expected)
    assert get_stats(used) == get_stats(fresh)


def in_order(order: str, cache: Callable[[], Any], other: Callable[[], Any]) -> None:
    for step in (cache, other) if order == "cache first" else (other, cache):
        step()


# Calls that differ from one to the next in everything that a server lets its users choose.

_TRUE_GUIDANCE = PIPELINES["flux-true-guidance"].arguments()
CALLS: dict[str, list[dict[str, Any]]] = {
    "flux": [
        {},
        {"num_images_per_prompt": 2},
        {**_TRUE_GUIDANCE, "num_steps": 9},
        {"height": 32, "width": 96},
        {**_TRUE_GUIDANCE, "num_images_per_prompt": 3},
        {"num_steps": 4},
    ],
    "flux-img2img": [{}, {"strength": 1.0}, {"strength": 0.25}, {"num_steps": 9}, {}],
    "wan": [
        {},
        {"guidance_scale": 1.0},
        {"num_videos_per_prompt": 2, "num_frames": 9},
        {"guidance_scale": 1.0, "num_steps": 9},
        {"height": 32, "width": 32},
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_with_other_arguments_equal_a_fresh_pipelines(name: str) -> None:
    used = cached(name)
    for arguments in CALLS[name]:
        check_next_run(name, used, cached(name), **arguments)
        assert all("R" in mask for mask in masks(used).values())


def test_another_scheduler_between_runs() -> None:
    used = cached("wan")
    for make in (scheduler, lambda _: FlowMatchHeunDiscreteScheduler(), scheduler):
        used.scheduler = make("wan")
        check_next_run("wan", used, cached("wan", scheduler=make("wan")))


# Ends of a run that leave a history behind: the disturbance is put on, and has to come off again.


class StopError(Exception):
    """Raised by a test in the middle of a run."""


@contextmanager
def stopped_in_a_block(pipe: Any, step: int, error: type[BaseException]) -> Iterator[dict]:
    steps = itertools.count()

    def stop(*_: Any) -> None:
        if next(steps) >= step:
            raise error

    hook = pipe.transformer.norm_out.register_forward_pre_hook(stop)
    yield {}
    hook.remove()


@contextmanager
def stopped_in_the_scheduler(pipe: Any, step: int, error: type[BaseException]) -> Iterator[dict]:
    steps, real = itertools.count(), pipe.scheduler.step

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(steps) >= step:
            raise error
        return real(*args, **kwargs)

    pipe.scheduler.step = stop
    yield {}
    del pipe.scheduler.step


@contextmanager
def stopped_in_a_callback(pipe: Any, step: int, error: type[BaseException]) -> Iterator[dict]:
    def stop(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == step:
            raise error
        return {}

    yield {"callback_on_step_end": stop}


@pytest.mark.parametrize("error", (StopError, KeyboardInterrupt))
@pytest.mark.parametrize("step", (0, 3))
@pytest.mark.parametrize(
    "stopped", (stopped_in_a_block, stopped_in_the_scheduler, stopped_in_a_callback)
)
@pytest.mark.parametrize("name", ("flux-true-guidance", "flux-img2img"))
def test_a_run_after_an_exception_equals_a_fresh_pipelines(
    name: str, stopped: Any, step: int, error: type[BaseException]
) -> None:
    """Of as many steps, so that their number does not tell that another run begins."""
    used = cached(name)
    with stopped(used, step, error) as changes, pytest.raises(error):
        run(name, used, seed=1, **changes)
    check_next_run(name, used, cached(name))


def test_a_bare_transformers_run_after_an_exception_in_its_first_step() -> None:
    """Without a pipeline's scheduler, the exception itself is what ends the run."""
    rules = DiCacheConfig(threshold=math.inf, num_inference_steps=6)
    used, fresh = pipeline("flux"), pipeline("flux")
    for pipe in (used, fresh):
        apply_dicache(pipe.transformer, rules)
    with stopped_in_a_block(used, 0, StopError), pytest.raises(StopError):
        run("flux", used, prompt_embeds=text(1))
    check_next_run("flux", used, fresh)


@pytest.mark.parametrize("name", ("flux", "flux-img2img", "wan", "hunyuan-video"))
def test_a_run_that_a_callback_ends_early(name: str) -> None:
    def stop(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        pipe._interrupt = index == 4
        return {}

    used = cached(name)
    run(name, used, 9, seed=1, callback_on_step_end=stop)
    assert set(masks(used).values()) == {"CCCRR"}  # floor(0.34 * 9) = 3 retained
    check_next_run(name, used, cached(name))


@pytest.mark.parametrize("step", (1, 9))  # in the first expert's steps, in the second one's
def test_the_experts_of_wan_2_2_after_an_exception(step: int) -> None:
    rules = replace(RULES, retention_ratio=0.2)  # floor(0.2 * 12) = 2 of each expert's steps

    def experts() -> Any:
        return cached("wan", rules, transformer_2=build("wan", seed=1), boundary_ratio=0.5)

    used = experts()
    with stopped_in_a_callback(used, step, StopError) as changes, pytest.raises(StopError):
        run("wan", used, 12, seed=1, **changes)
    fresh = experts()
    check_next_run("wan", used, fresh, 12)
    assert all(stats.num_reused for stats in get_stats(fresh).values())


def test_an_experts_steps_are_as_large_as_they_are_to_a_single_model() -> None:
    """Where both experts are the same model, and so are the two steps before, errors are equal."""
    rules = DiCacheConfig(threshold=0, retention_ratio=0, compute_last_step=False)
    single = cached("wan", rules)
    experts = cached("wan", rules, transformer_2=build("wan"), boundary_ratio=0.5)
    assert torch.equal(run("wan", experts, 12), run("wan", single, 12))
    steps = get_stats(single)["transformer"].contexts["cond"]
    second = get_stats(experts)["transformer_2"].contexts["cond"]
    expected = [step.error for step in steps[-len(second) :]]
    assert [step.error for step in second[2:]] == pytest.approx(expected[2:], rel=1e-3)


@pytest.mark.parametrize("num_steps", (6, 30))
def test_a_bare_transformers_run_after_one_that_ended_in_its_first_step(num_steps: int) -> None:
    rules = DiCacheConfig(threshold=math.inf, num_inference_steps=num_steps)
    used, fresh = pipeline("flux"), pipeline("flux")
    for pipe in (used, fresh):
        apply_dicache(pipe.transformer, rules)
    with stopped_in_a_callback(used, 0, StopError) as changes, pytest.raises(StopError):
        run("flux", used, num_steps, prompt_embeds=text(1), **changes)
    check_next_run("flux", used, fresh, num_steps)


# What a callback may do to the cache and to the run.


def at_step(step: int, act: Callable[[Any], Any]) -> dict[str, Any]:
    """Arguments of a call whose callback acts after this step."""

    def callback(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == step:
            act(pipe)
        return {}

    return {"callback_on_step_end": callback}


@pytest.mark.parametrize(
    ("act", "mask"),
    [(reset_dicache, "CCRCCRRC"), (remove_dicache, "CCRCCCCC")],
    ids=["reset_dicache", "remove_dicache"],
)
def test_a_callback_takes_the_state_or_the_cache_away(act: Any, mask: str) -> None:
    """The window is empty then, but as two computed steps follow, a schedule gives the same."""
    used = cached("wan")
    latents = run("wan", used, 8, **at_step(2, act))
    assert torch.equal(latents, run("wan", cached("wan", DiCacheConfig(schedule=mask)), 8))


def test_a_callback_puts_the_cache_on() -> None:
    pipe = pipeline("wan")
    latents = run("wan", pipe, 8, **at_step(2, lambda pipe: apply_dicache(pipe, RULES)))
    assert torch.equal(latents, run("wan", cached("wan", DiCacheConfig(schedule="CCCCCRRC")), 8))
    check_next_run("wan", pipe, cached("wan"))


def test_a_callback_ends_guidance() -> None:
    """As `SDCFGCutoffCallback` does: from then on one branch is not called any more."""
    used = cached("wan")
    latents = run("wan", used, 8, **at_step(3, lambda pipe: setattr(pipe, "_guidance_scale", 1.0)))
    assert latents.isfinite().all()
    assert masks(used) == {"cond": "CCRRRRRC", "uncond": "CCRR"}
    check_next_run("wan", used, cached("wan"))


def test_a_callback_runs_another_pipeline_on_the_same_transformer() -> None:
    """A preview, say. It is computed, and so is what is left of the run around it."""
    outer = cached("flux")
    inner = pipeline("flux", transformer=outer.transformer)
    plain, previews = run("flux", pipeline("flux"), 4, seed=1), []
    with pytest.warns(DiCacheWarning, match="number of steps"):
        preview = at_step(2, lambda _: previews.append(run("flux", inner, 4, seed=1)))
        latents = run("flux", outer, **preview)
    assert torch.equal(previews[0], plain)
    expected = run("flux", cached("flux", DiCacheConfig(schedule="CCRCCC")))
    assert torch.equal(latents, expected)


def test_requests_in_lockstep_on_one_transformer_are_cached_each_for_itself() -> None:
    """What a server does that locks the transformer's call; threads add nothing to it.

    The first request's first call looks like one that was given up when the second one's comes, so
    its history begins a step later.
    """
    model = build("flux")
    rules = {"threshold": math.inf, "num_inference_steps": 8}
    apply_dicache(model, DiCacheConfig(**rules))
    requests = [calls("flux", 8, seed=seed) for seed in (0, 1)]
    alone = []
    for request, begins_at in zip(requests, (1, 0), strict=True):
        single = build("flux")
        apply_dicache(single, DiCacheConfig(**rules))
        first = outputs(build("flux"), request[:begins_at])
        alone.append([*first, *outputs(single, request[begins_at:])])
        alone[-1][-1] = outputs(build("flux"), request)[-1]  # a run's last step is computed
    for step in range(8):
        for request, expected in zip(requests, alone, strict=True):
            with model.cache_context("cond"):
                assert torch.equal(model(**request[step])[0], expected[step])
    assert masks(model) == {"cond": "CRRRRRRC", "cond#2": "CRRRRRC"}


@pytest.mark.parametrize("shares_text", (False, True))
@pytest.mark.parametrize("context", (None, "cond"))
def test_requests_that_take_turns_at_other_steps_are_computed_with_a_warning(
    context: str | None, shares_text: bool
) -> None:
    model, plain = build("flux"), build("flux")
    apply_dicache(model, DiCacheConfig(threshold=math.inf, num_inference_steps=8))
    requests = [calls("flux", 8, seed=seed) for seed in (0, 1)]
    for inputs in requests[1]:
        if shares_text:
            inputs["encoder_hidden_states"] = requests[0][0]["encoder_hidden_states"]
    order = [*requests[0][:3]]  # then the second one begins
    for ahead, behind in zip(requests[0][3:], requests[1], strict=False):
        order += [ahead, behind]
    told = []
    for index, inputs in enumerate(order):
        with ExitStack() as stack, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if context is not None:
                stack.enter_context(model.cache_context(context))
            output = model(**inputs)[0]
        told += [each for each in caught if issubclass(each.category, DiCacheWarning)]
        if index > 3:  # until the second one came, the first one was alone
            assert torch.equal(output, plain(**inputs)[0])
    assert len(told) == 1 and "take turns" in str(told[0].message)


# Other ways to step.


class HeunForFlux(FlowMatchHeunDiscreteScheduler):
    """Flux's pipeline hands over sigmas, which diffusers' Heun does not take."""

    def set_timesteps(self, device: Any, sigmas: Any, mu: float) -> None:
        super().set_timesteps(len(sigmas), device)


@pytest.mark.parametrize(
    ("name", "heun"), [("flux", HeunForFlux), ("wan", FlowMatchHeunDiscreteScheduler)]
)
def test_two_evaluations_a_step(name: str, heun: Any) -> None:
    """Four steps are seven calls, at a timestep each two of which are equal; each is a step."""
    pipe = cached(name, scheduler=heun())
    recorded = record(pipe.transformer)
    run(name, pipe, 4)
    assert set(masks(pipe).values()) == {"CCRRRRC"}
    twin = Twin(name, build(name))
    for branch in by_branch(recorded):
        times = [float(call.inputs["timestep"].flatten()[0]) for call in branch]
        assert times[1::2] == times[2::2] and len(set(times)) == 4
        steps = [call.inputs for call in branch]
        expected = expected_run(twin, steps, "CCRRRRC", RULES.alignment, RULES.gamma_range)
        for call, step in zip(branch, expected, strict=True):
            assert_close(call.output, step.output)
    plain = run(name, pipeline(name, scheduler=heun()), 4)
    assert torch.equal(run(name, cached(name, NEVER, scheduler=heun()), 4), plain)


@pytest.mark.parametrize("num_steps", (1, 2, 3, 4))
@pytest.mark.parametrize("name", demo.DEMO_MODELS)
def test_a_few_steps_are_computed_bit_by_bit_and_the_stats_say_why(
    name: str, num_steps: int
) -> None:
    """On trained models: no two of so few steps are alike enough for the default."""
    pipe = demo.load_pipeline(name)
    arguments = demo.pipeline_inputs(name, demo.default_prompts(name)[0], 0, num_steps)
    arguments["return_dict"] = False
    plain = pipe(**arguments)[0]
    apply_dicache(pipe)
    assert torch.equal(pipe(**arguments)[0], plain)
    threshold = sessions(pipe)["transformer"].config.threshold
    for steps in get_stats(pipe)["transformer"].contexts.values():
        first, *others, last = steps if num_steps > 1 else [*steps, *steps]
        assert (first.action, last.action) == ("compute", "compute")
        for step in others:
            assert step.action == "resume" and step.accumulated_error >= threshold


def test_a_guided_run_of_one_step_has_both_branches_in_its_statistics() -> None:
    pipe = cached("wan")
    run("wan", pipe, 1)
    assert masks(pipe) == {"cond": "C", "uncond": "C"}


# The weights change, move, or are not what they seem.

WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(build("flux", seed=3).state_dict()),
    "fuse_qkv_projections": lambda model: model.fuse_qkv_projections(),
    "to(float64) and back": lambda model: model.double().float(),
    "a new attention processor": lambda model: model.set_attention_backend("_native_math"),
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_changed_weights_between_runs(change: str) -> None:
    used, changed = cached("flux"), build("flux")
    run("flux", used)
    WEIGHTS[change](used.transformer)
    WEIGHTS[change](changed)
    check_next_run("flux", used, cached("flux", transformer=changed))


def test_a_pipeline_that_changes_its_dtype_between_runs() -> None:
    used, fresh = cached("flux"), build("flux")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # what bf16 lost stays lost
        used.to(dtype)
        fresh = fresh.to(dtype)
        prompt = {"prompt_embeds": text(0).to(dtype)}
        prompt["pooled_prompt_embeds"] = prompt["prompt_embeds"][:, 0]
        again = pipeline("flux", transformer=fresh)
        apply_dicache(again, RULES)
        check_next_run("flux", used, again, **prompt)
        remove_dicache(again)
        assert masks(used) == {"cond": MASK}


def lora_weights() -> dict[str, Tensor]:
    """A LoRA file's contents for the tiny Flux."""
    generator, weights = torch.Generator().manual_seed(1), {}
    for index, name in itertools.product(range(2), ("to_q", "to_k", "to_v")):
        layer = f"transformer.transformer_blocks.{index}.attn.{name}"
        weights[f"{layer}.lora_A.weight"] = torch.randn(2, 24, generator=generator)
        weights[f"{layer}.lora_B.weight"] = 0.3 * torch.randn(24, 2, generator=generator)
    return weights


@pytest.mark.parametrize("rules", (RULES, NEVER), ids=["RULES", "NEVER"])
def test_lora_loaded_scaled_and_unloaded_between_runs(rules: DiCacheConfig) -> None:
    pytest.importorskip("peft")
    used, seen = cached("flux", rules), []
    states: list[Callable[[Any], Any]] = [
        lambda pipe: None,
        lambda pipe: pipe.load_lora_weights(lora_weights(), adapter_name="style"),
        lambda pipe: pipe.set_adapters("style", 0.5),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    for index, change in enumerate(states):
        change(used)
        fresh = pipeline("flux")  # the changes come before the cache
        for earlier in states[1 : index + 1]:
            earlier(fresh)
        plain = run("flux", fresh)
        apply_dicache(fresh, rules)
        check_next_run("flux", used, fresh)
        seen.append(run("flux", used))
        if rules is NEVER:
            assert torch.equal(seen[-1], plain)
    first, loaded, scaled, unloaded = seen
    assert torch.equal(first, unloaded)
    assert not torch.equal(first, loaded) and not torch.equal(loaded, scaled)


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` calls; that one refuses the CPU, cache or not."""
    device = torch.device("cpu")
    accelerate.cpu_offload(pipe.transformer, execution_device=device, offload_buffers=True)
    assert next(pipe.transformer.parameters()).is_meta


def group_offload(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)


def leaf_offload(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, "leaf_level")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "offload", (model_offload, sequential_offload, group_offload, leaf_offload)
)
@pytest.mark.parametrize("name", ("flux", "wan"))
def test_offloading(name: str, offload: Callable[[Any], None], order: str) -> None:
    pipe = pipeline(name)
    in_order(order, lambda: apply_dicache(pipe, RULES), lambda: offload(pipe))
    for _ in range(2):
        check_next_run(name, pipe, cached(name))
    remove_dicache(pipe)
    assert torch.equal(run(name, pipe), run(name, pipeline(name)))


def sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert next(model.parameters()).is_meta


def by_group(kind: str) -> Callable[[Any], None]:
    cpu, groups = torch.device("cpu"), {"num_blocks_per_group": 1}
    given = groups if kind == "block_level" else {}
    return lambda model: model.enable_group_offload(cpu, cpu, kind, **given)


# Their root has parameters of its own, which no hook brings, and diffusers refuses their groups.
NOT_OFFLOADED = ("hunyuan-dit",)


@pytest.mark.rules_out("offload")
@pytest.mark.parametrize("family", NOT_OFFLOADED)
def test_a_model_that_cannot_be_offloaded_cannot_without_the_cache_either(family: str) -> None:
    for offload in (sequential, by_group("block_level"), by_group("leaf_level")):
        model = build(family)
        with pytest.raises((RuntimeError, ValueError), match="device|group offloading"):
            offload(model)
            outputs(model, calls(family))


@pytest.mark.backs("offload")
@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in NOT_OFFLOADED])
def test_offloading_on_every_family(family: str) -> None:
    """By accelerate's hooks on every module, and by diffusers' on blocks and on leaves."""
    rules, steps = DiCacheConfig(schedule="CCRRCR"), calls(family)
    plain = build(family)
    apply_dicache(plain, rules)
    expected = outputs(plain, steps)
    for offload in (sequential, by_group("block_level"), by_group("leaf_level")):
        for order in ORDERS:
            model = build(family)
            in_order(order, lambda: apply_dicache(model, rules), lambda: offload(model))  # noqa: B023
            made = outputs(model, steps)
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
            assert get_stats(model) == get_stats(plain)


def in_dtype(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The pipeline's embeddings in another dtype."""
    given = PIPELINES[name].arguments().items()
    return {key: value.to(dtype) for key, value in given if isinstance(value, Tensor)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ("flux", "wan"))
def test_layerwise_casting(name: str, dtype: torch.dtype, order: str) -> None:
    """Weights in 8 bits, arithmetic in `dtype`: its hooks are on every layer, ours on the root."""

    def cast(pipe: Any) -> None:
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype)

    embeddings, made = in_dtype(name, dtype), []
    for rules in (None, NEVER, RULES):
        pipe = pipeline(name, transformer=build(name).to(dtype))
        if rules is None:
            cast(pipe)
        else:
            in_order(order, lambda: apply_dicache(pipe, rules), lambda: cast(pipe))  # noqa: B023
        made.append(run(name, pipe, **embeddings))
    stored = {parameter.dtype for parameter in pipe.transformer.parameters()}
    assert torch.float8_e4m3fn in stored
    plain, never, reused = made
    assert torch.equal(never, plain) and reused.isfinite().all()
    assert set(masks(pipe).values()) == {MASK}
    remove_dicache(pipe)
    assert torch.equal(run(name, pipe, **embeddings), plain)


def dynamic_int8(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but always there
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)


def torchao_int8(model: nn.Module) -> None:
    # Not among what the tests install: its wheel prints errors on every import of diffusers.
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("quantize", (dynamic_int8, torchao_int8))
def test_quantised_linears(quantize: Callable[[nn.Module], None], order: str) -> None:
    plain = pipeline("flux")
    full = run("flux", plain)
    quantize(plain.transformer)
    expected = run("flux", plain)
    assert not torch.equal(expected, full)
    for rules in (NEVER, RULES):
        pipe = pipeline("flux")
        in_order(order, lambda: apply_dicache(pipe, rules), lambda: quantize(pipe.transformer))  # noqa: B023
        latents = run("flux", pipe)
        assert torch.equal(latents, expected) == (rules is NEVER)
    assert masks(pipe) == {"cond": MASK}
    apply_dicache(plain, RULES)
    assert torch.equal(latents, run("flux", plain))  # whichever came first


def put_on_ip_adapter(model: nn.Module) -> None:
    """An IP-Adapter with random weights, as a file's contents; the tiny Flux is 24 wide."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    projection = {"proj.weight": random(64, 8), "proj.bias": random(64)}
    projection |= {"norm.weight": random(16), "norm.bias": random(16)}
    layers = {}
    for index, name in itertools.product(range(2), ("to_k_ip", "to_v_ip")):
        layers[f"{index}.{name}.weight"] = random(24, 16)
        layers[f"{index}.{name}.bias"] = random(24)
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ("flux", "flux-true-guidance"))
def test_ip_adapter(name: str, order: str) -> None:
    """The picture's embedding comes in `joint_attention_kwargs`, another one for each branch."""
    embeddings = {
        "ip_adapter_image_embeds": [torch.ones(1, 1, 8)],
        "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 8)],
    }
    plain = pipeline(name)
    without = run(name, plain)
    put_on_ip_adapter(plain.transformer)
    expected = run(name, plain, **embeddings)
    assert not torch.equal(expected, without)
    for rules in (NEVER, RULES):
        pipe = pipeline(name)
        model = pipe.transformer
        in_order(order, lambda: apply_dicache(pipe, rules), lambda: put_on_ip_adapter(model))  # noqa: B023
        recorded = record(model)
        latents = run(name, pipe, **embeddings)
        assert torch.equal(latents, expected) == (rules is NEVER)
    twin = Twin("flux", plain.transformer)
    for branch in by_branch(recorded):
        steps = [call.inputs for call in branch]
        for call in steps:  # the model replaces the embedding by what it made of it
            assert set(call["joint_attention_kwargs"]) == {"ip_adapter_image_embeds"}
        wanted = expected_run(twin, steps, MASK, RULES.alignment, RULES.gamma_range)
        for call, step in zip(branch, wanted, strict=True):
            assert_close(call.output, step.output)
    assert set(masks(pipe).values()) == {MASK}


def image_to_video(**parts: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    empty = dict.fromkeys(("tokenizer", "text_encoder", "image_processor", "image_encoder"))
    vae = vae.eval().requires_grad_(False)
    pipe = WanImageToVideoPipeline(**empty, vae=vae, scheduler=scheduler("wan"), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_image_to_video(pipe: Any, num_steps: int = 6) -> Tensor:
    picture = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    arguments = PIPELINES["wan"].arguments()
    return run("wan", pipe, num_steps, image=picture, **{"height": arguments["height"]})


IMAGE_TO_VIDEO: dict[str, Callable[[], dict[str, Any]]] = {
    "Wan 2.1": lambda: {"transformer": build("wan", in_channels=12)},
    "Wan 2.2, a timestep per token": lambda: {
        "transformer": build("wan"),
        "expand_timesteps": True,
    },
    "Wan 2.2, two experts": lambda: {
        "transformer": build("wan", in_channels=12),
        "transformer_2": build("wan", seed=1, in_channels=12),
        "boundary_ratio": 0.5,
    },
}


@pytest.mark.parametrize("kind", IMAGE_TO_VIDEO)
def test_image_to_video(kind: str) -> None:
    parts = IMAGE_TO_VIDEO[kind]
    plain = run_image_to_video(image_to_video(**parts()), 12)
    never, pipe, recorded = image_to_video(**parts()), image_to_video(**parts()), []
    apply_dicache(never, NEVER)
    assert torch.equal(run_image_to_video(never, 12), plain)
    apply_dicache(pipe, RULES)
    for _ in range(2):
        recorded.append(run_image_to_video(pipe, 12))
        for stats in get_stats(pipe).values():
            assert set(stats.contexts) == {"cond", "uncond"} and stats.num_reused > 0
    assert torch.equal(*recorded) and not torch.equal(recorded[0], plain)


# Autograd.


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.no_grad, torch.enable_grad))
def test_the_mode_around_a_pipeline_changes_nothing(mode: Any) -> None:
    expected = run("flux", cached("flux"))
    with mode():
        pipe = cached("flux", transformer=build("flux").requires_grad_(True))
        assert torch.equal(run("flux", pipe), expected)
    assert masks(pipe) == {"cond": MASK}


def gradients(model: nn.Module, inputs: dict[str, Any], of_inputs: bool) -> list[Tensor]:
    """Of every parameter that takes part, and of the tokens; zeros where nothing flows."""
    hidden = inputs["hidden_states"].clone().requires_grad_(of_inputs)
    output = model(**{**inputs, "hidden_states": hidden})[0]
    wanted = [each for each in (hidden, *model.parameters()) if each.requires_grad]
    return list(torch.autograd.grad(output.sin().sum(), wanted, materialize_grads=True))


def check_gradients(trained: str, of_inputs: bool = False) -> None:
    """With gradients for the parameters whose names contain `trained`, on every step of a run."""
    model, plain = build("flux"), build("flux")
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(trained in name)
    apply_dicache(model, DiCacheConfig(schedule="CCRCRC"))
    with torch.enable_grad():
        for inputs in calls("flux", 6):
            expected = gradients(plain, inputs, of_inputs)
            given = gradients(model, inputs, of_inputs)
            assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize(
    ("trained", "of_inputs"), [("", False), ("x_embedder", False), ("nothing", True)]
)
def test_gradients_are_right_and_a_warning_names_no_grad(trained: str, of_inputs: bool) -> None:
    with pytest.warns(DiCacheWarning, match="no_grad"):
        check_gradients(trained, of_inputs)


@pytest.mark.parametrize("trained", ("attn.to_q", "single_transformer_blocks.1"))
def test_gradients_of_blocks_behind_frozen_layers_are_right(trained: str) -> None:
    check_gradients(trained)


def test_gradients_of_the_text_alone_are_right() -> None:
    """As textual inversion wants them: no parameter of the transformer takes part."""
    model, plain = build("flux"), build("flux")
    apply_dicache(model, DiCacheConfig(threshold=math.inf, num_inference_steps=4))
    with torch.enable_grad(), pytest.warns(DiCacheWarning, match="Gradients"):
        for inputs in calls("flux", 4):
            found = []
            for each in (model, plain):
                text = inputs["encoder_hidden_states"].clone().requires_grad_(True)
                each(**{**inputs, "encoder_hidden_states": text})[0].sum().backward()
                found.append(text.grad)
            assert torch.equal(*found)


# Saving, copying, taking off.


def files(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")
    }


def test_saving_with_the_cache_on(tmp_path: Path) -> None:
    pipe = pipeline("flux")
    names = list(pipe.transformer.state_dict())
    pipe.transformer.save_pretrained(tmp_path / "before")
    apply_dicache(pipe, RULES)
    with stopped_in_a_callback(pipe, 3, StopError) as changes, pytest.raises(StopError):
        run("flux", pipe, **changes)  # so that the cache holds tensors
    assert list(pipe.transformer.state_dict()) == names
    pipe.transformer.save_pretrained(tmp_path / "after")
    assert files(tmp_path / "after") == files(tmp_path / "before")
    pipe.save_pretrained(tmp_path / "pipeline")
    saved = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "pipeline/transformer")
    assert not saved.is_cache_enabled
    saved.requires_grad_(False)
    check_next_run("flux", pipe, cached("flux", transformer=saved))


def test_a_model_is_pickled_after_removal() -> None:
    model, steps = build("flux"), calls("flux", 2)
    apply_dicache(model, DiCacheConfig(schedule="CR"))
    outputs(model, steps)
    remove_dicache(model)
    copied = pickle.loads(pickle.dumps(model))
    for output, expected in zip(outputs(copied, steps), outputs(model, steps), strict=True):
        assert torch.equal(output, expected)
    apply_dicache(copied, DiCacheConfig(schedule="CR"))
    outputs(copied, steps)
    assert masks(copied) == {"branch0": "CR"} and not model.is_cache_enabled


@pytest.mark.parametrize("make", (lambda: build("flux"), lambda: pipeline("flux")))
def test_pickling_a_cached_model_names_remove_dicache(make: Callable[[], Any]) -> None:
    model = make()
    apply_dicache(model, RULES)
    with pytest.raises((TypeError, pickle.PicklingError, AttributeError), match="remove_dicache"):
        pickle.dumps(model)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def attached(model: nn.Module) -> list[Any]:
    """What a module's call looks at: hooks, compiled calls and `forward`, of every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_compiled_call_impl")
    return [
        (name, module.forward, *(getattr(module, kind) for kind in kinds))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_gives_back_an_equal_model(family: str) -> None:
    model, steps = build(family), calls(family, 3)
    expected, before = outputs(model, steps), attached(model)
    modules, names = list(model.modules()), list(model.state_dict())
    apply_dicache(model, DiCacheConfig(schedule="CCR"))
    outputs(model, steps)
    remove_dicache(model)
    assert attached(model) == before and not getattr(model, "is_cache_enabled", False)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == names
    for output, plain in zip(outputs(model, steps), expected, strict=True):
        assert torch.equal(output, plain)


@pytest.mark.parametrize("is_patched_before", [False, True])
def test_a_class_that_is_patched_meanwhile_is_the_one_that_runs_after_removal(
    is_patched_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the `forward` that was there when the cache came stays on the model."""
    model, seen = build("flux"), []
    kind, forward = type(model), type(model).forward

    @functools.wraps(forward)
    def patched(*args: Any, **given: Any) -> Any:
        seen.append(1)
        return forward(*args, **given)

    monkeypatch.setattr(kind, "forward", patched if is_patched_before else forward)
    apply_dicache(model, DiCacheConfig(threshold=0.1, num_inference_steps=4))
    monkeypatch.setattr(kind, "forward", forward if is_patched_before else patched)
    remove_dicache(model)
    seen.clear()
    model(**calls("flux", 2)[0])
    assert len(seen) == (not is_patched_before) and "forward" not in vars(model)


def test_a_compile_of_the_users_own_is_put_back():
    """Whatever somebody set on the model before."""
    model = build("flux")
    model.compile = own = lambda: None
    apply_dicache(model, DiCacheConfig(threshold=0.1))
    assert model.compile is not own
    remove_dicache(model)
    assert vars(model)["compile"] is own


def test_removal_leaves_no_attribute_behind() -> None:
    model = build("flux")
    before = attributes(model)
    apply_dicache(model, RULES)
    remove_dicache(model)
    assert attributes(model) == before


# Threads.


def test_two_pipelines_in_two_threads() -> None:
    names = ("flux", "wan")
    fresh, used = ({name: cached(name) for name in names} for _ in range(2))
    expected = {name: run(name, fresh[name], 12) for name in names}
    start, made = threading.Barrier(2), {name: [] for name in names}

    def work(name: str) -> None:
        for _ in range(2):
            start.wait(30)
            made[name].append(run(name, used[name], 12))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert len(made[name]) == 2
        assert all(torch.equal(latents, expected[name]) for latents in made[name])
        assert get_stats(used[name]) == get_stats(fresh[name])


def test_a_call_during_another_threads_call_is_refused() -> None:
    model, plain = build("flux"), build("flux")
    apply_dicache(model, DiCacheConfig(schedule="CR"))
    (first, _), (second, _) = (calls("flux", 2, seed=seed) for seed in (0, 1))
    is_inside, may_go_on, made = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        if threading.current_thread() is thread:
            is_inside.set()
            may_go_on.wait(30)

    def work() -> None:
        with torch.no_grad():
            made.append(model(**first)[0])

    thread = threading.Thread(target=work)
    model.transformer_blocks[1].register_forward_pre_hook(wait)
    thread.start()
    try:
        assert is_inside.wait(30)
        with pytest.raises(RuntimeError, match="thread|at once|at the same time"):
            model(**second)
    finally:
        may_go_on.set()
        thread.join()
    assert torch.equal(made[0], plain(**first)[0])  # refusing one call leaves the other alone


# Numbers that are none.

SPOILED = DiCacheConfig(
    threshold=math.inf, retention_ratio=0.25, max_consecutive_reuse=1, num_inference_steps=8
)
CLEAN = "CCRCRCRC"


def spoil(family: str, model: nn.Module, block: int, step: int, value: float) -> Callable[[], Any]:
    """Put a value into one image token that this block returns in this call of the model.

    Returns what takes it out again.
    """
    count = itertools.count(-1)  # of calls; the hook on the block looks at the last one
    current = [next(count)]

    def begin(*_: Any) -> None:
        current[0] = next(count)

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        if current[0] != step:
            return output
        parts = list(output) if isinstance(output, tuple) else [output]
        place = FAMILIES[family].image_output if len(parts) > 1 else 0
        parts[place] = parts[place].clone()
        parts[place][0, -1, 0] = value
        return tuple(parts) if isinstance(output, tuple) else parts[0]

    hooks = [
        model.register_forward_pre_hook(begin),
        blocks(family, model)[block].register_forward_hook(replace),
    ]
    return lambda: [hook.remove() for hook in hooks]


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize(
    ("block", "step"),
    [(0, 0), (0, 1), (0, 2), (0, 5), (1, 0), (1, 3), (2, 1), (3, 0), (3, 1), (3, 5)],
)
@pytest.mark.parametrize("family", ("flux", "wan"))
def test_a_spoiled_step_is_computed_and_spoils_no_other(
    family: str, block: int, step: int, value: float
) -> None:
    """Block 0 is the probe, so that only there a step that would be reused (2) can be spoiled."""
    steps, plain, model = calls(family, 8), build(family), build(family)
    restore = spoil(family, plain, block, step, value)
    expected = outputs(plain, steps)
    restore()
    broken = [not output.isfinite().all() for output in expected]
    assert broken == [index == step for index in range(8)]
    apply_dicache(model, SPOILED)
    restore = spoil(family, model, block, step, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = outputs(model, steps)
    restore()
    told = [each for each in caught if issubclass(each.category, DiCacheWarning)]
    assert len(told) == 1 and "NaN or infinity" in str(told[0].message)
    (mask,) = masks(model).values()
    assert mask[step] == "C" and "R" in mask
    for letter, output, wanted in zip(mask, given, expected, strict=True):
        if letter == "C":
            torch.testing.assert_close(output, wanted, rtol=0, atol=0, equal_nan=True)
        else:
            assert output.isfinite().all()
    fresh = build(family)
    apply_dicache(fresh, SPOILED)
    for output, wanted in zip(outputs(model, steps), outputs(fresh, steps), strict=True):
        assert torch.equal(output, wanted)
    assert get_stats(model) == get_stats(fresh) and masks(model) == {"branch0": CLEAN}


def test_warnings_that_are_errors_leave_nothing_behind() -> None:
    """A decision that raises has had its step: what follows is a new run."""
    model, fresh, steps = build("flux"), build("flux"), calls("flux", 8)
    for each in (model, fresh):
        apply_dicache(each, SPOILED)
    restore = spoil("flux", model, 3, 1, math.nan)
    with warnings.catch_warnings(), pytest.raises(DiCacheWarning):
        warnings.simplefilter("error")
        outputs(model, steps)
    restore()
    for output, wanted in zip(outputs(model, steps), outputs(fresh, steps), strict=True):
        assert torch.equal(output, wanted)
    assert get_stats(model) == get_stats(fresh)


def test_tokens_at_the_end_of_fp16s_range_stay_finite() -> None:
    model, plain = build("flux").half(), build("flux").half()
    for each in (model, plain):
        last = each.single_transformer_blocks[-1]
        last.proj_out.bias[0] = 6e4  # the first of 24 channels is clipped in every token
        last.norm.linear.bias[48] = 3.0
        each.x_embedder.weight *= 20  # and moves by more than fp16's last digit there
    steps = calls("flux", 6)
    prompt = steps[0]["encoder_hidden_states"].half()
    for inputs in steps:
        for key in ("hidden_states", "pooled_projections", "timestep"):
            inputs[key] = inputs[key].half()
        inputs["encoder_hidden_states"] = prompt
    assert all(output.isfinite().all() for output in outputs(plain, steps))
    apply_dicache(model, DiCacheConfig(schedule="CCRRCR"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # r = y - x overflows too, which is noticed
        assert all(output.isfinite().all() for output in outputs(model, steps))


# diffusers' own promises about caches, where a model's class has its switches.

WITH_SWITCHES = [
    name
    for name, family in FAMILIES.items()
    if issubclass(getattr(diffusers, family.model_class), CacheMixin)
]


@pytest.mark.parametrize("family", WITH_SWITCHES)
def test_the_switches_of_diffusers_on_every_family(family: str) -> None:
    """What diffusers' own tests ask of a cache: state, no second one, contexts, reset, no trace."""
    model, steps, config = build(family), calls(family, 3), DiCacheConfig(schedule="CRR")
    plain = outputs(model, steps)
    assert not model.is_cache_enabled
    model.enable_cache(config)
    assert model.is_cache_enabled
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(config)
    for inputs in steps[:2]:
        for name in ("cond", "uncond"):
            with model.cache_context(name):
                model(**inputs)
    assert masks(model) == {"cond": "CR", "uncond": "CR"}
    model._reset_stateful_cache()
    with model.cache_context("cond"):  # the same run would go on with a reused step
        assert torch.equal(run_model(model, steps[2]), plain[2])
    assert masks(model) == {"cond": "C"}
    model.disable_cache()
    assert not model.is_cache_enabled
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, steps), plain, strict=True))
    model.disable_cache()  # diffusers logs that there is none
    model.enable_cache(config)
    assert not torch.equal(outputs(model, steps)[1], plain[1])
