"""Modular pipelines: guiders decide in every step how many branches there are, and what they skip.

LTX's blocks name the branches (`pred_cond`, `pred_uncond`, `pred_cond_skip`); those of Wan, Flux,
Qwen-Image and Z-Image name none, and two branches of one prompt are then told apart by their order.
Every branch has to follow the formulas on its own calls alone, seen from outside.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import (
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageCoreDenoiseStep
from helpers import cached_model, masks
from tiny_models import TEXT_TOKENS, build
from tiny_pipelines import Call, record, scheduler, text
from torch import Tensor, nn
from twin import Twin, assert_close, expected_run

from dicache import DiCacheConfig, DiCacheWarning, apply_dicache, get_stats, remove_dicache

STEPS = 8
# The gate never stops: of eight steps two are retained, and the last is computed.
RULES = DiCacheConfig(threshold=float("inf"), retention_ratio=0.25)
ALONE = "CCRRRRRC"  # what a branch does that nothing disturbs


@dataclass(frozen=True)
class Kind:
    """A modular pipeline around a tiny transformer.

    Attributes:
        pipeline: Name of its class in diffusers.
        blocks: Makes its blocks, from prepared embeddings to latents.
        family: Of the transformer; see `tiny_models`.
        arguments: Makes those of a call.
        overrides: Of the transformer's configuration: there is no VAE that tells the channels.
    """

    pipeline: str
    blocks: Callable[[], Any]
    family: str
    arguments: Callable[[], dict[str, Any]]
    overrides: dict[str, Any]


def _prompts() -> dict[str, Any]:
    return {"prompt_embeds": text(0), "negative_prompt_embeds": text(1)}


def _ltx() -> dict[str, Any]:
    given = {f"{name}prompt_attention_mask": torch.ones(1, TEXT_TOKENS) for name in _SIGNS}
    return {**_prompts(), **given, "height": 128, "width": 128, "num_frames": 9}


def _qwen() -> dict[str, Any]:
    given = {f"{name}prompt_embeds_mask": torch.ones(1, TEXT_TOKENS).long() for name in _SIGNS}
    return {**_prompts(), **given, "height": 64, "width": 64}


def _flux() -> dict[str, Any]:
    prompt = {"prompt_embeds": text(0), "pooled_prompt_embeds": text(0)[:, 0]}
    return {**prompt, "height": 64, "width": 64}


def _z_image() -> dict[str, Any]:
    prompts = {"prompt_embeds": [text(0)[0]], "negative_prompt_embeds": [text(1)[0, :3]]}
    return {**prompts, "height": 64, "width": 64}


def _wan() -> dict[str, Any]:
    return {**_prompts(), "height": 64, "width": 64, "num_frames": 5}


_SIGNS = ("", "negative_")
_SIXTEEN = {"in_channels": 16, "out_channels": 16}
KINDS = {
    "wan": Kind("WanModularPipeline", WanCoreDenoiseStep, "wan", _wan, _SIXTEEN),
    "wan2.2": Kind("Wan22ModularPipeline", Wan22CoreDenoiseStep, "wan", _wan, _SIXTEEN),
    "qwen": Kind("QwenImageModularPipeline", QwenImageCoreDenoiseStep, "qwen-image", _qwen, {}),
    "flux": Kind("FluxModularPipeline", FluxCoreDenoiseStep, "flux", _flux, {}),
    "z": Kind(
        "ZImageModularPipeline", ZImageCoreDenoiseStep, "z-image", _z_image, {"in_channels": 16}
    ),
    "ltx": Kind(
        "LTXModularPipeline",
        LTXCoreDenoiseStep,
        "ltx",
        _ltx,
        {"in_channels": 128, "out_channels": 128},
    ),
}


def plain_guidance(**arguments: Any) -> Any:
    return ClassifierFreeGuidance(guidance_scale=3.0, **arguments)


def skip_layers(layer: int = 1, until: float = 1.0, **arguments: Any) -> Any:
    """From step 1 on; step 0 is never one of it."""
    return SkipLayerGuidance(
        guidance_scale=3.0,
        skip_layer_config=LayerSkipConfig([layer]),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=until,
        **arguments,
    )


_SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}


def perturbed_attention() -> Any:
    return PerturbedAttentionGuidance(
        guidance_scale=3.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=LayerSkipConfig([1], **_SCORES),
    )


def auto_guidance() -> Any:
    return AutoGuidance(guidance_scale=3.0, auto_guidance_config=LayerSkipConfig([1]))


@dataclass(frozen=True)
class Case:
    """A pipeline with a guider, and what every branch does: a bar where its history begins anew.

    Attributes:
        kind: Of `KINDS`.
        guider: Makes it; `None` for blocks that take none.
        branches: By the number of the guider's pass that a branch is in every step.
        skips: What a pass skips, for the un-cached twin.
    """

    kind: str
    guider: Callable[[], Any] | None
    branches: dict[str, tuple[int, str]]
    skips: tuple[int, LayerSkipConfig] | None = None


_ONE_LAYER = (3, LayerSkipConfig([1]))
# Without names the calls of the first prompt are one in step 0 and two from then on. What they are
# is known when their number stays: step 2 is computed, and nothing before it counts.
_BY_ORDER = {"branch0": (1, "CC|CRRRRC"), "branch1": (2, "CCCRRRRC"), "branch2": (3, "C|CRRRRC")}
_NAMED = {"pred_cond": (1, ALONE), "pred_uncond": (2, ALONE)}
CASES = {
    "flux without guidance": Case("flux", None, {"branch0": (0, ALONE)}),
    "wan": Case("wan", plain_guidance, {"branch0": (1, ALONE), "branch1": (2, ALONE)}),
    "qwen": Case("qwen", plain_guidance, {"branch0": (1, ALONE), "branch1": (2, ALONE)}),
    "z": Case("z", plain_guidance, {"branch0": (1, ALONE), "branch1": (2, ALONE)}),
    "ltx": Case("ltx", plain_guidance, _NAMED),
    "ltx, layers skipped": Case(
        "ltx", skip_layers, {**_NAMED, "pred_cond_skip": (3, "CCRRRRC")}, _ONE_LAYER
    ),
    "ltx, layers skipped for a while": Case(
        "ltx",
        lambda: skip_layers(until=0.5),
        {**_NAMED, "pred_cond_skip": (3, "CCR")},
        _ONE_LAYER,
    ),
    "wan, layers skipped": Case("wan", skip_layers, _BY_ORDER, _ONE_LAYER),
    "wan, last layer skipped": Case(
        "wan", lambda: skip_layers(layer=2), _BY_ORDER, (3, LayerSkipConfig([2]))
    ),
    "wan, layers skipped for a while": Case(
        "wan",
        lambda: skip_layers(until=0.5),
        {"branch0": (1, "CC|CRR|CRC"), "branch1": (2, "CCCRRCRC"), "branch2": (3, "C|CR")},
        _ONE_LAYER,
    ),
    "qwen, attention perturbed": Case(
        "qwen", perturbed_attention, _BY_ORDER, (3, LayerSkipConfig([1], **_SCORES))
    ),
    "wan, guided by a worse self": Case(
        "wan",
        auto_guidance,
        {"branch0": (1, ALONE), "branch1": (2, ALONE)},
        (2, LayerSkipConfig([1])),
    ),
    "wan, guided in the middle": Case(
        "wan",
        lambda: plain_guidance(start=0.25, stop=0.75),
        {"branch0": (1, ALONE), "branch1": (2, "CCRR")},
    ),
}


@pytest.fixture(autouse=True)
def _quiet_guiders() -> Iterator[None]:
    loggers = [logging.getLogger(f"diffusers.{name}") for name in ("guiders", "modular_pipelines")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def transformer(kind: str, seed: int = 0) -> nn.Module:
    return build(KINDS[kind].family, seed=seed, **KINDS[kind].overrides)


def pipeline(kind: str, guider: Any = None, **parts: Any) -> Any:
    row = KINDS[kind]
    pipe = getattr(diffusers, row.pipeline)(blocks=row.blocks())
    parts = {"transformer": transformer(kind), "scheduler": scheduler(row.family), **parts}
    if guider is not None:
        parts["guider"] = guider
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(name: str) -> Any:
    case = CASES[name]
    return pipeline(case.kind, None if case.guider is None else case.guider())


def run(kind: str, pipe: Any, num_steps: int = STEPS, seed: int = 0, **changes: Any) -> Tensor:
    """Latents of one call; equal seeds give equal starts."""
    arguments = {
        **KINDS[kind].arguments(),
        "num_inference_steps": num_steps,
        "generator": torch.Generator().manual_seed(seed),
        "output": "latents",
        **changes,
    }
    return pipe(**arguments)


def passes(pipe: Any) -> list[int]:
    """Fills with the guider's number of every call of the transformer: 1, 2, ... in each step."""
    seen: list[int] = []
    guider = getattr(pipe, "guider", None)
    pipe.transformer.register_forward_hook(
        lambda *_: seen.append(0 if guider is None else guider._count_prepared)
    )
    return seen


