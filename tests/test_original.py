"""The cache in the original code of HunyuanVideo and Wan, on stand-ins with its shapes of calls."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import mask, masks
from original_models import HunyuanVideoSampler, WanT2V, ask, branches, build, steps, wan_2_2
from test_own_families import FullyShardedDataParallel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    apply_dicache,
    apply_sparse_videogen,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from dicache.core.trajectory import Trajectory

KINDS = ["hunyuan", "t2v", "i2v", "flf2v", "vace", "2.2"]
ROWS = {"hunyuan": "hunyuan-video-original", "t2v": "wan-original"}  # of the table of families
MASK = "CCRRCRRC"
NEVER = {"threshold": 0.0, "retention_ratio": 0.0}
ALWAYS = {"threshold": math.inf, "retention_ratio": 0.0}


def run(model: Any, kind: str, num_steps: int = len(MASK), **given: Any) -> list[list[Tensor]]:
    """The answers of every branch, the first branch first."""
    conditions = branches(kind, **given)
    answers: list[list[Tensor]] = [[] for _ in conditions]
    for latents, time in steps(kind, num_steps, **given):
        for found, condition in zip(answers, conditions, strict=True):
            found.append(ask(model, latents, time, condition, kind))
    return answers


def same(some: list[list[Tensor]], others: list[list[Tensor]]) -> bool:
    pairs = [pair for two in zip(some, others, strict=True) for pair in zip(*two, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


# --- right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rules",
    [DiCacheConfig(**NEVER, num_inference_steps=8), DiCacheConfig.preset("wan2.1", **NEVER)],
)
def test_without_reuse_it_is_the_plain_model_bit_by_bit(kind: str, rules: DiCacheConfig) -> None:
    model = build(kind)
    apply_dicache(model, rules)
    assert same(run(model, kind), run(build(kind), kind))
    assert all(found.count("c") >= 6 for found in masks_of(model).values())


def masks_of(model: Any) -> dict[str, str]:
    stats = get_stats(model)
    return {name: mask(records) for name, records in stats.contexts.items()}


class Twin:
    """An un-cached model whose image tokens are seen on their way, and may be replaced."""

    def __init__(self, kind: str, model: Any) -> None:
        self.kind, self.model = kind, model
        single = [*model.single_blocks] if kind == "hunyuan" else [*model.blocks]
        double = [*model.double_blocks] if kind == "hunyuan" else []
        self.first, self.last = [*double, *single][0], single[-1]

    def tokens(self, output: Any, length: int) -> Tensor:
        return (output[0] if isinstance(output, tuple) else output)[:, :length].double()

    def see(self, *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, p, y and the answer."""
        seen: dict[str, Tensor] = {}

        def before(_: Any, args: Any) -> None:
            seen["x"] = args[0].double()

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, output: seen.update(
                {name: self.tokens(output, seen["x"].shape[1])}
            )

        handles = [
            self.first.register_forward_pre_hook(before),
            self.first.register_forward_hook(note("p")),
            self.last.register_forward_hook(note("y")),
        ]
        answer = ask(self.model, *call, self.kind)
        for handle in handles:
            handle.remove()
        return seen["x"], seen["p"], seen["y"], answer

    def answer(self, y: Tensor, *call: Any) -> Tensor:
        """What the model would say if its last block had returned y."""

        def replace(_: Any, __: Any, output: Tensor) -> Tensor:
            return torch.cat([y.to(output.dtype), output[:, y.shape[1] :]], dim=1)

        handle = self.last.register_forward_hook(replace)
        answer = ask(self.model, *call, self.kind)
        handle.remove()
        return answer


def expected(kind: str, model: Any, schedule: str, **given: Any) -> list[list[Tensor]]:
    """By the formulas of the paper with a gamma of least squares, in fp64."""
    twin, answers = Twin(kind, model), []
    for condition in branches(kind, **given):
        window: list[tuple[Tensor, Tensor]] = []
        answers.append([])
        for letter, call in zip(schedule, steps(kind, len(schedule), **given), strict=True):
            x, p, y, answer = twin.see(*call, condition)
            if letter == "C":
                window = [*window[-1:], (y - x, p - x)]
            else:
                (r_old, q_old), (r, q) = window[0], window[-1]
                d, a = q - q_old, p - x - q_old
                gamma = min(max(float((a * d).sum() / (d * d).sum()), 0.0), 2.0)
                answer = twin.answer(x + r_old + gamma * (r - r_old), *call, condition)
            answers[-1].append(answer)
    return answers


