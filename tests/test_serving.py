"""The plug-ins for vLLM-Omni and SGLang, on stand-ins of their models and of what calls a cache."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import serving_engines as engines
import torch
from helpers import mask
from serving_engines import (
    SGLANG,
    VLLM_OMNI,
    CacheBackend,
    DiffusionCacheConfig,
    ModelRunner,
    Pipeline,
    Request,
    build,
    condition,
    vllm_omni,
)
from torch import Tensor, nn

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    apply_dicache,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from dicache.adapters.serving import sglang as for_sglang
from dicache.adapters.serving import vllm_omni as for_vllm_omni
from dicache.adapters.serving.locate import RequestLocator
from dicache.adapters.serving.settings import config_of, keys_of
from dicache.core.trajectory import Trajectory
from dicache.driver.families import find_family

KINDS = [*VLLM_OMNI, *SGLANG]
MASK = "CCRRCRRC"
NEVER = {"threshold": 0.0, "retention_ratio": 0.0, "compute_last_step": False}
ALWAYS = {"threshold": math.inf, "retention_ratio": 0.0, "max_consecutive_reuse": 2}


@pytest.fixture
def engine() -> Iterator[Any]:
    """A process of vLLM-Omni that called the plug-in."""
    with vllm_omni() as found:
        for_vllm_omni.register()
        yield found


def serve(kind: str, config: dict[str, Any], **given: Any) -> ModelRunner:
    return ModelRunner(Pipeline(kind, **given), "dicache", config)


def masks_of(thing: Any, model: str = "transformer") -> dict[str, str]:
    stats = get_stats(thing)[model]
    return {name: mask(records) for name, records in stats.contexts.items()}


def alone(kind: str, request: Request, config: dict[str, Any], **given: Any) -> list[Tensor]:
    """What a server that does nothing else makes of a request."""
    runner = serve(kind, config, **given)
    runner.execute(request)
    return runner.pipeline.seen


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(some, others, strict=True))


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_stand_in_has_a_row_of_its_engine(kind: str) -> None:
    model = build(kind)
    family = find_family(model)
    package = type(model).__module__.partition(".")[0]
    assert family is not None and family.module == package
    assert sum(len(getattr(model, stack.attribute)) for stack in family.stacks) in (4, 8)


def calls(kind: str, num_steps: int) -> Iterator[dict[str, Any]]:
    """Tokens on a smooth way, as a sampler would go."""
    shape = (1, engines.CHANNELS, 1, 3, 3) if kind in engines.VIDEOS else (1, 9, engines.CHANNELS)
    unit = 1 if kind in engines.THOUSANDTHS else 1000
    start, end = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)).unbind()
    given = condition(kind, 5)
    for step in range(num_steps):
        share = 1 - step / num_steps
        bend = 0.2 * math.sin(3 * share)
        latents = share * start + (1 - share) * end + bend * start * end
        yield {"hidden_states": latents, "timestep": torch.tensor([unit * share]), **given}


def answer(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Twin:
    """An un-cached model whose image tokens are seen on their way, and may be replaced."""

    def __init__(self, kind: str) -> None:
        self.model = model = build(kind)
        lists = [each for each in model.children() if isinstance(each, nn.ModuleList)]
        blocks = [block for each in lists for block in each]
        self.blocks, self.first, self.last = blocks, blocks[0], blocks[-1]
        self.image_at = 0 if kind in ("hunyuan", "sglang-hunyuan") else 1

    def tokens(self, output: Any, length: int) -> Tensor:
        if isinstance(output, tuple):
            return output[self.image_at]
        return output[:, :length] if self.image_at == 0 else output[:, -length:]

    def with_tokens(self, output: Any, y: Tensor) -> Any:
        if isinstance(output, tuple):
            return tuple(y if k == self.image_at else each for k, each in enumerate(output))
        rest = output.shape[1] - y.shape[1]
        text = output[:, y.shape[1] :] if self.image_at == 0 else output[:, :rest]
        return torch.cat([y, text] if self.image_at == 0 else [text, y], dim=1)

    def see(self, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, p, y and the answer."""
        seen: dict[str, Tensor] = {}

        def before(_: Any, args: Any, kwargs: Any) -> None:
            seen["x"] = args[0] if args else kwargs["hidden_states"]

        def note(name: str) -> Any:
            return lambda module, args, output: seen.update(
                {name: self.tokens(output, seen["x"].shape[1])}
            )

        handles = [
            self.first.register_forward_pre_hook(before, with_kwargs=True),
            self.first.register_forward_hook(note("p")),
            self.last.register_forward_hook(note("y")),
        ]
        given = answer(self.model(**call))
        for handle in handles:
            handle.remove()
        x, p, y = (seen[name].double() for name in "xpy")
        return x, p, y, given

    def answer(self, y: Tensor, call: dict[str, Any]) -> Tensor:
        """What the model would say if its last block had returned y."""
        handle = self.last.register_forward_hook(
            lambda module, args, output: self.with_tokens(output, y.float())
        )
        given = answer(self.model(**call))
        handle.remove()
        return given


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_reused_steps_are_those_of_the_papers_formulas(kind: str) -> None:
    model, twin, window = build(kind), Twin(kind), []
    apply_dicache(model, DiCacheConfig(schedule=MASK, num_inference_steps=len(MASK)))
    for letter, call in zip(MASK, calls(kind, len(MASK)), strict=True):
        x, p, y, expected = twin.see(call)
        if letter == "C":
            window = [*window[-1:], (y - x, p - x)]
        else:
            (r_old, q_old), (r, q) = window[0], window[-1]
            d, a = q - q_old, p - x - q_old
            gamma = min(max(float((a * d).sum() / (d * d).sum()), 0.0), 2.0)
            expected = twin.answer(x + r_old + gamma * (r - r_old), call)
        assert (answer(model(**call)) - expected).abs().max() < 1e-5
    (found,) = get_stats(model).contexts.values()
    assert mask(found) == MASK
    computed = MASK.count("C")
    assert get_stats(model).block_calls == computed * len(twin.blocks) + len(MASK) - computed