def check_branch(case: Case, number: int, calls: list[Call], segments: str) -> None:
    """Every step of a branch has the output that the formulas give on an un-cached twin."""
    model = transformer(case.kind)
    if case.skips is not None and case.skips[0] == number:
        apply_layer_skip(model, replace(case.skips[1]))  # it is filled in
    twin, inputs = Twin(KINDS[case.kind].family, model), [call.inputs for call in calls]
    expected = []
    for mask in segments.split("|"):
        steps = inputs[len(expected) :][: len(mask)]
        expected += expected_run(twin, steps, mask, RULES.alignment, RULES.gamma_range)
    for call, step in zip(calls, expected, strict=True):
        assert_close(call.output, step.output)


@pytest.mark.parametrize("name", CASES)
def test_every_branch_follows_the_formulas(name: str) -> None:
    case, pipe = CASES[name], make(name)
    calls, numbers = record(pipe.transformer), passes(pipe)
    apply_dicache(pipe, RULES)
    run(case.kind, pipe)
    expected = {name: mask.replace("|", "") for name, (_, mask) in case.branches.items()}
    assert masks(pipe, resumed="C") == expected
    for number, mask in case.branches.values():
        own = [call for call, each in zip(calls, numbers, strict=True) if each == number]
        check_branch(case, number, own, mask)


