"""What lies behind the probe changes in the middle of a run, and the probe sees nothing of it.

From the step of the change on, a run has to be the run that begins there: two steps are computed,
and what is reused afterwards has nothing of the time before in it.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from helpers import mask, masks
from peft import LoraConfig
from test_hard_use import put_on_ip_adapter
from tiny_models import branches, build, calls
from tiny_pipelines import ControlVae, control_net_for, pipeline, text
from tiny_pipelines import run as run_pipeline
from torch import Tensor, nn

from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.core.behind import Added, Prompt
from dicache.core.moves import FirstMoves
from dicache.core.readback import Readback
from dicache.core.sample import rows_of
from dicache.demo import pipelines as demo
from dicache.driver.conditions import Conditions

ALWAYS = DiCacheConfig(threshold=math.inf, retention_ratio=0, compute_last_step=False)
NUM_STEPS, CHANGES_AT = 9, 4
# Reused until the change, and again after two steps of the new state.
MASK = "CRRRCCRRR"

Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """Something that a run may change.

    Attributes:
        family: Of the model.
        prepare: Makes a model ready for it.
        before, after: Arguments that every call has before and after the change.
        act: What happens to the model between the two.
    """

    family: str
    prepare: Callable[[nn.Module], None] = lambda model: None
    before: dict[str, Any] | Callable[[int], dict[str, Any]] = lambda step: {}
    after: dict[str, Any] | Callable[[int], dict[str, Any]] = lambda step: {}
    act: Callable[[nn.Module], None] = lambda model: None


def residuals(
    kind: str, count: int, scale: float, seed: int = 11
) -> Callable[[int], dict[str, Any]]:
    """A ControlNet's, which differ a little from step to step."""

    def of_step(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(count):
            start, way = torch.randn(2, 2, 16, 24, generator=generator)
            made.append(scale * (start + 0.03 * step * way))
        return {kind: made}

    return of_step


def both(scale: float) -> Callable[[int], dict[str, Any]]:
    double = residuals("controlnet_block_samples", 2, scale)
    single = residuals("controlnet_single_block_samples", 2, scale)
    return lambda step: double(step) | single(step)


def qwen(scale: float) -> Callable[[int], dict[str, Any]]:
    return residuals("controlnet_block_samples", 2, scale)


def single(scale: float) -> Callable[[int], dict[str, Any]]:
    return residuals("controlnet_single_block_samples", 1, scale)


def one_net(seed: int, scale: float = 1.0) -> Callable[[int], dict[str, Any]]:
    """One of several, whose residuals a pipeline adds up."""
    return residuals("controlnet_block_samples", 2, scale, seed)


def both_nets(step: int) -> dict[str, Any]:
    one, other = one_net(11)(step), one_net(12)(step)
    (name,) = one
    return {name: [a + b for a, b in zip(one[name], other[name], strict=True)]}


def of_one_picture(step: int) -> dict[str, Any]:
    (name,) = one_net(11)(step)
    return {
        name: [each * torch.tensor([1.0, 0.0])[:, None, None] for each in one_net(11)(step)[name]]
    }


def put_on_lora(model: nn.Module) -> None:
    """On the single blocks alone: the probe is the same with and without it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        targets = ".*single_transformer_blocks.*(to_q|proj_mlp)"
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config, "style")


def scale_layers(model: nn.Module, which: str, scale: float) -> None:
    """What `set_adapters` does with a dictionary of scales."""
    for name, module in model.named_modules():
        if name.endswith(which) and hasattr(module, "set_scale"):
            module.set_scale("style", scale)


def exchange_lora(model: nn.Module) -> None:
    """Another one under the same name."""
    model.delete_adapters("style")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        targets = ".*single_transformer_blocks.*(to_q|proj_mlp)"
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), "style")


def write_into_lora(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data  # as a move to a device does: no write
            parameter.mul_(-1)


def scale_ip_adapter(scale: float) -> Callable[[nn.Module], None]:
    def act(model: Any) -> None:
        for processor in list(model.attn_processors.values())[:2]:
            processor.scale = [scale]

    return act


IMAGE_PROMPT = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.ones(2, 1, 8)]}}
CHANGES = {
    "control begins": Change("flux", after=both(1.0)),
    "control ends": Change("flux", before=both(1.0)),
    "control ends, by zeros": Change("flux", before=both(1.0), after=both(0.0)),
    "control begins, from zeros": Change("flux", before=both(0.0), after=both(1.0)),
    "control is scaled down": Change("flux", before=both(1.0), after=both(0.5)),
    "control is scaled up": Change("flux", before=both(0.5), after=both(0.75)),
    "control of single blocks": Change("flux", before=single(1.0), after=single(0.3)),
    "control of another kind": Change("flux", before=both(1.0), after=single(1.0)),
    "control turns its sign": Change("flux", before=both(1.0), after=both(-1.0)),
    "one net hands over to another": Change("flux", before=one_net(11), after=one_net(12)),
    "one of two nets ends": Change("flux", before=both_nets, after=one_net(12)),
    "one of two nets begins": Change("flux", before=one_net(12), after=both_nets),
    "one picture of a batch loses it": Change("flux", before=one_net(11), after=of_one_picture),
    "one picture of a batch gets it": Change("flux", before=of_one_picture, after=one_net(11)),
    "chroma's control": Change("chroma", before=both(1.0), after=both(0.0)),
    "qwen's control": Change("qwen-image", before=qwen(0.3), after=qwen(1.0)),
    "qwen's control ends": Change("qwen-image", before=qwen(1.0)),
    "set_adapters": Change("flux", put_on_lora, act=lambda m: m.set_adapters("style", 0.3)),
    "disable_lora": Change("flux", put_on_lora, act=lambda model: model.disable_lora()),
    "fuse_lora": Change("flux", put_on_lora, act=lambda model: model.fuse_lora(0.5)),
    "delete_adapters": Change("flux", put_on_lora, act=lambda m: m.delete_adapters("style")),
    "another LoRA of the same name": Change("flux", put_on_lora, act=exchange_lora),
    "a LoRA's weights are written": Change("flux", put_on_lora, act=write_into_lora),
    "a LoRA's scale in some layers": Change(
        "flux", put_on_lora, act=lambda model: scale_layers(model, "proj_mlp", 0.2)
    ),
    "a LoRA's scale in other layers": Change(
        "flux", put_on_lora, act=lambda model: scale_layers(model, "to_q", -1.0)
    ),
    "a LoRA comes": Change("flux", act=put_on_lora),
    "scale of LoRAs in the call": Change(
        "flux",
        put_on_lora,
        before={"joint_attention_kwargs": {"scale": 1.0}},
        after={"joint_attention_kwargs": {"scale": 0.4}},
    ),
    "set_ip_adapter_scale": Change(
        "flux", put_on_ip_adapter, IMAGE_PROMPT, IMAGE_PROMPT, scale_ip_adapter(0.2)
    ),
}


def make(change: Change) -> nn.Module:
    model = build(change.family)
    change.prepare(model)
    return model


def steps_of(change: Change) -> Steps:
    steps = calls(change.family, NUM_STEPS)
    for index, inputs in enumerate(steps):
        added = change.before if index < CHANGES_AT else change.after
        inputs.update(added(index) if callable(added) else added)
    return steps


def run(change: Change, model: nn.Module, steps: Steps, begin: int = 0) -> list[Tensor]:
    outputs = []
    for index in range(begin, len(steps)):
        if index == max(CHANGES_AT, begin):
            change.act(model)
        outputs.append(model(**steps[index])[0])
    return outputs


@pytest.mark.parametrize("name", CHANGES)
def test_from_the_change_on_a_run_is_the_one_that_begins_there(name: str) -> None:
    change = CHANGES[name]
    steps, model, fresh = steps_of(change), make(change), make(change)
    unchanged = replace(change, after=change.before, act=lambda model: None)
    last = run(change, make(change), steps)[-1], run(unchanged, make(change), steps_of(unchanged))
    assert not torch.allclose(last[0], last[1][-1], atol=1e-3), "the change changes nothing"
    apply_dicache(model, ALWAYS)
    outputs = run(change, model, steps)[CHANGES_AT:]
    assert list(masks(model, resumed="C").values()) == [MASK]
    apply_dicache(fresh, DiCacheConfig(schedule=MASK[CHANGES_AT:]))
    for output, expected in zip(outputs, run(change, fresh, steps, CHANGES_AT), strict=True):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("name", ["control ends", "qwen's control", "set_adapters"])
@pytest.mark.parametrize("rules", [{"granularity": "sample"}, {"error": "delta_y"}], ids=str)
def test_under_other_rules(name: str, rules: dict[str, Any]) -> None:
    change = CHANGES[name]
    model = make(change)
    apply_dicache(model, replace(ALWAYS, **rules))
    run(change, model, steps_of(change))
    (records,) = get_stats(model).contexts.values()
    for sample in {record.sample for record in records}:
        assert mask((each for each in records if each.sample == sample), resumed="C") == MASK


@pytest.mark.parametrize("name", ["control ends", "control is scaled down"])
def test_a_step_before_which_nobody_looked_is_noticed_later(name: str) -> None:
    """The change falls into steps that are computed anyway: their entries are of two states."""
    change, rules = CHANGES[name], replace(ALWAYS, retention_ratio=0.6, num_inference_steps=9)
    model, fresh = make(change), make(change)
    apply_dicache(model, rules)  # floor(0.6 * 9) = 5 retained, of which the last one is changed
    outputs, steps = run(change, model, steps_of(change)), steps_of(change)
    (found,) = masks(model, resumed="C").values()
    assert found in ("CCCCCCRRR", "CCCCCCCRR")  # told by the arguments, or read at the next probe
    begin = found.index("R") - 2
    apply_dicache(fresh, DiCacheConfig(schedule=found[begin:]))
    expected = run(change, fresh, steps, begin)
    assert all(torch.equal(a, b) for a, b in zip(outputs[begin:], expected, strict=True))


@pytest.mark.parametrize("name", ["flux", "chroma", "qwen-image"])
def test_control_that_goes_on_costs_no_step(name: str) -> None:
    added = qwen(1.0) if name == "qwen-image" else both(1.0)
    change = Change(name, before=added, after=added)
    model = make(change)
    apply_dicache(model, ALWAYS)
    run(change, model, steps_of(change))
    assert list(masks(model).values()) == ["CRRRRRRRR"]


def test_a_lora_that_stays_costs_no_step_though_diffusers_scales_it_in_every_call() -> None:
    """By numbers with which a product, divided again, is not what it was."""
    scaled = {"joint_attention_kwargs": {"scale": 0.3}}
    change = Change("flux", put_on_lora, scaled, scaled)
    model = make(change)
    scale_layers(model, "to_q", 0.45)
    layers = (m for name, m in model.named_modules() if name.endswith("to_q"))
    layer = next(each for each in layers if hasattr(each, "scaling"))
    before = layer.scaling["style"]
    apply_dicache(model, ALWAYS)
    run(change, model, steps_of(change))
    assert layer.scaling["style"] != before
    assert list(masks(model).values()) == ["CRRRRRRRR"]


def test_a_schedule_says_itself_which_steps_are_alike_but_not_where_control_ends() -> None:
    for name, expected in (("control is scaled down", "CCRRRRRRR"), ("control ends", "CCRRCCRRR")):
        change = CHANGES[name]
        model = make(change)
        apply_dicache(model, DiCacheConfig(schedule="CCRRRRRRR"))
        run(change, model, steps_of(change))
        assert list(masks(model).values()) == [expected]


# --- prompts -------------------------------------------------------------------------------------


def exchange(inputs: dict[str, Any], prompt: Tensor) -> None:
    inputs["encoder_hidden_states"] = prompt


def write_over(inputs: dict[str, Any], prompt: Tensor) -> None:
    inputs["encoder_hidden_states"].copy_(prompt)


def write_over_one(inputs: dict[str, Any], prompt: Tensor) -> None:
    inputs["encoder_hidden_states"][1].copy_(prompt[1])


@pytest.mark.parametrize(
    ("act", "context"),
    [(exchange, "cond"), (write_over, "cond"), (write_over_one, "cond"), (write_over, None)],
)
def test_a_prompt_that_becomes_another_one(act: Any, context: str | None) -> None:
    """Without a context's name, another tensor is another branch."""
    steps, model, fresh = calls("flux", NUM_STEPS), build("flux"), build("flux")
    first = steps[0]["encoder_hidden_states"].clone()
    other = torch.randn(first.shape, generator=torch.Generator().manual_seed(5))
    for inputs in steps:
        inputs["encoder_hidden_states"] = steps[0]["encoder_hidden_states"]
    apply_dicache(model, ALWAYS)
    apply_dicache(fresh, DiCacheConfig(schedule=MASK[CHANGES_AT:]))
    for index, inputs in enumerate(steps):
        if index == CHANGES_AT:
            for later in steps[CHANGES_AT:]:
                act(later, other)
        with nullcontext() if context is None else model.cache_context(context):
            output = model(**inputs)[0]
        if index >= CHANGES_AT:
            assert torch.equal(output, fresh(**inputs)[0])
    assert list(masks(model, resumed="C").values()) == [MASK]


def test_an_equal_prompt_of_every_step_costs_none() -> None:
    """Pipelines may make a new embedding in every step."""
    model = build("flux")
    apply_dicache(model, ALWAYS)
    for inputs in calls("flux", NUM_STEPS):
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
        with model.cache_context("cond"):
            model(**inputs)
    assert masks(model, resumed="C") == {"cond": "CRRRRRRRR"}


def test_a_pipelines_callback_exchanges_the_prompt() -> None:
    pipe = pipeline("flux")
    apply_dicache(pipe, ALWAYS)
    other = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(5))

    def exchange_at_the_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other} if step == CHANGES_AT - 1 else {}

    run_pipeline(
        "flux",
        pipe,
        NUM_STEPS,
        callback_on_step_end=exchange_at_the_end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert masks(pipe, resumed="C") == {"cond": MASK}


VACE_SCALES = {
    "all": [0.4, 0.2],
    "all, a little": [0.9, 0.45],
    "one": [1.0, 0.7],
    "one ends": [0.0, 0.5],
}


@pytest.mark.parametrize("what", [*VACE_SCALES, "hints"])
def test_hints_of_vace(what: str) -> None:
    steps = calls("wan-vace", NUM_STEPS)
    hints = steps[0]["control_hidden_states"]
    before, after = torch.tensor([1.0, 0.5]), torch.tensor(VACE_SCALES.get(what, [1.0, 0.5]))
    for index, inputs in enumerate(steps):
        is_after = index >= CHANGES_AT
        inputs["control_hidden_states_scale"] = after if is_after else before
        inputs["control_hidden_states"] = hints * (0.0 if is_after and what == "hints" else 1.0)
    model, fresh = build("wan-vace"), build("wan-vace")
    apply_dicache(model, ALWAYS)
    outputs = [model(**inputs)[0] for inputs in steps]
    assert masks(model, resumed="C") == {"branch0": MASK}
    apply_dicache(fresh, DiCacheConfig(schedule=MASK[CHANGES_AT:]))
    for output, inputs in zip(outputs[CHANGES_AT:], steps[CHANGES_AT:], strict=True):
        assert torch.equal(output, fresh(**inputs)[0])


def test_faces_of_wan_animate() -> None:
    """What its face adapters add lies behind the probe, too."""
    steps = calls("wan-animate", NUM_STEPS)
    for inputs in steps[CHANGES_AT:]:
        inputs["face_pixel_values"] = -inputs["face_pixel_values"]
    model, fresh = build("wan-animate"), build("wan-animate")
    apply_dicache(model, ALWAYS)
    outputs = [model(**inputs)[0] for inputs in steps]
    assert masks(model, resumed="C") == {"branch0": MASK}
    apply_dicache(fresh, DiCacheConfig(schedule=MASK[CHANGES_AT:]))
    for output, inputs in zip(outputs[CHANGES_AT:], steps[CHANGES_AT:], strict=True):
        assert torch.equal(output, fresh(**inputs)[0])


def qwen_with_keys_and_values(model: Any, num_steps: int) -> list[Tensor]:
    """A run whose first step keeps the prompt's keys and values for the others."""
    caches, made = [QwenImage21KVCache(4), QwenImage21KVCache(4)], []
    pairs = zip(*branches("qwen-image-2.1", num_steps), strict=True)
    for step, pair in enumerate(pairs):
        mode = "cached" if step else "extract"
        for name, cache, inputs in zip(("cond", "uncond"), caches, pair, strict=True):
            with model.cache_context(name):
                made.append(model(**inputs, kv_cache=cache, kv_cache_mode=mode)[0])
    return made


def test_a_step_that_writes_what_others_read_is_never_reused() -> None:
    name = "qwen-image-2.1"
    model, plain = build(name), qwen_with_keys_and_values(build(name), 6)
    apply_dicache(model, replace(ALWAYS, max_consecutive_reuse=2))
    for num_steps in (6, 1, 6):  # broken off behind the step that writes
        made = qwen_with_keys_and_values(model, num_steps)
        assert all(torch.equal(*pair) for pair in zip(made[:4], plain[:4], strict=False))
    # The steps that read have fewer tokens, and are a run of their own.
    assert masks(model, resumed="C") == dict.fromkeys(("cond", "uncond"), "CRRCR")


# --- pipelines and trained models ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0.0, 1.0, "CRRRRRRRRRRC"), (0.0, 0.5, "CRRRRRcCRRRC"), (0.5, 1.0, "CRRRRRcCRRRC")],
)
def test_a_pipelines_control_guidance_start_and_end(
    start: float, end: float, expected: str
) -> None:
    model = build("flux")
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxControlNetPipeline(
        **parts,
        vae=ControlVae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        controlnet=control_net_for(model, 0.1),
    )
    pipe.set_progress_bar_config(disable=True)
    apply_dicache(pipe, DiCacheConfig(threshold=math.inf, retention_ratio=0))
    pipe(
        prompt_embeds=text(0),
        pooled_prompt_embeds=text(0)[:, 0],
        height=64,
        width=64,
        control_image=torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        control_guidance_start=start,
        control_guidance_end=end,
        num_inference_steps=12,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    assert masks(pipe) == {"branch0": expected}


def controlled_run(model: Any, net: Any, steps: Steps, scale: Callable[[float], float]) -> Tensor:
    """Euler steps on a trained Flux, with a ControlNet of this scale at a share of the run."""
    names = ("timestep", "guidance", "pooled_projections", "encoder_hidden_states")
    names += ("txt_ids", "img_ids")
    x = steps[0]["hidden_states"]
    condition = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    times = [float(inputs["timestep"]) for inputs in steps] + [0.0]
    for index, inputs in enumerate(steps):
        known = {name: inputs[name] for name in names if name in inputs}
        doubles, singles = net(
            hidden_states=x,
            controlnet_cond=condition,
            conditioning_scale=scale(index / len(steps)),
            return_dict=False,
            **known,
        )
        velocity = model(
            **{**inputs, "hidden_states": x},
            controlnet_block_samples=doubles,
            controlnet_single_block_samples=singles,
        )[0]
        x = x + (times[index + 1] - times[index]) * velocity
    return x


@pytest.mark.parametrize(
    ("scale", "least_reused"),
    [
        (lambda share: 1.0 if share < 0.8 else 0.0, 14),
        (lambda share: 0.0 if share < 0.3 else 1.0, 14),
        (lambda share: 1.0 if share < 0.5 else 0.5, 14),
        (lambda share: 1.0 if share < 0.5 else -1.0, 14),
        (lambda share: 1.0 - share, 8),  # it moves further and further from the last entry
    ],
    ids=["ends at 80 %", "begins at 30 %", "halved at 50 %", "turns at 50 %", "fades to 0"],
)
def test_a_trained_flux_keeps_its_quality(
    scale: Callable[[float], float], least_reused: int
) -> None:
    """45 dB of latents, where the run without any change has 48 (two samples, measured)."""
    pipe = demo.load_pipeline("flux")
    model, steps = pipe.transformer, []
    net = control_net_for(model, 0.02)
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: steps.append(kwargs), with_kwargs=True
    )
    pipe(**demo.pipeline_inputs("flux", demo.default_prompts("flux")[0], 0, 30))
    handle.remove()
    plain = controlled_run(model, net, steps, scale)
    apply_dicache(model, DiCacheConfig(num_inference_steps=30))
    cached = controlled_run(model, net, steps, scale)
    assert get_stats(model).num_reused >= least_reused
    error = (cached - plain).square().mean()
    assert 10 * torch.log10((plain.max() - plain.min()) ** 2 / error) > 45