def assert_alike(some: list[list[Tensor]], others: list[list[Tensor]], tolerance: float) -> None:
    for found, wanted in zip(some, others, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_step_equals_the_formula(kind: str) -> None:
    model = build(kind)
    apply_dicache(model, DiCacheConfig(schedule=MASK, num_inference_steps=8))
    assert_alike(run(model, kind), expected(kind, build(kind), MASK), 1e-5)
    assert set(masks_of(model).values()) == {MASK}


@pytest.mark.parametrize("kind", ["t2v", "2.2"])
def test_dtypes_that_grow_under_autocast(kind: str) -> None:
    """Tokens enter in bf16, and leave the first block in fp32."""
    model, twin = build(kind, widens=True), build(kind, widens=True)
    for each in (model, twin):
        each.patch_embedding.to(torch.bfloat16)
    apply_dicache(model, DiCacheConfig(schedule=MASK, num_inference_steps=8))
    assert_alike(run(model, kind), expected(kind, twin, MASK), 1e-2)
    plain = build(kind, widens=True)
    plain.patch_embedding.to(torch.bfloat16)
    computed = [k for k, letter in enumerate(MASK) if letter == "C"]
    for found, wanted in zip(run(model, kind), run(plain, kind), strict=True):
        assert all(torch.equal(found[k], wanted[k]) for k in computed)


def only(value: Any, sample: int) -> Any:
    """What a sample has of an argument for all."""
    is_a_row_each = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 1)
    return value[sample : sample + 1] if is_a_row_each else value


@contextmanager
def told_of_samples(kind: str) -> Iterator[None]:
    """HunyuanVideo's blocks cannot run for a part of a batch, and that is said once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(each.message) for each in caught if each.category is DiCacheWarning]
    assert len(found) == (kind == "hunyuan") and all("ran for all" in each for each in found)


@pytest.mark.backs("sample", rows={"t2v": ROWS["t2v"]})
@pytest.mark.rules_out("sample", rows={"hunyuan": ROWS["hunyuan"]})
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_a_batch_equals_its_own_run(kind: str) -> None:
    rules = DiCacheConfig(
        threshold=0.05, retention_ratio=0, granularity="sample", num_inference_steps=12
    )
    model = build(kind)
    apply_dicache(model, rules)
    with told_of_samples(kind):
        together, records = run(model, kind, 12, batch=2), get_stats(model).contexts
    schedules = {mask(r for r in records["branch0"] if r.sample == k) for k in (0, 1)}
    assert len(schedules) == 2, "the samples agree, so that nothing is tested"
    remove_dicache(model)
    for sample in (0, 1):
        apply_dicache(model, rules)
        conditions = [
            {name: only(value, sample) for name, value in each.items()}
            for each in branches(kind, batch=2)
        ]
        for index, (latents, time) in enumerate(steps(kind, 12, batch=2)):
            for condition, answers in zip(conditions, together, strict=True):
                alone = ask(model, only(latents, sample), time[:1], condition, kind)
                whole = answers[index][sample : sample + 1]
                assert (whole - alone).abs().max() <= 1e-5 * alone.abs().max()
        for name, own in masks_of(model).items():
            assert mask(r for r in records[name] if r.sample == sample) == own
        remove_dicache(model)


def test_a_hint_whose_scale_changes_begins_the_trajectory_anew() -> None:
    model = build("vace")
    apply_dicache(model, DiCacheConfig(**ALWAYS, compute_last_step=False, num_inference_steps=9))
    (condition, _) = branches("vace")
    for index, (latents, time) in enumerate(steps("vace", 9)):
        scale = 1.0 if index < 4 else 0.5
        ask(model, latents, time, {**condition, "vace_context_scale": scale}, "vace")
    assert masks(model, resumed="C") == {"branch0": "CRRRCCRRR"}


# --- holders -------------------------------------------------------------------------------------


def test_a_holders_only_model() -> None:
    pipe, plain = WanT2V(model=build("t2v")), WanT2V(model=build("t2v"))
    apply_dicache(pipe, DiCacheConfig(schedule=MASK, num_inference_steps=8))
    for seed in (0, 1):
        pipe.generate("t2v", 8, seed)
        (stats,) = get_stats(pipe).values()
        assert {mask(records) for records in stats.contexts.values()} == {MASK}
    assert get_stats(pipe.model).num_reused == 8
    remove_dicache(pipe)
    assert all(
        torch.equal(*pair)
        for pair in zip(pipe.generate("t2v", 8), plain.generate("t2v", 8), strict=True)
    )


def test_tencents_sampler_tells_the_number_of_steps() -> None:
    sampler = HunyuanVideoSampler(build("hunyuan"))
    apply_dicache(sampler, DiCacheConfig(**ALWAYS))
    for num_steps in (8, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DiCacheWarning)
            sampler.predict(num_steps)
        found = get_stats(sampler)
        assert list(found) == ["model"]
        assert (
            masks(found)
            if False
            else mask(found["model"].contexts["branch0"]) == ("C" + "R" * (num_steps - 2) + "C")
        )
    remove_dicache(sampler.pipeline)
    with pytest.raises(ValueError, match="no DiCache on this HYVideoDiffusionTransformer"):
        get_stats(sampler.model)


@pytest.mark.backs("FSDP", rows=ROWS)
@pytest.mark.parametrize("kind", ["t2v", "hunyuan"])
def test_models_that_fsdp_wraps(kind: str) -> None:
    plain, model = build(kind), build(kind)
    lists = ["blocks"] if kind == "t2v" else ["double_blocks", "single_blocks"]
    for blocks in (getattr(model, name) for name in lists):
        for index, block in enumerate(blocks):
            blocks[index] = FullyShardedDataParallel(block)
    holder = SimpleNamespace(model=FullyShardedDataParallel(model))
    apply_dicache(holder, DiCacheConfig(schedule=MASK, num_inference_steps=8))
    assert_alike(run(holder.model, kind), expected(kind, plain, MASK), 1e-5)
    assert set(masks_of(holder.model).values()) == {MASK}
    remove_dicache(holder)


class Wrapper(nn.Module):
    """A module of the user's that holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.dit = model