@pytest.mark.parametrize("name", CASES)
def test_threshold_zero_equals_no_cache_and_nothing_is_left_of_it(name: str) -> None:
    kind, plain, pipe = CASES[name].kind, make(name), make(name)
    expected = run(kind, plain)
    apply_dicache(pipe, DiCacheConfig(threshold=0))
    assert torch.equal(run(kind, pipe), expected)
    assert not get_stats(pipe)["transformer"].num_reused
    remove_dicache(pipe)
    # The guider's hooks leave the root a registry, which goes with our own; it makes another.
    known = vars(plain.transformer).keys() - {"_diffusers_hook"}
    assert vars(pipe.transformer).keys() - {"_diffusers_hook"} == known
    assert torch.equal(run(kind, pipe), expected)


class AbortError(Exception):
    """Raised by a test in the middle of a run."""


def abort(kind: str, pipe: Any, step: int, in_model: bool = False, **changes: Any) -> None:
    """A run that ends between steps, or in the first branch's call of one."""
    left = step
    owner, name = (pipe.transformer, "forward") if in_model else (pipe.scheduler, "step")
    whole = getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        guider = getattr(pipe, "guider", None)
        if not in_model or guider is None or guider._count_prepared == 1:
            left -= 1
        if left < 0:
            raise AbortError
        return whole(*args, **kwargs)

    setattr(owner, name, count)
    with pytest.raises(AbortError):
        run(kind, pipe, seed=1, **changes)
    if in_model:
        owner.forward = whole
    else:
        del owner.step


DISTURBANCES: dict[str, Callable[[str, Any], Any]] = {
    "another run": lambda kind, pipe: run(kind, pipe, seed=1),
    "a shorter run": lambda kind, pipe: run(kind, pipe, 5, seed=1),
    "a larger one": lambda kind, pipe: run(kind, pipe, seed=1, height=192, width=192),
    "aborted behind step 0": lambda kind, pipe: abort(kind, pipe, 0),
    "aborted behind step 3": lambda kind, pipe: abort(kind, pipe, 3),
    "aborted behind step 3 of 12": lambda kind, pipe: abort(kind, pipe, 3, num_steps=12),
    "aborted in step 3": lambda kind, pipe: abort(kind, pipe, 3, in_model=True),
}
_DISTURBED = ("wan", "ltx, layers skipped", "wan, layers skipped", "wan, guided in the middle", "z")


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("name", _DISTURBED)
def test_a_run_after_another_equals_a_fresh_one(name: str, disturbance: str) -> None:
    kind, fresh, used = CASES[name].kind, make(name), make(name)
    for pipe in (fresh, used):
        apply_dicache(pipe, RULES)
    DISTURBANCES[disturbance](kind, used)
    assert torch.equal(run(kind, used), run(kind, fresh))
    assert get_stats(used) == get_stats(fresh)