# --- parts ---------------------------------------------------------------------------------------


def watch(*samples: Tensor, entries: tuple[int, ...], only_ends: bool = False) -> bool:
    """Whether the last of these calls is told to be of another state than the entries."""
    added = Added()
    for call, sample in enumerate(samples):
        added.note((sample,))
        if call in entries:
            added.note_entry()
    question = added.ask()
    assert question is not None
    return added.has_changed(question.tolist(), only_ends)


def turned(angle: float, norm: float = 1.0) -> Tensor:
    return norm * torch.tensor([[math.cos(angle), math.sin(angle)]])


FEW = [turned(0.4 * call) for call in range(6)]  # as far a call as in a run of 4 steps
MANY = [turned(0.05 * call) for call in range(6)]
WATCHED: dict[str, tuple[list[Tensor], bool]] = {
    "many steps": (MANY, False),
    "few steps": (FEW, False),
    "nothing at all": ([0 * each for each in MANY], False),
    "a jump in the last call": ([*MANY[:5], turned(0.5)], True),
    "a jump before the last call": ([*MANY[:4], turned(0.5), turned(0.55)], True),
    "a jump at the newer entry": ([*MANY[:2], turned(0.5), turned(0.55), turned(0.6)], True),
    "a jump before the older entry": ([turned(2.0), *MANY[:3], MANY[4]], False),
    "a jump in few steps": ([*FEW[:4], turned(1.2 + 0.7)], True),
    "another sign": ([*MANY[:4], -MANY[4]], True),
    "in few steps another sign": ([*FEW[:4], -FEW[4]], True),
    "a slow fade": ([turned(0.0, 0.93**call) for call in range(6)], True),
    "a drift of the norm": ([turned(0.0, 0.97**call) for call in range(6)], False),
    "a row that ends": ([torch.ones(2, 3)] * 4 + [torch.tensor([[1.0] * 3, [0.0] * 3])], True),
    "not a number": ([*MANY[:4], math.nan * MANY[4]], False),
}