@pytest.mark.parametrize("kind", VLLM_OMNI)
def test_without_reuse_a_request_is_the_engines_own_bit_by_bit(kind: str, engine: Any) -> None:
    runner = serve(kind, NEVER)
    plain = Pipeline(kind)
    with torch.inference_mode():
        plain.forward(Request(branches=2))
    runner.execute(Request(branches=2))
    assert same(runner.pipeline.seen, plain.seen)
    assert masks_of(runner.pipeline) == {"branch0": "C" + 7 * "c", "branch1": "C" + 7 * "c"}


@pytest.mark.parametrize("kind", ["flux", "hunyuan", "wan"])
def test_what_changes_behind_the_probe_begins_the_trajectory_anew(kind: str, engine: Any) -> None:
    model = build(kind)
    rules = {**ALWAYS, "num_inference_steps": 12, "cfg": "independent"}
    apply_dicache(model, DiCacheConfig(**rules))
    name = "joint_attention_kwargs" if kind == "flux" else "attention_kwargs"
    with torch.inference_mode():
        for index, call in enumerate(calls(kind, 12)):
            model(**call, **{name: {"scale": 1.0 if index < 5 else 0.5}})
    (found,) = get_stats(model).contexts.values()
    assert mask(found, resumed="C") == "CRRCRCCRRCRC"


def test_vace_hints_that_end_begin_the_trajectory_anew(engine: Any) -> None:
    model = build("vace")
    apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=12))
    with torch.inference_mode():
        for index, call in enumerate(calls("vace", 12)):
            model(**{**call, "vace_context_scale": [0.5 if index < 5 else 0.0]})
    (found,) = get_stats(model).contexts.values()
    assert mask(found, resumed="C") == "CRRCRCCRRCRC"


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_samples_that_decide_for_themselves_are_those_of_a_batch_of_one(kind: str) -> None:
    rules = DiCacheConfig(granularity="sample", threshold=0.008, num_inference_steps=10)
    batch, singles, model = [*calls(kind, 10)], [], build(kind)
    other = [{**call, "hidden_states": 4 * call["hidden_states"].flip(1)} for call in batch]
    for steps in (batch, other):
        one = build(kind)
        apply_dicache(one, rules)
        singles.append(([answer(one(**call)) for call in steps], get_stats(one)))
    apply_dicache(model, rules)
    with warnings.catch_warnings(record=True) as caught:
        for index, pair in enumerate(zip(batch, other, strict=True)):
            call = {name: joined(*[each[name] for each in pair]) for name in pair[0]}
            expected = torch.cat([outputs[index] for outputs, _ in singles])
            assert (answer(model(**call)) - expected).abs().max() < 1e-5
    (records,) = get_stats(model).contexts.values()
    found = [mask(each for each in records if each.sample == k) for k in (0, 1)]
    assert found == [mask(stats.contexts["branch0"]) for _, stats in singles]
    assert found[0] != found[1]
    # SGLang's Qwen-Image shares what it computes for the batch, so its blocks run for all samples.
    runs_for_all = any("ran for all samples" in str(each.message) for each in caught)
    assert runs_for_all == (kind == "sglang-qwen")
    apart = sum(stats.block_samples for _, stats in singles)
    assert (get_stats(model).block_samples == apart) == (not runs_for_all)