def test_a_module_may_hold_models_too() -> None:
    wrapper = Wrapper(build("t2v"))
    apply_dicache(wrapper, DiCacheConfig(**ALWAYS, num_inference_steps=8))
    run(wrapper.dit, "t2v")
    assert get_stats(wrapper)["dit"].num_reused == 12
    remove_dicache(wrapper)


def test_one_model_under_two_names_is_cached_once() -> None:
    model = build("t2v")
    holder = SimpleNamespace(model=model, dit=model)
    apply_dicache(holder, DiCacheConfig(**ALWAYS, num_inference_steps=8))
    assert list(get_stats(holder)) == ["model"]


# --- two experts ---------------------------------------------------------------------------------


def experts(**options: Any) -> WanT2V:
    return WanT2V(
        high_noise_model=build("2.2", 0, **options), low_noise_model=build("2.2", 1, **options)
    )


def masks_by_expert(pipe: WanT2V) -> dict[str, list[str]]:
    return {
        name: [mask(records, resumed="C") for records in stats.contexts.values()]
        for name, stats in get_stats(pipe).items()
    }


@pytest.mark.parametrize(
    ("boundary", "high", "low"),
    [
        (500.0, "CCCCRRRRRRR", "CRRRRRRRC"),
        (900.0, "CCC", "CRRRRRRRRRRRRRRRC"),
        (1000.0, "C", "CCCRRRRRRRRRRRRRRRC"),
    ],
)
def test_steps_of_two_experts_count_in_the_whole_run(boundary: float, high: str, low: str) -> None:
    """Of 20 steps 4 are retained: the second expert retains what is left, its first in any case."""
    pipe, rules = experts(), {"threshold": math.inf, "retention_ratio": 0.2}
    apply_dicache(pipe, DiCacheConfig(**rules, num_inference_steps=20))
    for seed in (0, 1):  # and again in the next run
        with warnings.catch_warnings():
            warnings.simplefilter("error", DiCacheWarning)
            pipe.generate("2.2", 20, seed, boundary)
        assert masks_by_expert(pipe) == {
            "high_noise_model": [high] * 2,
            "low_noise_model": [low] * 2,
        }


