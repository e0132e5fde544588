"""Sparse VideoGen on diffusers models: which calls are sparse, and that it comes and goes cleanly.

Models are tiny and their videos have five frames of latents. flex_attention runs uncompiled, which
is the same mask in plain arithmetic.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from helpers import sparse_part
from tiny_models import FAMILIES as EVERY_FAMILY
from tiny_models import TEXT_TOKENS, blocks, build, calls
from tiny_pipelines import pipeline, run
from torch import Tensor, nn

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    SparseVideoGenConfig,
    apply_dicache,
    apply_sparse_videogen,
    get_stats,
    remove_dicache,
    remove_sparse_videogen,
)
from dicache.adapters.diffusers.site import find_site
from dicache.sparse_videogen import attention, hooks

pytestmark = pytest.mark.usefixtures("plain_flex_attention")

FAMILIES = ("hunyuan-video", "wan")
ATTENTION = {"hunyuan-video": "attn", "wan": "attn1"}
STEPS = 5
SPARSE = SparseVideoGenConfig(
    density=0.7, dense_steps=0.4, block_size=16, num_inference_steps=STEPS
)
CACHE = DiCacheConfig(schedule="CCRCR", num_inference_steps=STEPS)


def changed(**fields: Any) -> SparseVideoGenConfig:
    return replace(SPARSE, **fields)


def video(
    family: str, num_steps: int = STEPS, *, frames: int = 5, lengths: Any = None, **options: Any
) -> list[dict[str, Any]]:
    """The calls of a run with so many frames, and prompts of these lengths."""
    steps = calls(family, num_steps, **options)
    generator = torch.Generator().manual_seed(9)
    for inputs in steps:
        x = inputs["hidden_states"][:, :, :1]
        shape = (*x.shape[:2], frames, *x.shape[3:])
        inputs["hidden_states"] = x + 0.5 * torch.randn(shape, generator=generator)
        if lengths is not None and "encoder_attention_mask" in inputs:
            ends = torch.tensor(lengths)[:, None]
            inputs["encoder_attention_mask"] = (torch.arange(TEXT_TOKENS) < ends).float()
    if lengths is not None and "encoder_attention_mask" in steps[0]:
        for inputs in steps[1:]:  # one tensor, as pipelines give it
            inputs["encoder_attention_mask"] = steps[0]["encoder_attention_mask"]
    return steps


def outputs(model: nn.Module, steps: list[dict[str, Any]]) -> list[Tensor]:
    return [model(**inputs)[0] for inputs in steps]


def sparse_calls(model: nn.Module, family: str, steps: list[dict[str, Any]]) -> list[str]:
    """For every call a letter a block: S where its attention is sparse, else D."""
    letters: list[str] = []
    handles = [
        getattr(block, ATTENTION[family]).register_forward_pre_hook(
            lambda module, _: letters.append("D" if module.processor.plan is None else "S")
        )
        for block in blocks(family, model)
    ]
    outputs(model, steps)
    for handle in handles:
        handle.remove()
    return ["".join(letters[i : i + len(handles)]) for i in range(0, len(letters), len(handles))]


def traces(model: nn.Module) -> dict[str, Any]:
    """All that applying could leave behind."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = {
            "attributes": sorted(vars(module)),
            "hooks": [len(module._forward_hooks), len(module._forward_pre_hooks)],
            "with_kwargs": len(module._forward_pre_hooks_with_kwargs),
            "processor": getattr(module, "processor", None),
            "compiled": module._compiled_call_impl,
        }
    return found


def scrambled(family: str) -> nn.Module:
    """A model whose norms are not all ones, as they begin, so that each has to be the right one."""
    model, generator = build(family), torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def phase(model: nn.Module) -> Any:
    """What was said of the attention of the call that runs, or of the last one."""
    site = find_site(model)
    return None if site is None else site.noted("sparse_videogen")