def joined(left: Any, right: Any) -> Any:
    """Arguments of two samples as those of a batch; texts are the same objects in every step."""
    if isinstance(left, list) and isinstance(left[0], Tensor):
        return [joined(*pair) for pair in zip(left, right, strict=True)]
    if not isinstance(left, Tensor):
        return left
    key = id(left), id(right)
    if key not in _joined:
        _joined[key] = (torch.cat([left, right]), left, right)
    return _joined[key][0]


_joined: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}


# --- vLLM-Omni: requests -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_request_knows_nothing_of_the_last_one(kind: str, engine: Any) -> None:
    runner = serve(kind, ALWAYS)
    requests = [
        Request(1, 8, branches=2),
        Request(2, 8, branches=2),  # just like the last one
        Request(3, 5),  # fewer steps and branches
        Request(4, 9, branches=2, batch=2),
    ]
    for request in requests:
        runner.execute(request)
        assert same(runner.pipeline.seen, alone(kind, request, ALWAYS))
        assert all("R" in found for found in masks_of(runner.pipeline).values())


def test_requests_have_runs_of_their_own(engine: Any) -> None:
    locator = RequestLocator(find_family(build("wan")))
    pipeline, text = Pipeline("wan"), torch.zeros(1)
    pipeline.scheduler.set_timesteps(3)
    pipeline.scheduler.set_begin_index(0)

    def where() -> Any:
        place = pipeline.scheduler.step_index or 0
        time = pipeline.scheduler.timesteps[place].expand(1)
        arguments = {"timestep": time, "encoder_hidden_states": text}
        return locator.where(arguments, torch.Size([1, 9, 16]))

    runs = []
    for _ in range(2):
        locator.begin(pipeline, 3)
        first = where()
        second = where()
        pipeline.scheduler.step(torch.zeros(2), pipeline.scheduler.timesteps[0], torch.zeros(2))
        third = where()
        assert first.run is second.run is third.run and first.run is not None
        assert [each.begins for each in (first, second, third)] == [True, False, False]
        assert [each.position for each in (first, second, third)] == [0, 0, 1]
        assert first.num_steps == 3 and first.prompt is text
        runs.append(first.run)
        pipeline.scheduler.set_timesteps(3)
        pipeline.scheduler.set_begin_index(0)
    assert runs[0] is not runs[1]


def test_without_a_position_timesteps_show_where_a_run_ends() -> None:
    """Nobody says so, if the engine forgets it, and a key would keep the runs together."""
    locator = RequestLocator(find_family(build("wan")))
    locator.begin(SimpleNamespace(scheduler=None), 3)
    where = locator.where({"timestep": torch.tensor([5.0])}, torch.Size([1, 9, 16]))
    assert where.run is None and where.position is None
    assert (where.num_steps, where.timestep, where.begins) == (3, 5.0, True)