def test_experts_tell_of_few_steps_once_and_not_where_one_of_them_reused() -> None:
    pipe = experts()
    apply_dicache(pipe, DiCacheConfig(threshold=1e-9, num_inference_steps=4))
    with pytest.warns(DiCacheWarning, match="None of the 4 steps"):
        pipe.generate("2.2", 4)
    reused = experts()
    apply_dicache(
        reused, DiCacheConfig(**{**ALWAYS, "compute_last_step": True}, num_inference_steps=4)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        pipe.generate("2.2", 4)
        reused.generate("2.2", 4)
    assert masks_by_expert(reused) == {
        "high_noise_model": ["CRR"] * 2,
        "low_noise_model": ["C"] * 2,
    }


def test_a_run_of_experts_that_was_given_up_is_not_continued() -> None:
    pipe, plain = experts(), experts()
    rules = {"threshold": math.inf, "retention_ratio": 0.2, "num_inference_steps": 20}
    apply_dicache(pipe, DiCacheConfig(**rules))
    conditions = branches("2.2", seed=5)
    for _, (latents, time) in zip(range(14), steps("2.2", 20, seed=5), strict=False):
        model = pipe.high_noise_model if float(time) >= 500 else pipe.low_noise_model
        for condition in conditions:
            ask(model, latents, time, condition, "2.2")
    made, wanted = pipe.generate("2.2", 20), plain.generate("2.2", 20)
    assert all(torch.equal(made[k], wanted[k]) for k in range(8))  # 4 retained steps
    assert masks_by_expert(pipe)["low_noise_model"] == ["CRRRRRRRC"] * 2


def test_a_timestep_a_token_is_read_by_its_largest() -> None:
    model = build("2.2")
    apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=8))
    (condition, _) = branches("2.2")
    for latents, time in steps("2.2", 8):
        each = time[:, None].expand(1, 30).clone()
        each[:, :6] = 0.0  # the frame that is given
        ask(model, latents, each, condition, "2.2")
    assert masks(model) == {"branch0": "CRRRRRRC"}


# --- the published rules -------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [5, 6, 7, 10, 13, 20, 27, 30])
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.2, 0.3])
def test_retention_may_count_calls_as_the_published_wan_script_does(
    num_steps: int, ratio: float
) -> None:
    """A counter of calls, conditional and unconditional in turns, up to int(2 R N)."""
    calls = [("cond", k) for k in range(num_steps) for _ in (0, 1)]
    limit = int(2 * num_steps * ratio)
    wanted = ["", ""]
    for number, _ in enumerate(calls):
        wanted[number % 2] += "C" if number < limit or number < 2 else "R"
    rules = {"cfg": "independent", "compute_last_step": False, "threshold": math.inf}
    for rounding, expected_masks in (("calls", wanted), ("nearest", None)):
        model = build("t2v")
        config = DiCacheConfig(
            **rules,
            retention_ratio=ratio,
            retention_rounding=rounding,
            num_inference_steps=num_steps,
        )
        apply_dicache(model, config)
        run(model, "t2v", num_steps)
        if expected_masks is not None:
            assert [*masks_of(model).values()] == expected_masks
        elif limit % 2 == 0 and limit > 2:  # only where it is odd they differ
            assert [*masks_of(model).values()] == wanted


def test_the_presets_are_there_for_original_models() -> None:
    for kind, preset in (("hunyuan", "hunyuan-video"), ("t2v", "wan2.1")):
        model = build(kind)
        apply_dicache(model, DiCacheConfig.preset(preset, threshold=0.5, num_inference_steps=20))
        run(model, kind, 20)
        for found in masks_of(model).values():
            assert found.startswith("CCCC") and "R" in found[4:]


# --- the end of a run ----------------------------------------------------------------------------


def trajectories() -> int:
    gc.collect()
    return sum(isinstance(each, Trajectory) for each in gc.get_objects())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", [{}, {"cfg": "independent", "compute_last_step": False}], ids=str)