@pytest.mark.parametrize(("samples", "expected"), WATCHED.values(), ids=WATCHED)
def test_what_is_added_may_move_as_steps_do_and_no_further(
    samples: list[Tensor], expected: bool
) -> None:
    assert watch(*samples, entries=(1, 2)) is expected


def test_under_a_schedule_only_the_ends_matter() -> None:
    ends = [torch.ones(1, 3)] * 4 + [torch.zeros(1, 3)]
    assert watch(*ends, entries=(1, 2), only_ends=True)
    for name, (samples, _) in WATCHED.items():
        if name != "a row that ends":
            assert not watch(*samples, entries=(1, 2), only_ends=True)


def test_what_is_watched_does_not_grow() -> None:
    added = Added()
    for call in range(100):
        added.note((MANY[call % 2],))
        if call < 50:
            added.note_entry()
        else:
            question = added.ask()
            assert question is not None and not added.has_changed(question.tolist())
        assert len(added._calls) <= 4


def is_another(watched: Prompt) -> bool | None:
    """What a probe would find out; `None` if there is nothing to be read."""
    question = watched.ask() if watched.has_moved else None
    return None if question is None else watched.has_changed(question.tolist())


def test_another_prompt_is_known_by_its_elements() -> None:
    prompt, watched = torch.randn(2, 8, 16), Prompt()
    watched.note(prompt)
    watched.note_entry()
    watched.note(prompt)
    assert is_another(watched) is None, "nothing has to be read of the same tensor"
    watched.note(again := prompt.clone())
    assert is_another(watched) is False
    again[1] = torch.randn(8, 16)
    watched.note(again)
    assert is_another(watched) is True
    watched.note_entry()
    assert is_another(watched) is True, "the older entry is still of the other one"
    watched.note_entry()
    assert is_another(watched) is None
    watched.note(longer := torch.randn(2, 9, 16))
    assert is_another(watched) is True
    watched.drop_entries()
    assert is_another(watched) is None
    del longer


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(0, 0), (1, 0), (2, 1)], False),
        ([(0, 0), (1, 0), (0, 1)], True),  # back, as far as it came
        ([(0, 0), (1, 0), (1, 1)], True),
        ([(0, 0), (1, 0), (0.8, 0.1)], False),  # a small correction
        ([(0, 0), (1, 0), (1, 0)], False),
        ([(90, 0), (91, 0), (90, 1)], False),  # what rounding may have made
        ([(0, 0), (1, 0), (math.nan, 1)], False),
    ],
)
def test_moves_that_point_against_each_other_are_noise(
    steps: list[tuple[float, float]], expected: bool
) -> None:
    moves = FirstMoves()
    for step in steps:
        assert moves.are_wanted and not moves.are_due
        moves.note(torch.tensor(step, dtype=torch.float32))
    assert moves.are_due and not moves.are_wanted
    assert moves.are_noise(moves.ask().tolist()) is expected
    assert not moves.are_due and not moves.are_wanted