@pytest.mark.parametrize("has_scheduler", [True, False])
def test_a_refresh_that_is_lost_spoils_nothing(has_scheduler: bool, engine: Any) -> None:
    """vLLM-Omni does not refresh where it does not know the number of steps."""
    runner = serve("wan", ALWAYS)
    if not has_scheduler:  # where we would look for it
        runner.pipeline.__dict__["sampler"] = runner.pipeline.scheduler
        forward = runner.pipeline.forward

        def hidden(request: Request) -> Tensor:
            runner.pipeline.scheduler = runner.pipeline.sampler
            runner.pipeline.sampler.set_timesteps(request.num_steps)
            scheduler, runner.pipeline.scheduler = runner.pipeline.scheduler, None
            return runner.pipeline.denoise(request, scheduler)

        runner.pipeline.forward = hidden
        assert forward is not None
    runner.execute(Request(1, 8))
    runner.execute(Request(2, 8), refresh=False)
    assert same(runner.pipeline.seen, alone("wan", Request(2, 8), ALWAYS))
    runner.execute(Request(3, 8, aborts_at=99), refresh=False)
    assert same(runner.pipeline.seen, alone("wan", Request(3, 8), ALWAYS))


@pytest.mark.parametrize("refresh", [True, False])
def test_an_aborted_request_leaves_nothing_to_the_next(refresh: bool, engine: Any) -> None:
    runner = serve("flux", ALWAYS)
    with pytest.raises(RuntimeError, match="aborted"):
        runner.execute(Request(1, 8, branches=2, aborts_at=5))
    runner.execute(Request(2, 8, branches=2), refresh)
    assert same(runner.pipeline.seen, alone("flux", Request(2, 8, branches=2), ALWAYS))


def test_noise_that_a_pipeline_adds_itself_is_seen(engine: Any) -> None:
    runner = serve("wan", {})
    with pytest.warns(DiCacheWarning, match="adds new noise"):
        runner.execute(Request(1, 8, is_noisy=True))
    assert "R" not in masks_of(runner.pipeline)["branch0"]


def test_the_schedulers_number_of_steps_counts(engine: Any) -> None:
    """A pipeline may take another number than it was asked for: of sigmas, or of a part of them."""
    runner = serve("wan", {**ALWAYS, "retention_ratio": 0.5, "compute_last_step": True})
    runner.cache_backend.refresh(runner.pipeline, 50)
    with torch.inference_mode():
        runner.pipeline.forward(Request(1, 8))
    assert masks_of(runner.pipeline, "transformer") == {"branch0": "CCCCRRcC"}


def trajectories() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(each, Trajectory) for each in gc.get_objects())


def test_nothing_is_kept_behind_a_requests_last_step(engine: Any) -> None:
    before = trajectories()
    runner = serve("wan", ALWAYS, experts=2)
    runner.execute(Request(branches=2))
    assert {*masks_of(runner.pipeline, "transformer_2")} == {"branch0", "branch1"}
    assert trajectories() == before + 2  # the expert's that made no last step
    runner.cache_backend.refresh(runner.pipeline, 8)
    assert trajectories() == before
    with pytest.raises(RuntimeError, match="aborted"):
        runner.execute(Request(aborts_at=4))
    reset_dicache(runner.pipeline)
    assert trajectories() == before


def test_experts_share_the_steps_of_a_run(engine: Any) -> None:
    """Leading steps count in the whole run, not from each expert's first step."""
    runner = serve("wan", {**ALWAYS, "retention_ratio": 0.5}, experts=2)
    for seed in (1, 2):
        runner.execute(Request(seed, 12))
        stats = get_stats(runner.pipeline)
        steps = {name: [r.step for r in each.contexts["branch0"]] for name, each in stats.items()}
        assert steps["transformer"] + steps["transformer_2"] == [*range(12)]
        assert len(steps["transformer"]) == 7
        assert masks_of(runner.pipeline) == {"branch0": "CCCCCCR"}
        assert masks_of(runner.pipeline, "transformer_2") == {"branch0": "CRRcC"}


def test_a_transformer_that_was_loaded_anew_gets_the_cache_with_the_next_request(
    engine: Any,
) -> None:
    runner = serve("wan", ALWAYS)
    runner.execute(Request(1))
    runner.pipeline.transformer = build("wan")
    runner.execute(Request(1))
    assert same(runner.pipeline.seen, alone("wan", Request(1), ALWAYS))
    assert "R" in masks_of(runner.pipeline)["branch0"]


