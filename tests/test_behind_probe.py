"""What lies behind the probe changes in the middle of a run, and the probe sees nothing of it.

From the step of the change on, a run has to be the run that begins there: two steps are computed,
and what is reused afterwards has nothing of the time before in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel
from helpers import mask, masks
from peft import LoraConfig
from test_hard_use import put_on_ip_adapter
from tiny_models import FAMILIES, build, calls
from tiny_pipelines import pipeline, text
from torch import Tensor, nn

from dicache import (
    BlockStack,
    DiCacheConfig,
    ModelFamily,
    apply_dicache,
    get_stats,
    register_family,
)
from dicache.core.behind import has_changed
from dicache.demo import pipelines as demo
from dicache.driver import families
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


def residuals(kind: str, count: int, scale: float) -> Callable[[int], dict[str, Any]]:
    """A ControlNet's, which differ a little from step to step."""

    def of_step(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(11)
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


def put_on_lora(model: nn.Module) -> None:
    """On the single blocks alone: the probe is the same with and without it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        targets = ".*single_transformer_blocks.*(to_q|proj_mlp)"
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config, "style")


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
    "chroma's control": Change("chroma", before=both(1.0), after=both(0.0)),
    "qwen's control": Change("qwen-image", before=qwen(0.3), after=qwen(1.0)),
    "qwen's control ends": Change("qwen-image", before=qwen(1.0)),
    "set_adapters": Change("flux", put_on_lora, act=lambda m: m.set_adapters("style", 0.3)),
    "disable_lora": Change("flux", put_on_lora, act=lambda model: model.disable_lora()),
    "fuse_lora": Change("flux", put_on_lora, act=lambda model: model.fuse_lora(0.5)),
    "delete_adapters": Change("flux", put_on_lora, act=lambda m: m.delete_adapters("style")),
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
    scaled = {"joint_attention_kwargs": {"scale": 0.7}}
    change = Change("flux", put_on_lora, scaled, scaled)
    model = make(change)
    apply_dicache(model, ALWAYS)
    run(change, model, steps_of(change))
    assert list(masks(model).values()) == ["CRRRRRRRR"]


def test_a_schedule_says_itself_which_steps_are_alike_but_not_where_control_ends() -> None:
    for name, expected in (("control is scaled down", "CCRRRRRRR"), ("control ends", "CCRRCCRRR")):
        change = CHANGES[name]
        model = make(change)
        apply_dicache(model, DiCacheConfig(schedule="CCRRRRRRR"))
        run(change, model, steps_of(change))
        assert list(masks(model).values()) == [expected]


# --- families of the user's own ------------------------------------------------------------------


@pytest.fixture
def own_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", [*families._FAMILIES])


def vace_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.WanVACETransformer3DModel(
            **{**FAMILIES["wan"].config, "vace_layers": [0, 2], "vace_in_channels": 4}
        )
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("what", ["scale", "hints"])
def test_hints_of_vace(what: str, own_families: None) -> None:
    register_family(
        ModelFamily("vace", "WanVACETransformer3DModel", (BlockStack("blocks"),), threshold=0.1)
    )
    steps = calls("wan", NUM_STEPS)
    hints = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    for index, inputs in enumerate(steps):
        is_after = index >= CHANGES_AT
        scale = torch.tensor([1.0, 0.5]) * (0.4 if is_after and what == "scale" else 1.0)
        inputs["control_hidden_states_scale"] = scale
        inputs["control_hidden_states"] = hints * (0.0 if is_after and what == "hints" else 1.0)
    model, fresh = vace_model(), vace_model()
    apply_dicache(model, ALWAYS)
    outputs = [model(**inputs)[0] for inputs in steps]
    assert masks(model, resumed="C") == {"branch0": MASK}
    apply_dicache(fresh, DiCacheConfig(schedule=MASK[CHANGES_AT:]))
    for output, inputs in zip(outputs[CHANGES_AT:], steps[CHANGES_AT:], strict=True):
        assert torch.equal(output, fresh(**inputs)[0])


# --- pipelines and trained models ----------------------------------------------------------------


class Vae(nn.Module):
    """Makes latents of a control picture."""

    config = type(
        "Config",
        (),
        {
            "latent_channels": 4,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "block_out_channels": (1,) * 4,
        },
    )
    dtype, device = torch.float32, torch.device("cpu")

    def encode(self, x: Tensor) -> Any:
        latents = x[:, [0, 1, 2, 0], ::8, ::8]
        drawn = type("Drawn", (), {"sample": lambda *_: latents, "mode": lambda *_: latents})
        return type("Encoded", (), {"latent_dist": drawn()})()


def control_net(model: Any, std: float) -> FluxControlNetModel:
    """A small ControlNet of random weights that fits a Flux."""
    names = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    names += ("pooled_projection_dim", "axes_dims_rope", "guidance_embeds")
    sizes = {name: getattr(model.config, name) for name in names}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = FluxControlNetModel(num_layers=2, num_single_layers=2, **sizes)
        for parameter in made.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=std)
    return made.eval().requires_grad_(False)


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
        vae=Vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        controlnet=control_net(model, 0.1),
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
    "scale",
    [
        lambda share: 1.0 if share < 0.8 else 0.0,
        lambda share: 0.0 if share < 0.3 else 1.0,
        lambda share: 1.0 if share < 0.5 else 0.5,
    ],
    ids=["ends at 80 %", "begins at 30 %", "halved at 50 %"],
)
def test_a_trained_flux_keeps_its_quality(scale: Callable[[float], float]) -> None:
    """45 dB of latents, where the run without any change has 48 (two samples, measured)."""
    pipe = demo.load_pipeline("flux")
    model, steps = pipe.transformer, []
    net = control_net(model, 0.02)
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: steps.append(kwargs), with_kwargs=True
    )
    pipe(**demo.pipeline_inputs("flux", demo.default_prompts("flux")[0], 0, 30))
    handle.remove()
    plain = controlled_run(model, net, steps, scale)
    apply_dicache(model, DiCacheConfig(num_inference_steps=30))
    cached = controlled_run(model, net, steps, scale)
    assert get_stats(model).num_reused >= 14
    error = (cached - plain).square().mean()
    assert 10 * torch.log10((plain.max() - plain.min()) ** 2 / error) > 45


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norms", "changed", "ended"),
    [
        ([1.0, 1.0, 1.0], False, False),
        ([1.0, 1.2, 0.9], False, False),
        ([1.0, 1.0, 1.3], True, False),  # the older entry
        ([1.3, 1.0, 1.3], True, False),  # the newer one
        ([0.0, 0.0, 0.0], False, False),
        ([0.0, 1e-9, 0.0], True, True),
        ([1.0, 0.0, 1.0], True, True),
        ([math.nan, 1.0, 1.0], False, False),
    ],
)
def test_norms_may_drift_by_a_quarter(norms: list[float], changed: bool, ended: bool) -> None:
    assert has_changed([[1.0, 1.0, 1.0], norms]) is changed
    assert has_changed([norms], only_ends=True) is ended


def test_conditions_take_numbers_as_they_are_and_a_sample_of_tensors() -> None:
    conditions = Conditions(("control", "kwargs", "blocks", "absent"))
    large, small = torch.arange(5000.0).view(1, 50, 100), torch.ones(3)
    state, samples = conditions.read(
        {"control": [large, small, 2 * large], "kwargs": {"scale": 0.5, "ip": small}, "blocks": [1]}
    )
    again, same = conditions.read(
        {"control": [large, small, 2 * large], "kwargs": {"ip": small, "scale": 0.5}, "blocks": [1]}
    )
    assert state == again and torch.equal(samples[0], same[0])
    assert len(samples) == 1 and samples[0].shape == (1024 + 3 + 1024,)
    assert set(samples[0][:1024].tolist()) <= set(range(5000))
    assert torch.equal(samples[0][-1024:], 2 * samples[0][:1024])
    for changed in ({"kwargs": {"scale": 0.6, "ip": small}}, {"blocks": [2]}, {"blocks": None}):
        given = {"control": [large], "kwargs": {"scale": 0.5, "ip": small}, "blocks": [1]}
        assert conditions.read({**given, **changed})[0] != conditions.read(given)[0]


def test_a_samples_elements_are_kept_though_the_caller_writes_over_them() -> None:
    conditions, scale = Conditions(("scale",)), torch.ones(4)
    _, (before,) = conditions.read({"scale": scale})
    scale.zero_()
    _, (after,) = conditions.read({"scale": scale})
    assert float(before.sum()) == 4 and float(after.sum()) == 0


def test_pipelines_without_such_things_pay_nothing() -> None:
    """No operator is dispatched for it, and no state is looked through."""
    pipe = pipeline("flux")
    apply_dicache(pipe, ALWAYS)
    seen: list[Any] = []
    take = torch.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "take", lambda *args: seen.append(args) or take(*args))
        from tiny_pipelines import run as run_pipeline

        run_pipeline("flux", pipe, 4)
    assert not seen