def test_state_is_freed_after_the_last_step_of_every_branch(
    kind: str, rules: dict[str, Any]
) -> None:
    model, before = build(kind), trajectories()
    apply_dicache(model, DiCacheConfig(**ALWAYS, **rules, num_inference_steps=8))
    for _ in range(2):
        conditions = branches(kind)
        for index, (latents, time) in enumerate(steps(kind, 8)):
            for condition in conditions:
                ask(model, latents, time, condition, kind)
            if index == 3:
                assert trajectories() == before + len(conditions)
        assert trajectories() == before
    stats = get_stats(model)
    assert stats.num_reused == len(conditions) * (7 if rules else 6)


def test_state_of_several_calls_a_step_is_freed_with_the_last_of_them() -> None:
    model, before = build("t2v"), trajectories()
    apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=8))
    (condition, _) = branches("t2v")
    tiles = [[*steps("t2v", 8, seed=seed)] for seed in (0, 30)]
    for _ in range(2):
        for step in zip(*tiles, strict=True):
            for latents, time in step:
                ask(model, latents, time, condition, "t2v")
        assert trajectories() == before
        assert len(get_stats(model).contexts) == 2


def test_a_branch_that_is_freed_has_decided_for_the_others() -> None:
    """cfg="shared" in the last step, too: it is reused in both branches or in none."""
    for threshold in (0.02, 0.05, 0.1, 0.2):
        model = build("t2v")
        rules = {"threshold": threshold, "retention_ratio": 0.0, "compute_last_step": False}
        apply_dicache(model, DiCacheConfig(**rules, num_inference_steps=9))
        run(model, "t2v", 9)
        first, second = masks_of(model).values()
        assert first == second


def test_reset_between_the_steps_of_experts_leaves_the_last_step_the_last() -> None:
    pipe, before = experts(), trajectories()
    apply_dicache(pipe, DiCacheConfig(**ALWAYS, num_inference_steps=6))
    conditions = branches("2.2")
    for index, (latents, time) in enumerate(steps("2.2", 6)):
        model = pipe.high_noise_model if index in (0, 1, 4, 5) else pipe.low_noise_model  # and back
        for condition in conditions:
            ask(model, latents, time, condition, "2.2")
        if index == 0:
            reset_dicache(pipe)
    assert all(each[-1] == "C" for each in masks_by_expert(pipe)["high_noise_model"])
    assert trajectories() == before


def test_an_experts_state_is_freed_when_the_other_one_takes_over() -> None:
    pipe, before, seen = experts(), trajectories(), []
    apply_dicache(pipe, DiCacheConfig(**ALWAYS, num_inference_steps=8))
    pipe.low_noise_model.head.register_forward_hook(lambda *_: seen.append(trajectories()))
    pipe.generate("2.2", 8)
    assert seen and max(seen) <= before + 2  # never the other expert's beside its own two
    assert trajectories() == before


def test_reset_frees_at_once() -> None:
    model, before = build("t2v"), trajectories()
    apply_dicache(model, DiCacheConfig(**ALWAYS, num_inference_steps=20))
    run(model, "t2v", 4)
    reset_dicache(model)
    assert trajectories() == before


@pytest.mark.parametrize("kind", KINDS)
def test_removal_leaves_no_trace(kind: str) -> None:
    model = build(kind)

    def attributes() -> list[dict[str, Any]]:
        return [dict(vars(module)) for module in model.modules()]

    before = attributes()
    apply_dicache(model, DiCacheConfig(schedule=MASK, num_inference_steps=8))
    run(model, kind)
    remove_dicache(model)
    assert [each.keys() for each in attributes()] == [each.keys() for each in before]
    assert same(run(model, kind), run(build(kind), kind))
    with pytest.warns(DiCacheWarning, match="There is no DiCache on this"):
        remove_dicache(model)


# --- what is said --------------------------------------------------------------------------------


def test_an_unknown_number_of_steps_is_told_and_computed() -> None:
    model = build("t2v")
    apply_dicache(model, DiCacheConfig())
    with pytest.warns(DiCacheWarning, match="Set DiCacheConfig\\(num_inference_steps") as caught:
        run(model, "t2v")
    assert len(caught) == 1
    assert set(masks_of(model).values()) == {"C" * 8}