def test_a_refresh_says_what_the_last_request_saved(engine: Any, caplog: Any) -> None:
    runner = serve("wan", ALWAYS)
    with caplog.at_level(logging.INFO, logger="dicache.adapters.serving"):
        runner.execute(Request(1))
        assert "reused" not in caplog.text
        runner.execute(Request(1))
        reused = masks_of(runner.pipeline)["branch0"].count("R")
        assert f"reused {reused} of 8 steps of transformer" in caplog.text
        caplog.clear()
        runner.cache_backend.refresh(runner.pipeline, 8, verbose=False)
    assert caplog.text == ""


def test_the_verbs_know_an_engines_pipeline(engine: Any) -> None:
    pipeline = Pipeline("flux")
    apply_dicache(pipeline, DiCacheConfig(**ALWAYS))
    with torch.inference_mode():
        pipeline.forward(Request(1))
        assert same(pipeline.seen, alone("flux", Request(1), ALWAYS))
        pipeline.forward(Request(2))  # nobody refreshes
        assert same(pipeline.seen, alone("flux", Request(2), ALWAYS))
    with pytest.raises(ValueError, match="already been enabled"):
        apply_dicache(pipeline)
    remove_dicache(pipeline)
    assert "_dicache" not in vars(pipeline.transformer)
    with pytest.raises(ValueError, match="no DiCache on this Pipeline"):
        get_stats(pipeline)


def test_disabled_it_is_gone(engine: Any) -> None:
    runner = serve("wan", ALWAYS)
    before = {*vars(build("wan"))}
    runner.cache_backend.disable(runner.pipeline)
    assert not runner.cache_backend.is_enabled()
    assert {*vars(runner.pipeline.transformer)} == before
    runner.cache_backend.disable(runner.pipeline)  # and once more
    runner.cache_backend.refresh(runner.pipeline, 8)
    assert runner.cache_backend.is_enabled()


@pytest.mark.parametrize("how", ["regions", "whole"])
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_models_that_the_engine_compiled_before(kind: str, how: str, engine: Any) -> None:
    """vLLM-Omni exchanges the blocks' `forward`, or compiles the model, and then enables caches."""
    pipeline = Pipeline(kind)
    if how == "whole":
        pipeline.transformer.compile(backend="eager")
    else:
        for block in pipeline.transformer.modules():
            if isinstance(block, engines.Block):
                block.forward = torch.compile(block.forward, backend="eager")
    runner = ModelRunner(pipeline, "dicache", ALWAYS)
    runner.execute(Request(1))
    expected = alone(kind, Request(1), ALWAYS)
    for some, other in zip(pipeline.seen, expected, strict=True):
        assert (some - other).abs().max() < 1e-5
    assert "R" in masks_of(pipeline)["branch0"]


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, DiCacheConfig()),
        ({"threshold": 0.05}, DiCacheConfig(threshold=0.05)),
        ({"preset": "wan2.1"}, DiCacheConfig.preset("wan2.1")),
        ({"preset": "flux", "threshold": 0.2}, DiCacheConfig.preset("flux", threshold=0.2)),
        ({"num_inference_steps": 28}, DiCacheConfig(num_inference_steps=28)),
        ({"cache_dtype": "bfloat16"}, DiCacheConfig(cache_dtype=torch.bfloat16)),
        ({"gamma_range": [0.5, None]}, DiCacheConfig(gamma_range=(0.5, None))),
    ],
)
@pytest.mark.parametrize("way", ["engine", "mapping"])
def test_keys_become_a_configuration(given: Any, expected: Any, way: str, engine: Any) -> None:
    choose = engine("vllm_omni.diffusion.cache.selector").get_cache_backend
    config = DiffusionCacheConfig.from_dict(given) if way == "engine" else given
    assert choose("dicache", config).rules == expected


def test_no_keys_are_our_defaults(engine: Any) -> None:
    choose = engine("vllm_omni.diffusion.cache.selector").get_cache_backend
    assert choose("dicache", None).rules == DiCacheConfig()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"treshold": 0.1}, ["'treshold'", "Did you mean 'threshold'?", "cache_config", "preset"]),
        ({"rel_l1_thresh": 0.1}, ["'rel_l1_thresh'", "threshold"]),  # of another cache
        ({"velocity_sim_thresholds": [0.5]}, ["'velocity_sim_thresholds'"]),
        ({"preset": "sdxl"}, ["'sdxl'", "flux", "wan2.1"]),
        ({"threshold": -1}, ["threshold is -1", ">= 0"]),
        (
            {"cache_dtype": "load"},
            ["cache_dtype is 'load'", "torch.bfloat16"],
        ),  # in torch, no dtype
    ],
)
def test_wrong_keys_are_errors_that_help(given: Any, words: list[str], engine: Any) -> None:
    with pytest.raises(ValueError) as caught:
        ModelRunner(Pipeline("wan"), "dicache", given)
    assert all(word in str(caught.value) for word in words)