def test_a_guider_that_is_exchanged_between_runs() -> None:
    fresh, used = pipeline("ltx", skip_layers()), pipeline("ltx", plain_guidance())
    for pipe in (fresh, used):
        apply_dicache(pipe, RULES)
    run("ltx", used)
    used.update_components(guider=skip_layers())
    assert torch.equal(run("ltx", used), run("ltx", fresh))
    assert get_stats(used) == get_stats(fresh)


@pytest.mark.parametrize("kind", ("wan", "ltx"))
def test_a_probe_that_a_guider_skips_is_not_trusted(kind: str) -> None:
    """Its misfit is 0 in every step, which is below any threshold. Other branches are reused."""
    pipe, deeper = pipeline(kind, skip_layers(0)), pipeline(kind, skip_layers(0))
    apply_dicache(pipe, DiCacheConfig(threshold=100, retention_ratio=0, cfg="independent"))
    with pytest.warns(DiCacheWarning, match="gave back the tokens"):
        run(kind, pipe)
    *others, skipped = masks(pipe).values()
    assert skipped == "C" * (STEPS - 1)
    assert all("R" in mask for mask in others)
    apply_dicache(deeper, DiCacheConfig(threshold=100, probe_depth=2, cfg="independent"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        run(kind, deeper)
    assert "R" in [*masks(deeper).values()][-1]


def alive(*models: nn.Module) -> int:
    """Branches that hold a state."""
    sessions = [cached_model(model).session for model in models]
    return sum(len([*session.timeline.run.branches]) for session in sessions)


ENDS: dict[str, Callable[[str, Any], Any]] = {
    "the end": run,
    "an abort": lambda kind, pipe: abort(kind, pipe, 5),
}


@pytest.mark.parametrize("end", ENDS)
def test_all_state_is_freed_with(end: str) -> None:
    """Also that of a branch, and of an expert, which have no part in the last step."""
    pipe = pipeline("ltx", skip_layers(until=0.5))
    apply_dicache(pipe, RULES)
    held = []
    pipe.transformer.register_forward_hook(lambda *_: held.append(alive(pipe.transformer)))
    ENDS[end]("ltx", pipe)
    assert max(held) == 3 and alive(pipe.transformer) == 0
    experts = (transformer("wan2.2"), transformer("wan2.2", seed=1))
    parts = {"transformer": experts[0], "transformer_2": experts[1], "guider_2": plain_guidance()}
    pipe = pipeline("wan2.2", plain_guidance(), **parts)
    apply_dicache(pipe, RULES)
    held = []
    experts[1].register_forward_hook(lambda *_: held.append(alive(*experts)))
    ENDS[end]("wan2.2", pipe)
    assert max(held) == 4 and alive(*experts) == 0
    low = {
        name: len(records) for name, records in get_stats(pipe)["transformer_2"].contexts.items()
    }
    assert len(low) == 2  # it had a part in the run


@pytest.mark.parametrize("name", ("wan", "ltx, layers skipped", "flux without guidance"))
def test_the_switch_on_a_component(name: str) -> None:
    """Nobody tells it the scheduler, so N has to be given, and timesteps are read."""
    kind, pipe, applied = CASES[name].kind, make(name), make(name)
    plain = run(kind, pipe)
    rules = {"threshold": float("inf"), "retention_ratio": 0.25, "num_inference_steps": STEPS}
    pipe.transformer.enable_cache(DiCacheConfig(**rules))
    apply_dicache(applied, RULES)
    for _ in range(2):
        assert torch.equal(run(kind, pipe), run(kind, applied))
        assert masks(pipe) == masks(applied)
    pipe.transformer.disable_cache()
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(run(kind, pipe), plain)