def test_a_second_cache_is_refused() -> None:
    model = build("hunyuan")
    apply_dicache(model)
    with pytest.raises(
        ValueError, match="already been enabled on this HYVideoDiffusionTransformer"
    ):
        apply_dicache(SimpleNamespace(model=model))


def split_hunyuan(model: Any) -> None:
    for block in [*model.double_blocks, *model.single_blocks]:
        block.hybrid_seq_parallel_attn = object()


def split_wan(name: str) -> Callable[[Any], None]:
    def split(model: Any) -> None:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return type(self).forward(self, *args, **kwargs)

        forward.__name__ = name
        model.forward = forward.__get__(model)

    return split


SPLIT = {
    "hunyuan": split_hunyuan,
    "t2v": split_wan("usp_dit_forward"),
    "2.2": split_wan("sp_dit_forward"),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_a_sequence_that_is_split_over_unknown_ranks_is_refused(kind: str) -> None:
    """Before any rank waits for another: when applied, or in the first call of all ranks."""
    model = build(kind)
    SPLIT[kind](model)
    with pytest.raises(ValueError, match="split over several GPUs"):
        apply_dicache(model, DiCacheConfig(num_inference_steps=8))
    model = build(kind)
    apply_dicache(model, DiCacheConfig(num_inference_steps=8))
    SPLIT[kind](model)
    with pytest.raises(ValueError, match="split over several GPUs"):
        run(model, kind)
    remove_dicache(model)


def test_another_projects_class_of_the_same_name_is_not_taken_for_it() -> None:
    """ComfyUI has a `WanModel`, too."""
    kind = type("WanModel", (nn.Module,), {"__module__": "comfy.ldm.wan.model"})
    wanders = type("WanModel", (nn.Module,), {"__module__": "wander.model"})
    for each in (kind, wanders):
        with pytest.raises(ValueError, match="does not support WanModel"):
            apply_dicache(each())
    apply_dicache(wan_2_2(), DiCacheConfig(num_inference_steps=8))


@pytest.mark.rules_out("sparse", rows=ROWS)
@pytest.mark.parametrize("kind", ROWS)
def test_sparse_videogen_is_refused_on_original_models(kind: str) -> None:
    model = build(kind)
    with pytest.raises(ValueError, match=f"does not support {type(model).__name__}"):
        apply_sparse_videogen(model)
    with pytest.raises(ValueError, match="does not support WanT2V"):
        apply_sparse_videogen(WanT2V(model=build("t2v")))


@pytest.mark.backs("compile", rows=ROWS)
@pytest.mark.parametrize("kind", ROWS)
def test_compiled_blocks_give_what_eager_ones_do(kind: str) -> None:
    model, eager, counter = build(kind), build(kind), CompileCounterWithBackend("eager")
    for each in (model, eager):
        apply_dicache(each, DiCacheConfig(schedule=MASK, num_inference_steps=8))
    model.compile(backend=counter)
    assert same(run(model, kind, 3), run(eager, kind, 3))
    graphs = counter.frame_count
    assert same(run(model, kind), run(eager, kind))
    assert 0 < graphs == counter.frame_count, "no later step compiles anything"
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    torch._dynamo.reset()


WITHOUT_DIFFUSERS = """
import sys
sys.modules["diffusers"] = None  # importing it fails
sys.path.insert(0, {tests!r})
import torch
from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache, reset_dicache
from original_models import HunyuanVideoSampler, WanT2V, build
pipe = WanT2V(model=build("t2v"))
apply_dicache(pipe, DiCacheConfig(num_inference_steps=20, threshold=0.2))
pipe.generate("t2v", 20)
reset_dicache(pipe)
print(get_stats(pipe)["model"].num_reused > 0)
remove_dicache(pipe)
sampler = HunyuanVideoSampler(build("hunyuan"))
apply_dicache(sampler)
sampler.predict(8)
print(get_stats(sampler)["model"].num_computed > 0)
try:
    apply_dicache(torch.nn.Linear(2, 2))
except ValueError as error:
    print("needs diffusers 0.42 or newer" in str(error))
"""


def test_diffusers_is_not_needed() -> None:
    code = WITHOUT_DIFFUSERS.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"] * 3, done.stderr