def test_fields_of_other_caches_at_their_defaults_were_set_by_nobody() -> None:
    assert keys_of(DiffusionCacheConfig()) == {}
    assert keys_of(DiffusionCacheConfig.from_dict({"max_warmup_steps": 4})) == {}
    assert keys_of(DiffusionCacheConfig.from_dict({"max_warmup_steps": 5, "threshold": 1})) == {
        "max_warmup_steps": 5,
        "threshold": 1,
    }
    assert config_of({}, "here") == DiCacheConfig()


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 2},
        {"sequence_parallel_size": 4, "ulysses_degree": 4},
        {"cfg_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"use_hsdp": True},
    ],
)
def test_several_gpus_are_refused(sizes: dict[str, Any], engine: Any) -> None:
    with pytest.raises(ValueError) as caught:
        serve("flux", {}, **sizes)
    assert all(f"{name}={value}" in str(caught.value) for name, value in sizes.items())
    assert "Expected one GPU a model" in str(caught.value)
    one = dict.fromkeys(sizes, 1) | {"use_hsdp": False}
    assert serve("flux", {}, **one).cache_backend.is_enabled()


def test_a_transformer_that_knows_of_several_gpus_is_refused(engine: Any) -> None:
    pipeline = Pipeline("qwen")
    pipeline.transformer.parallel_config.sequence_parallel_size = 2
    with pytest.raises(ValueError, match="sequence_parallel_size=2"):
        apply_dicache(pipeline)
    assert "_dicache" not in vars(pipeline.transformer)


def test_several_processes_are_refused_whatever_the_engine_calls_them(
    engine: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="world size=2"):
        serve("flux", {})


def test_a_pipeline_without_a_row_is_refused_by_name(engine: Any) -> None:
    pipeline = Pipeline("wan")
    pipeline.transformer = engines.UnknownTransformer()
    backend = engine("vllm_omni.diffusion.cache.selector").get_cache_backend("dicache", {})
    with pytest.raises(ValueError) as caught:
        backend.enable(pipeline)
    words = ("Pipeline", "UnknownTransformer", "WanTransformer3DModel (vllm_omni)")
    assert all(word in str(caught.value) for word in words)
    assert not backend.is_enabled()


def test_all_transformers_of_a_pipeline_get_it_or_none(engine: Any) -> None:
    pipeline = Pipeline("wan", experts=2)
    pipeline.transformer_2.blocks = nn.ModuleList([pipeline.transformer_2.blocks[0]])
    with pytest.raises(ValueError, match="probe_depth"):
        apply_dicache(pipeline)
    assert "_dicache" not in vars(pipeline.transformer)


# --- entry points --------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def declared() -> dict[str, str]:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {group: each["dicache"] for group, each in project["entry-points"].items()}


def test_the_packaging_declares_what_engines_look_for() -> None:
    found = declared()
    assert {*found} == {"vllm_omni.general_plugins", "sglang.multimodal_gen.plugins"}
    for value in found.values():
        module, _, name = value.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_importing_the_plug_ins_needs_neither_engine_nor_diffusers() -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'vllm_omni', 'sglang'): sys.modules[name] = None\n"
        "import dicache.adapters.serving.vllm_omni, dicache.adapters.serving.sglang\n"
        "dicache.adapters.serving.vllm_omni.register()\n"
        "dicache.adapters.serving.sglang.register()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Expected vLLM-Omni 0.30" in done.stderr


def test_the_plug_in_may_be_called_again(engine: Any) -> None:
    selector = engine("vllm_omni.diffusion.cache.selector")
    once = selector.get_cache_backend
    for_vllm_omni.register()
    assert selector.get_cache_backend is once
    runner = engine("vllm_omni.diffusion.worker.diffusion_model_runner")
    assert isinstance(runner.get_cache_backend("dicache", {}), CacheBackend)