@pytest.mark.parametrize("family", FAMILIES)
def test_density_one_is_full_attention(family):
    model, plain = scrambled(family), scrambled(family)
    apply_sparse_videogen(model, changed(density=1.0, dense_steps=0.0, dense_layers=0))
    steps = video(family, lengths=(5, 3))
    assert set(sparse_calls(model, family, steps)) == {"SSSS"}
    for output, wanted in zip(outputs(model, steps), outputs(plain, steps), strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


def test_fused_projections_of_wan():
    model, plain = build("wan"), build("wan")
    model.fuse_qkv_projections()
    for block in model.blocks:
        del block.attn1.to_q, block.attn1.to_k, block.attn1.to_v  # or they might be what runs
    apply_sparse_videogen(model, changed(density=1.0, dense_steps=0.0))
    steps = video("wan")
    for output, wanted in zip(outputs(model, steps), outputs(plain, steps), strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_a_whole_model_falls_as_the_density_rises(family):
    wanted = torch.stack(outputs(build(family), video(family)))
    errors = []
    for density in (0.2, 0.5, 0.8, 1.0):
        model = build(family)
        apply_sparse_videogen(model, changed(density=density, dense_steps=0.0, dense_layers=0))
        errors.append((torch.stack(outputs(model, video(family))) - wanted).square().mean())
    assert errors[0] > errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_leading_steps_and_layers_are_dense_bit_by_bit(family):
    """floor(0.4 * 5 + 1/2) = 2 steps, and the first block always."""
    model, plain = build(family), build(family)
    apply_sparse_videogen(model, SPARSE)
    steps = video(family)
    assert sparse_calls(model, family, steps) == ["DDDD", "DDDD", "DSSS", "DSSS", "DSSS"]
    same = [
        torch.equal(a, b) for a, b in zip(outputs(model, steps), outputs(plain, steps), strict=True)
    ]
    assert same == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("family", "density", "dense_steps"), [("hunyuan-video", 0.25, 0.10), ("wan", 0.30, 0.20)]
)
def test_defaults_are_the_familys(family, density, dense_steps):
    model = build(family)
    apply_sparse_videogen(model)
    config = sparse_part(model).config
    assert (config.density, config.dense_steps) == (density, dense_steps)
    assert (config.dense_layers, config.profiling_rows, config.block_size) == (1, 64, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_run_is_that_of_a_fresh_model(family):
    model, fresh = build(family), build(family)
    apply_sparse_videogen(model, SPARSE)
    apply_sparse_videogen(fresh, SPARSE)
    outputs(model, video(family, lengths=(4, 5)))
    outputs(model, video(family, size=6)[:3])  # aborted
    second = video(family, lengths=(3, 2), seed=5)
    for output, wanted in zip(outputs(model, second), outputs(fresh, second), strict=True):
        assert torch.equal(output, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_count_their_own_steps_and_have_their_own_prompts(family):
    """Two branches in turn give what two models with a branch each give."""
    model, alone = build(family), [build(family), build(family)]
    for each in (model, *alone):
        apply_sparse_videogen(each, SPARSE)
    branches = [video(family, lengths=(5, 4)), video(family, lengths=(2, 3), seed=1)]
    for pair in zip(*branches, strict=True):
        for name, inputs, single in zip(("cond", "uncond"), pair, alone, strict=True):
            with model.cache_context(name):
                output = model(**inputs)[0]
            assert torch.equal(output, single(**inputs)[0])


def test_prompts_of_several_lengths_in_one_batch():
    """Every sample is computed as if it were alone."""
    model, alone = build("hunyuan-video"), build("hunyuan-video")
    for each in (model, alone):
        apply_sparse_videogen(each, changed(dense_steps=0.0))
    (inputs, *_) = video("hunyuan-video", lengths=(2, 5))
    output = model(**inputs)[0]
    for sample in range(2):
        one = {
            name: value[sample : sample + 1] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        with alone.cache_context(f"sample {sample}"):
            wanted = alone(**one)[0]
        torch.testing.assert_close(output[sample : sample + 1], wanted, rtol=1e-5, atol=1e-5)


def test_padding_of_the_text_does_not_reach_the_video():
    model = build("hunyuan-video")
    apply_sparse_videogen(model, changed(dense_steps=0.0))
    (inputs, *_) = video("hunyuan-video", lengths=(2, 4))
    output = model(**inputs)[0]
    text = inputs["encoder_hidden_states"].clone()
    text[0, 2:], text[1, 4:] = 7.0, -7.0
    torch.testing.assert_close(
        model(**{**inputs, "encoder_hidden_states": text})[0], output, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_global_random_state_stays(family):
    model = build(family)
    apply_sparse_videogen(model, SPARSE)
    before = torch.random.get_rng_state()
    outputs(model, video(family))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_number_of_steps_is_dense_with_one_warning(family):
    model, plain = build(family), build(family)
    apply_sparse_videogen(model, changed(num_inference_steps=None))
    with pytest.warns(DiCacheWarning) as caught:
        given = outputs(model, video(family))
    (message,) = [str(each.message) for each in caught if each.category is DiCacheWarning]
    assert "num_inference_steps" in message and "apply_sparse_videogen(pipe)" in message
    wanted = outputs(plain, video(family))
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_without_dense_steps_their_number_need_not_be_known():
    model = build("wan")
    apply_sparse_videogen(model, changed(num_inference_steps=None, dense_steps=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        assert sparse_calls(model, "wan", video("wan", 2)) == ["DSSS", "DSSS"]


@pytest.mark.parametrize(("family", "frames"), [("hunyuan-video", 1), ("wan", 1), ("wan", 2)])
def test_what_has_no_time_to_look_along_stays_dense(family, frames):
    """A picture; and of Wan's two frames one is the sink."""
    model = build(family)
    apply_sparse_videogen(model, changed(dense_steps=0.0))
    assert sparse_calls(model, family, video(family, 2, frames=frames)) == ["DDDD", "DDDD"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_band_narrower_than_a_frame_is_told_once(family):
    told = []
    for density in (0.05, 0.7):
        model = build(family)
        apply_sparse_videogen(model, changed(dense_steps=0.0, density=density))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs(model, video(family, 3))
        told.append([str(each.message) for each in caught if "frames of" in str(each.message)])
    assert [len(each) for each in told] == [1, 0]
    assert "density is 0.05 and the video has 5 frames of" in told[0][0]


def test_gradients_are_recorded_through_full_attention():
    model = build("wan").requires_grad_(True)
    apply_sparse_videogen(model, changed(dense_steps=0.0))
    with torch.enable_grad(), pytest.warns(DiCacheWarning, match="no_grad"):
        model(**video("wan", 1)[0])[0].sum().backward()
    assert model.blocks[1].attn1.to_q.weight.grad.abs().sum() > 0


def test_a_sequence_that_is_split_over_devices_is_dense_with_a_warning():
    model = build("wan")
    apply_sparse_videogen(model, changed(dense_steps=0.0))
    part = sparse_part(model)
    call = part._read({"hidden_states": torch.zeros(1, 4, 5, 8, 8)})
    assert part._is_sparse(0, call)
    for block in model.blocks:  # as enable_parallelism does
        block.attn1.processor._parallel_config = object()
    with pytest.warns(DiCacheWarning, match="split over several devices"):
        assert not part._is_sparse(0, call)


def test_a_sequence_that_is_split_already_is_refused():
    model = build("wan")
    model._parallel_config = object()  # as enable_parallelism does
    with pytest.raises(ValueError, match=r"split over several devices \(enable_parallelism\)"):
        apply_sparse_videogen(model)


def test_small_blocks_are_refused_anywhere_but_on_the_cpu():
    model = build("wan")
    apply_sparse_videogen(model, SPARSE)
    part = sparse_part(model)
    call = part._read({"hidden_states": torch.zeros(1, 4, 5, 8, 8, device="meta")})
    with pytest.raises(ValueError, match="block_size is 16 on meta. Expected a multiple of 128"):
        part._plan(call)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_the_batch_is_computed_in_full_with_one_warning(family):
    """The cache with granularity="sample" runs blocks for some samples only."""
    model, plain = build(family), build(family)
    apply_sparse_videogen(model, changed(dense_steps=0.0))
    (block,) = [blocks(family, each)[2] for each in (model,)]
    whole = block.forward

    def one_by_one(hidden_states: Tensor, *args: Any) -> Any:
        parts = [
            whole(hidden_states[row : row + 1], *(_row(each, row) for each in args))
            for row in range(2)
        ]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    seen: list[Any] = []
    block.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    block.forward = one_by_one
    with pytest.warns(DiCacheWarning, match="a part of the batch") as caught:
        outputs(model, video(family, 2))
    assert len([each for each in caught if each.category is DiCacheWarning]) == 1
    for args, output in seen:
        wanted = blocks(family, plain)[2](*args)
        first = output if isinstance(output, Tensor) else output[0]
        torch.testing.assert_close(first, wanted if isinstance(wanted, Tensor) else wanted[0])


def _row(value: Any, row: int) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) and value.shape[0] == 2 else value


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_that_runs_some_samples_goes_on(family):
    """With a schedule a sample, blocks that run for a part of the batch do so in full."""
    model = build(family)
    rules = DiCacheConfig(
        threshold=0.05, granularity="sample", num_inference_steps=8, retention_ratio=0.0
    )
    apply_dicache(model, rules)
    apply_sparse_videogen(model, changed(dense_steps=0.0, num_inference_steps=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(output.isfinite().all() for output in outputs(model, video(family, 8)))


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_leaves_no_trace(family):
    model, plain = build(family), build(family)
    before = traces(model)
    apply_sparse_videogen(model, SPARSE)
    assert traces(model) != before
    outputs(model, video(family))
    assert phase(model) == "sparse"
    remove_sparse_videogen(model)
    assert traces(model) == before
    steps = video(family)
    for output, wanted in zip(outputs(model, steps), outputs(plain, steps), strict=True):
        assert torch.equal(output, wanted)


@pytest.mark.backs("sparse")
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_cache_in_every_order(family):
    """Both give one result whichever came first, and each may go first."""
    put_on: dict[str, Callable[[nn.Module], None]] = {
        "cache": lambda model: apply_dicache(model, CACHE),
        "sparse": lambda model: apply_sparse_videogen(model, SPARSE),
    }
    take_off = {"cache": remove_dicache, "sparse": remove_sparse_videogen}
    steps, results = video(family), []
    alone = {}
    for name in put_on:
        model = build(family)
        put_on[name](model)
        alone[name] = outputs(model, steps)
    for first, second in permutations(put_on):
        for goes, stays in permutations(put_on):
            model = build(family)
            before = traces(model)
            put_on[first](model)
            put_on[second](model)
            results.append(outputs(model, steps))
            records = next(iter(get_stats(model).contexts.values()))
            # The third step is the first sparse one: its trajectory begins anew.
            assert [each.action for each in records] == [*["compute"] * 4, "reuse"]
            take_off[goes](model)
            for output, wanted in zip(outputs(model, steps), alone[stays], strict=True):
                assert torch.equal(output, wanted)
            take_off[stays](model)
            assert traces(model) == before
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    assert not torch.equal(results[0][-2], alone["cache"][-2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_gate_sees_the_same_signal_with_and_without_sparsity(family, depth):
    """The probe's blocks stay dense, however deep the cache's probe is."""
    probes = []
    for sparse in (False, True):
        model = build(family, **({"num_layers": 4} if family == "wan" else {}))
        apply_dicache(model, replace(CACHE, schedule=None, threshold=0.0, probe_depth=depth))
        if sparse:
            apply_sparse_videogen(model, changed(dense_steps=0.0, dense_layers=0))
        seen: list[Tensor] = []
        last = blocks(family, model)[depth - 1]
        last.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2][0] if type(call[2]) is tuple else call[2])
        )
        outputs(model, video(family))
        probes.append(seen)
    assert len(probes[0]) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(*probes, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_the_cache_computes_are_those_of_sparse_attention_alone(family):
    """Resumed behind the probe, after reused steps: rows and heads are those of step and layer."""
    steps = video(family, 10)
    rules = changed(dense_steps=0.2, num_inference_steps=10)
    alone, both = build(family), build(family)
    for model in (alone, both):
        apply_sparse_videogen(model, rules)
    apply_dicache(both, DiCacheConfig(schedule="CCRRRRRCRC", num_inference_steps=10))
    expected, found = outputs(alone, steps), outputs(both, steps)
    records = next(iter(get_stats(both).contexts.values()))
    reused = [each.step for each in records if each.action == "reuse"]
    assert reused == [4, 5, 6, 8]  # 2 and 3 are the first sparse ones
    for index, (output, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(output, wanted) == (index not in reused)
    resumed = build(family)
    apply_sparse_videogen(resumed, rules)
    apply_dicache(resumed, replace(CACHE, schedule=None, threshold=0.0, num_inference_steps=10))
    assert all(torch.equal(a, b) for a, b in zip(outputs(resumed, steps), expected, strict=True))
    assert get_stats(resumed).num_resumed == 10 - 1 - 1 - 2  # first, last, and the change


@pytest.mark.parametrize("family", FAMILIES)
def test_the_phase_is_announced_before_the_blocks_run(family):
    model, seen = build(family), []
    apply_sparse_videogen(model, SPARSE)
    block = blocks(family, model)[0]
    block.register_forward_pre_hook(lambda *_: seen.append(phase(model)))
    outputs(model, video(family))
    assert seen == ["dense", "dense", "sparse", "sparse", "sparse"]


def test_applying_twice_is_refused_and_removing_nothing_warns():
    model = build("wan")
    apply_sparse_videogen(model, SPARSE)
    with pytest.raises(ValueError, match="has Sparse VideoGen already.*remove_sparse_videogen"):
        apply_sparse_videogen(pipeline("wan", transformer=model))
    remove_sparse_videogen(model)
    with pytest.warns(DiCacheWarning, match="no Sparse VideoGen on this WanTransformer3DModel"):
        remove_sparse_videogen(model)


@pytest.mark.rules_out("sparse")
@pytest.mark.parametrize("family", sorted(EVERY_FAMILY.keys() - {*FAMILIES, "hunyuan-video-i2v"}))
def test_any_other_family_is_refused(family):
    model = build(family)
    before = traces(model)
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*HunyuanVideoTransformer3DModel"):
        apply_sparse_videogen(model)
    assert traces(model) == before


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = build("wan")
    before = traces(model)
    with pytest.raises(TypeError, match="DiCacheConfig. Expected a SparseVideoGenConfig"):
        apply_sparse_videogen(model, DiCacheConfig())
    with pytest.raises(ValueError, match="dense_layers is 4 and .* has 4 blocks"):
        apply_sparse_videogen(model, changed(dense_layers=4))
    assert traces(model) == before

    class Other:
        def __call__(self, *_: Any) -> None: ...

    model.blocks[2].attn1.set_processor(Other())
    before = traces(model)
    with pytest.raises(ValueError, match="processor Other. Expected WanAttnProcessor"):
        apply_sparse_videogen(model, SPARSE)
    assert traces(model) == before


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("density", 0, "above 0 and up to 1"),
        ("density", 1.5, "above 0 and up to 1"),
        ("density", True, "above 0"),
        ("density", float("nan"), "above 0"),
        ("dense_steps", -0.1, "from 0 to 1"),
        ("dense_steps", "0.1", "from 0 to 1"),
        ("dense_layers", -1, "integer >= 0"),
        ("dense_layers", 1.0, "integer >= 0"),
        ("profiling_rows", 0, "integer >= 1"),
        ("block_size", 8, "multiple of 16"),
        ("block_size", 100, "multiple of 16"),
        ("num_inference_steps", 0, "integer >= 1"),
    ],
)
def test_bad_configurations_are_refused(field, value, expected):
    with pytest.raises(ValueError, match=f"{field} is .*Expected .*{expected}"):
        SparseVideoGenConfig(**{field: value})


def test_a_copy_is_refused_until_it_is_removed():
    model = build("wan")
    apply_sparse_videogen(model, SPARSE)
    for copies in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="remove_sparse_videogen"):
            copies(model)
    remove_sparse_videogen(model)
    copy.deepcopy(model)


def test_the_attention_backend_of_the_model_is_set_where_attention_is_full():
    model = build("wan")
    apply_sparse_videogen(model, SPARSE)
    model.set_attention_backend("_native_math")
    remove_sparse_videogen(model)
    assert {str(b.attn1.processor._attention_backend.value) for b in model.blocks} == {
        "_native_math"
    }


PIPELINES = {"wan": ("cond", "uncond"), "hunyuan-video": ("cond",)}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_from_end_to_end(name):
    """It tells the number of steps; its end frees what a run held, and the next run is the same."""
    pipe, plain = pipeline(name), pipeline(name)
    options = {"num_frames": 17, "height": 32, "width": 32}
    apply_sparse_videogen(pipe, changed(num_inference_steps=None))
    phases: list[str | None] = []
    first = blocks(name, pipe.transformer)[0]
    first.register_forward_pre_hook(lambda *_: phases.append(phase(pipe.transformer)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        latents = run(name, pipe, STEPS, **options)
    branches = len(PIPELINES[name])
    assert phases == ["dense"] * 2 * branches + ["sparse"] * 3 * branches
    wanted = run(name, plain, STEPS, **options)
    assert not torch.equal(latents, wanted)
    assert (latents - wanted).norm() < 0.5 * wanted.norm()
    part = sparse_part(pipe.transformer)
    assert part._plans == [] and all(each.plan is None for each in part.processors)
    assert torch.equal(run(name, pipe, STEPS, **options), latents)
    remove_sparse_videogen(pipe)
    assert torch.equal(run(name, pipe, STEPS, **options), wanted)


def test_the_second_expert_of_wan_2_2_goes_on_where_the_first_one_stopped():
    """Of ten steps the first two are dense, wherever the first expert stops."""
    options = {"num_frames": 17, "height": 32, "width": 32}
    pipe = pipeline("wan", transformer_2=build("wan", seed=1), boundary_ratio=0.5)
    apply_sparse_videogen(pipe, changed(num_inference_steps=None, dense_steps=0.2))
    phases: dict[str, list[str | None]] = {"transformer": [], "transformer_2": []}
    for name, seen in phases.items():
        expert = getattr(pipe, name)
        expert.blocks[0].register_forward_pre_hook(
            lambda *_, expert=expert, seen=seen: seen.append(phase(expert))
        )
    run("wan", pipe, 10, **options)
    assert set(phases["transformer_2"]) == {"sparse"}
    assert phases["transformer"][:5] == [*["dense"] * 4, "sparse"]


def test_a_call_that_raised_leaves_nothing_behind():
    model, fresh = build("wan"), build("wan")
    for each in (model, fresh):
        apply_sparse_videogen(each, SPARSE)
    steps = video("wan")
    outputs(model, steps[:4])
    with pytest.raises(RuntimeError):
        model(**{**steps[4], "encoder_hidden_states": torch.zeros(2, 5, 3)})
    part = sparse_part(model)
    assert part._plans == [] and all(each.plan is None for each in part.processors)
    for inputs in [steps[4], *steps[:4]]:  # step 4 is now the first one of a run
        assert torch.equal(model(**inputs)[0], fresh(**inputs)[0])
    with pytest.raises(TypeError, match="hidden_states"):
        model(timestep=steps[0]["timestep"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_after_an_abort_begins_with_its_dense_steps(error):
    model, steps = build("wan"), video("wan", 4)
    apply_sparse_videogen(model, changed(dense_steps=0.5, num_inference_steps=4))

    def stop(*_: Any) -> None:
        raise error

    for _ in range(2):
        handle = blocks("wan", model)[1].register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(**steps[0])
        handle.remove()
    letters = sparse_calls(model, "wan", steps)
    assert ["S" in each for each in letters] == [False, False, True, True]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_profiled_in_every_nth_computed_sparse_step(family, cached, monkeypatch):
    profiled: list[int] = []
    original = attention.temporal_heads

    def counted(q: Tensor, *others: Any) -> Tensor:
        profiled.append(step)
        return original(q, *others)

    monkeypatch.setattr(attention, "temporal_heads", counted)
    model, steps = build(family), video(family, 10)
    rules = changed(dense_steps=0.2, num_inference_steps=10, keep_heads=3)
    apply_sparse_videogen(model, rules)
    if cached:
        apply_dicache(model, DiCacheConfig(schedule="CCCCRRCCCC", num_inference_steps=10))
    for _ in range(2):  # a second run profiles anew
        profiled.clear()
        for step, inputs in enumerate(steps):  # noqa: B007 (`counted` reads it)
            model(**inputs)
        # Steps 0 and 1 are dense; those that the cache reuses do not count.
        assert sorted(set(profiled)) == ([2, 7] if cached else [2, 5, 8])
        layers = len(blocks(family, model)) - 1
        assert all(profiled.count(each) == layers for each in profiled)


def test_kept_heads_are_a_contexts_own():
    model, steps = build("wan"), video("wan", 4)
    apply_sparse_videogen(model, changed(dense_steps=0.0, num_inference_steps=4, keep_heads=4))
    other = [{**each, "hidden_states": -each["hidden_states"]} for each in steps]
    together: dict[str, list[Tensor]] = {"a": [], "b": []}
    for pair in zip(steps, other, strict=True):
        for name, inputs in zip(together, pair, strict=True):
            with model.cache_context(name):
                together[name].append(model(**inputs)[0])
    for name, calls_alone in (("a", steps), ("b", other)):
        fresh = build("wan")
        apply_sparse_videogen(fresh, changed(dense_steps=0.0, num_inference_steps=4, keep_heads=4))
        alone = outputs(fresh, calls_alone)
        assert all(torch.equal(a, b) for a, b in zip(alone, together[name], strict=True))


def test_a_mask_that_is_changed_in_place_is_read_again():
    model, fresh = build("hunyuan-video"), build("hunyuan-video")
    steps = video("hunyuan-video", lengths=(5, 4))
    for each in (model, fresh):
        apply_sparse_videogen(each, changed(dense_steps=0.0))
    before = outputs(model, steps)
    mask = steps[0]["encoder_attention_mask"]
    mask[:, 2:] = 0
    after = outputs(model, steps)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(after, outputs(fresh, steps), strict=True))


def test_inference_mode_is_no_other_mode():
    model = build("hunyuan-video")
    apply_sparse_videogen(model, SPARSE)
    wanted = outputs(model, video("hunyuan-video", lengths=(4, 5)))
    with torch.inference_mode():
        given = outputs(model, video("hunyuan-video", lengths=(4, 5)))
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_a_plan_is_made_once_a_run_and_prompt():
    pipe, made = pipeline("hunyuan-video"), []
    make = attention.Plan.make

    def count(*args: Any) -> Any:
        made.append(args)
        return make(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.Plan, "make", staticmethod(count))
        apply_sparse_videogen(pipe, changed(num_inference_steps=None))
        run("hunyuan-video", pipe, STEPS, num_frames=17, height=32, width=32)
    assert len(made) == 1


def test_it_survives_what_offloading_does_to_forward():
    """accelerate puts another `forward` on the model, and takes it off and on between calls."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    woken: list[None] = []

    class Offload(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            woken.append(None)
            return args, kwargs

    model, plain = build("wan"), build("wan")
    for each in (model, plain):
        apply_sparse_videogen(each, SPARSE)
    add_hook_to_module(model, Offload())
    steps = video("wan")
    for inputs in steps:
        assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
        remove_hook_from_module(model)
        add_hook_to_module(model, Offload())
    assert phase(model) == "sparse"
    remove_sparse_videogen(model)
    wanted = build("wan")
    assert torch.equal(model(**steps[-1])[0], wanted(**steps[-1])[0])
    assert len(woken) == len(steps) + 1  # the removal left offloading on


def test_importing_the_package_imports_neither_diffusers_nor_triton():
    code = (
        "import sys, dicache; from dicache import apply_sparse_videogen, SparseVideoGenConfig; "
        "SparseVideoGenConfig(); assert not {'diffusers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