def test_conditions_take_numbers_as_they_are_and_a_sample_of_tensors() -> None:
    conditions = Conditions(("control", "kwargs", "blocks", "absent"))
    large, small = torch.arange(5000.0).view(1, 50, 100), torch.ones(1, 3)
    state, samples = conditions.read(
        {
            "control": [large, small, 2 * large],
            "kwargs": {"scale": 0.5, "ip": small},
            "blocks": [1],
        },
        1,
    )
    again, same = conditions.read(
        {
            "control": [large, small, 2 * large],
            "kwargs": {"ip": small, "scale": 0.5},
            "blocks": [1],
        },
        1,
    )
    assert state == again and torch.equal(samples[0], same[0])
    assert len(samples) == 1 and samples[0].shape == (1, 1024 + 3 + 1024)
    chosen = samples[0][0, :1024].tolist()
    assert len(set(chosen)) > 850 and max(chosen) < 5000  # of 1024 random ones about 930 differ
    assert torch.equal(samples[0][0, -1024:], 2 * samples[0][0, :1024])
    for changed in ({"kwargs": {"scale": 0.6, "ip": small}}, {"blocks": [2]}, {"blocks": None}):
        given = {"control": [large], "kwargs": {"scale": 0.5, "ip": small}, "blocks": [1]}
        assert conditions.read({**given, **changed}, 1)[0] != conditions.read(given, 1)[0]