def test_other_backends_are_the_engines_own(engine: Any) -> None:
    for module in ("cache.selector", "worker.diffusion_model_runner"):
        choose = engine(f"vllm_omni.diffusion.{module}").get_cache_backend
        assert choose(None, {}) is None and choose("none", {}) is None
        with pytest.raises(ValueError, match="Unsupported cache backend: tea"):
            choose("tea", {})


def test_a_runner_that_is_imported_later_takes_the_selectors() -> None:
    with vllm_omni() as found:
        runner = "vllm_omni.diffusion.worker.diffusion_model_runner"
        del sys.modules[runner]
        for_vllm_omni.register()
        choose = found("vllm_omni.diffusion.cache.selector").get_cache_backend
        assert choose("dicache", {}).rules == DiCacheConfig()
        assert runner not in sys.modules


def test_another_plug_in_around_the_runners_choice_stays() -> None:
    with vllm_omni() as found:
        runner = found("vllm_omni.diffusion.worker.diffusion_model_runner")
        inner = runner.get_cache_backend

        def theirs(cache_backend: Any, cache_config: Any) -> Any:
            return "theirs" if cache_backend == "their" else inner(cache_backend, cache_config)

        runner.get_cache_backend = theirs
        for_vllm_omni.register()
        assert runner.get_cache_backend("their", {}) == "theirs"
        assert runner.get_cache_backend("dicache", {}).rules == DiCacheConfig()


class AsksForMore(CacheBackend):
    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return NotImplemented

    def warm_up(self) -> None: ...

    warm_up.__isabstractmethod__ = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"get_cache_backend": None}, "get_cache_backend"),
        ({"get_cache_backend": lambda name: None}, "takes (name)"),
        ({"CacheBackend": None}, "CacheBackend"),
        ({"CacheBackend": AsksForMore}, "warm_up"),
    ],
)
def test_another_version_of_the_engine_is_left_alone(other: Any, told: str, caplog: Any) -> None:
    with vllm_omni(**other) as found:
        names = ("cache.selector", "worker.diffusion_model_runner")
        before = [dict(vars(found(f"vllm_omni.diffusion.{name}"))) for name in names]
        for_vllm_omni.register()
        after = [dict(vars(found(f"vllm_omni.diffusion.{name}"))) for name in names]
    assert before == after
    assert told in caplog.text
    assert (
        "Expected vLLM-Omni 0.30, with get_cache_backend(cache_backend, cache_conf" in caplog.text
    )


# --- SGLang --------------------------------------------------------------------------------------


@pytest.fixture
def stage_class(monkeypatch: Any) -> Iterator[Any]:
    """A denoising stage of a server that was started with DICACHE_SGLANG."""
    monkeypatch.setenv(for_sglang.VARIABLE, json.dumps({**ALWAYS, "threshold": 1e9}))
    with engines.sglang() as stage:
        for_sglang.register()
        yield stage


SGLANG_RULES = DiCacheConfig(**{**ALWAYS, "threshold": 1e9})


def by_hand(kind: str, request: Request) -> list[Tensor]:
    """The same loop on a model that was cached by `apply_dicache`."""
    pipeline = Pipeline(kind)
    apply_dicache(pipeline, SGLANG_RULES)
    with torch.no_grad():
        pipeline.forward(request)
    return pipeline.seen


@pytest.mark.parametrize("kind", SGLANG)
def test_sglangs_requests_are_cached_each_for_itself(kind: str, stage_class: Any) -> None:
    stage = stage_class(kind)
    for request in (Request(1, 8, branches=2), Request(2, 8, branches=2), Request(3, 6)):
        stage.forward(request)
        assert same(stage.seen, by_hand(kind, request))
        assert all("R" in found for found in masks_of(stage).values())
        assert stage.asked[-2:] == [request.num_steps, request]  # its own methods ran


def test_what_an_aborted_request_left_is_freed_when_sglangs_next_one_begins(
    stage_class: Any,
) -> None:
    before, stage = trajectories(), stage_class("sglang-flux")
    with pytest.raises(RuntimeError, match="aborted"):
        stage.forward(Request(1, branches=2, aborts_at=4))
    assert trajectories() == before + 2
    stage._reset_dit_cache_states(Request(2))
    assert trajectories() == before


def plain(kind: str, request: Request) -> list[Tensor]:
    pipeline = Pipeline(kind)
    with torch.no_grad():
        pipeline.forward(request)
    return pipeline.seen


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_without_the_variable_nothing_is_hooked(text: str | None, monkeypatch: Any) -> None:
    monkeypatch.delenv(for_sglang.VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(for_sglang.VARIABLE, text)
    with engines.sglang() as stage:
        before = stage._maybe_enable_cache_dit, stage._reset_dit_cache_states
        for_sglang.register()
        after = stage._maybe_enable_cache_dit, stage._reset_dit_cache_states
    assert (before == after) == (text != "{}")


@pytest.mark.parametrize("name", ["enable_teacache", "enable_spectrum"])
def test_a_request_with_another_cache_has_only_that(
    name: str, stage_class: Any, caplog: Any
) -> None:
    stage = stage_class("sglang-flux")
    stage.forward(Request(1))
    for _ in range(2):
        stage.forward(Request(1, **{name: True}))
        assert same(stage.seen, plain("sglang-flux", Request(1)))
    assert caplog.text.count(name) == 1
    stage.forward(Request(1))  # and the next one is cached again
    assert same(stage.seen, by_hand("sglang-flux", Request(1)))


def test_cache_dit_and_cuda_graphs_keep_it_out(stage_class: Any, caplog: Any) -> None:
    for attribute, owner in (("_cache_dit_enabled", None), ("enable_breakable_cuda_graph", "args")):
        stage = stage_class("sglang-flux")
        setattr(stage if owner is None else stage.server_args, attribute, True)
        stage.forward(Request(1))
        assert same(stage.seen, plain("sglang-flux", Request(1)))
    assert "Cache-DiT" in caplog.text and "enable_breakable_cuda_graph" in caplog.text


@pytest.mark.parametrize(
    "args", [{"tp_size": 2}, {"sp_degree": 2}, {"enable_cfg_parallel": True}, {"ring_degree": 2}]
)
def test_sglang_on_several_gpus_is_refused(args: dict[str, Any], stage_class: Any) -> None:
    (name,) = args
    with pytest.raises(ValueError, match=f"DenoisingStage.*{name}={args[name]}"):
        stage_class("sglang-flux", **args).forward(Request(1))
    stage_class("sglang-flux", **{name: None}).forward(Request(1))


def test_sglangs_models_without_a_row_run_as_they_are(stage_class: Any, caplog: Any) -> None:
    stage = stage_class("sglang-flux")
    stage.transformer = Pipeline("sglang-flux").transformer
    type(stage.transformer).__module__, before = "elsewhere", type(stage.transformer).__module__
    try:
        for _ in range(2):
            stage.forward(Request(1))
            assert same(stage.seen, plain("sglang-flux", Request(1)))
    finally:
        type(stage.transformer).__module__ = before
    assert caplog.text.count("no row for a transformer of this DenoisingStage") == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("threshold=1", "is 'threshold=1', which is no JSON"),
        ("[1]", "Expected a JSON object"),
        ('{"treshold": 1}', "DICACHE_SGLANG has an unknown key 'treshold'. Did you mean 'thresh"),
    ],
)
def test_a_wrong_variable_is_an_error(text: str, told: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(for_sglang.VARIABLE, text)
    with engines.sglang(), pytest.raises(ValueError) as caught:
        for_sglang.register()
    assert told in str(caught.value)


@pytest.mark.parametrize("missing", ["plugin_hook", "HookType", "everything"])
def test_another_version_of_sglang_is_left_alone(
    missing: str, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv(for_sglang.VARIABLE, "{}")
    path = "sglang.multimodal_gen.runtime.platforms.plugins"
    names = {"plugin_hook": print, "HookType": engines.HookType}
    names.pop(missing, None)
    with engines.modules({path: names}):
        if missing == "everything":
            sys.modules[path] = None  # type: ignore[assignment]
        for_sglang.register()
    assert "SGLang 0.5.23 has plugin_hook(target, type)" in caplog.text