def test_every_picture_of_a_batch_has_a_sample_of_its_own() -> None:
    conditions = Conditions(("control", "hints"))
    control, hints = torch.stack([torch.zeros(40, 40), torch.ones(40, 40)]), torch.ones(3, 7)
    _, (rows, whole) = conditions.read({"control": [control], "hints": hints}, 2)
    assert rows.shape == (2, 1024) and whole.shape == (1, 21)
    assert not rows[0].any() and rows[1].all()
    across = control.transpose(1, 2).expand(2, 40, 40)[:, ::2]  # not dense
    (strided,) = conditions.read({"control": [across]}, 2)[1]
    assert not strided[0].any() and strided[1].all()


def test_a_samples_elements_are_kept_though_the_caller_writes_over_them() -> None:
    conditions, control = Conditions(("control",)), torch.ones(1, 4)
    _, (before,) = conditions.read({"control": control}, 1)
    control.zero_()
    _, (after,) = conditions.read({"control": control}, 1)
    assert float(before.sum()) == 4 and float(after.sum()) == 0


def test_options_with_tensors_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would copy them, in every call."""
    monkeypatch.setattr(Tensor, "__repr__", lambda self: pytest.fail("a tensor was printed"))
    options = {"ip_adapter_image_embeds": [torch.ones(2)], "scale": 0.5, "mask": torch.ones(3)}
    conditions = Conditions(("options",))
    first, _ = conditions.read({"options": options}, 1)
    assert first == conditions.read({"options": dict(reversed(options.items()))}, 1)[0]
    assert first != conditions.read({"options": {**options, "scale": 0.6}}, 1)[0]


def test_branches_with_numbers_of_their_own_are_waited_for_once_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Any] = []
    wait = Readback.wait
    monkeypatch.setattr(Readback, "wait", lambda self: read.append(1) or wait(self))
    conditions, scales = Conditions(("scale",)), [torch.ones(3), 2 * torch.ones(3)]
    for _ in range(5):
        states = [conditions.read({"scale": scale}, 1)[0] for scale in scales]
        assert states[0] != states[1]
    assert len(read) == 2
    for _ in range(9):
        conditions.read({"scale": torch.zeros(3)}, 1)
    assert len(conditions._read) <= 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_samples_are_of_any_dtype(dtype: torch.dtype) -> None:
    added, prompt = Added(), Prompt()
    for value in (0, 1):
        tensor = torch.full((2, 3, 4), value).to(dtype)
        prompt.note(tensor)
        added.note((rows_of(tensor, 2),))
        if value == 0:
            prompt.note_entry()
            added.note_entry()
    assert prompt.has_changed(prompt.ask().tolist()) and added.has_changed(added.ask().tolist())


def test_fp16s_autocast_does_not_hide_noise() -> None:
    moves, generator = FirstMoves(), torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.float16):
        for _ in range(3):
            moves.note(30 * torch.randn(1024, generator=generator))
        assert moves.are_noise(moves.ask().tolist())


def test_numbers_in_a_tensor_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    wait = Readback.wait
    monkeypatch.setattr(Readback, "wait", lambda self: read.append(1) or wait(self))
    scale = torch.ones(3)
    conditions = Conditions(("scale",))
    first = [conditions.read({"scale": scale}, 1) for _ in range(4)]
    assert len(read) == 1 and all(each == first[0] for each in first) and not first[0][1]
    scale[1] = 0.5
    assert conditions.read({"scale": scale}, 1) != first[0] and len(read) == 2
    assert conditions.read({"scale": torch.ones(3)}, 1) == first[0] and len(read) == 3


def test_loras_that_were_unloaded_are_not_kept_alive() -> None:
    model = build("flux")
    put_on_lora(model)
    apply_dicache(model, ALWAYS)
    for inputs in calls("flux", 4):
        model(**inputs)
    layers = [weakref.ref(m) for m in model.modules() if hasattr(m, "lora_A")]
    model.unload_lora()
    gc.collect()
    assert layers and not any(ref() for ref in layers)


def test_pipelines_without_such_things_pay_nothing() -> None:
    """No operator is dispatched for it, and no state is looked through."""
    pipe = pipeline("flux")
    apply_dicache(pipe, ALWAYS)
    seen: list[Any] = []
    take = torch.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "take", lambda *args: seen.append(args) or take(*args))
        run_pipeline("flux", pipe, 4)
    assert not seen
