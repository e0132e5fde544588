"""torch.compile and the cache leave each other alone: same graphs, no breaks, same pictures.

Graphs are counted by a backend that compiles nothing, against the un-cached model in the same
calls.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES as EVERY_FAMILY
from tiny_models import blocks, build, calls, run_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dicache import DiCacheConfig, DiCacheWarning, apply_dicache, get_stats, remove_dicache

FAMILIES = ("flux", "hunyuan-video", "wan")
# Their blocks have code that dynamo cannot follow, cache or not.
BREAKS_BY_ITSELF = ("mochi", "hidream")
SCHEDULE = "CCRCRR"
LETTERS = {"compute": "C", "resume": "C", "reuse": "R"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def config() -> DiCacheConfig:
    return DiCacheConfig(schedule=SCHEDULE, num_inference_steps=len(SCHEDULE))


def sequence(family: str) -> list[dict[str, Any]]:
    """Two runs of different length, then two other resolutions: what a session of a user is."""
    runs = [calls(family, len(SCHEDULE)), calls(family, 4)]
    runs += [calls(family, len(SCHEDULE), size=size) for size in (6, 8)]
    return [inputs for run in runs for inputs in run]


def graphs_of(family: str, order: str, backend: str) -> tuple[int, list[Tensor]]:
    """Number of graphs, and outputs; without graph breaks."""
    torch._dynamo.reset()
    model, counter = build(family), CompileCounterWithBackend(backend)
    if order == "before":
        apply_dicache(model, config())
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    if order == "after":
        apply_dicache(model, config())
    outputs = [model(**inputs)[0] for inputs in sequence(family)]
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    return counter.frame_count, outputs


@pytest.mark.parametrize(
    ("family", "backend"), [*((family, "eager") for family in FAMILIES), ("wan", "aot_eager")]
)
def test_repeated_blocks_compile_to_the_graphs_of_the_model_without_cache(
    family: str, backend: str
) -> None:
    plain, _ = graphs_of(family, "never", backend)
    eager = build(family)
    apply_dicache(eager, config())
    expected = [eager(**inputs)[0] for inputs in sequence(family)]
    for order in ("before", "after"):
        graphs, outputs = graphs_of(family, order, backend)
        assert graphs == plain
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(output, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_inductor(family: str) -> None:
    """Threshold 0 gives the bits of the compiled model; a schedule, eager's to fp32 rounding."""

    def outputs(config: DiCacheConfig | None, compiles: bool) -> list[Tensor]:
        model = build(family)
        if config is not None:
            apply_dicache(model, config)
        if compiles:
            model.compile_repeated_blocks(fullgraph=True)
        return [model(**inputs)[0] for inputs in calls(family, len(SCHEDULE))]

    never = DiCacheConfig(threshold=0.0, num_inference_steps=len(SCHEDULE))
    for output, wanted in zip(outputs(never, True), outputs(None, True), strict=True):
        assert torch.equal(output, wanted)
    for output, wanted in zip(outputs(config(), True), outputs(config(), False), strict=True):
        assert (output - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_the_cache_keeps_lies_in_a_blocks_output(family: str) -> None:
    """CUDA graphs write over a block's output at their next replay: here NaN does."""
    model, untouched, handed_out = build(family), build(family), []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        handed_out.extend(output if isinstance(output, tuple) else [output])

    for cached in (model, untouched):
        apply_dicache(cached, config())
    for block in blocks(family, model):
        block.register_forward_hook(remember)
    for inputs in calls(family, len(SCHEDULE)):
        output, wanted = model(**inputs)[0].clone(), untouched(**inputs)[0]
        for tensor in handed_out:
            tensor.fill_(float("nan"))
        handed_out.clear()
        assert torch.equal(output, wanted)
    assert actions(model) == SCHEDULE


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs(family: str, mode: str) -> None:
    model, eager = build(family).cuda(), build(family).cuda()
    for cached in (model, eager):
        apply_dicache(cached, config())
    model.compile_repeated_blocks(fullgraph=True, mode=mode)
    for inputs in calls(family, len(SCHEDULE)):
        moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        torch.compiler.cudagraph_mark_step_begin()
        output, wanted = model(**moved)[0].clone(), eager(**moved)[0]
        assert (output - wanted).norm() <= 1e-3 * wanted.norm()
    assert actions(model) == SCHEDULE


@pytest.mark.backs("compile")
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_compile_of_the_transformer_compiles_its_blocks(family: str) -> None:
    model, eager, counter = build(family), build(family), CompileCounterWithBackend("eager")
    for each in (model, eager):
        apply_dicache(each, config())
    model.compile(backend=counter)
    graphs = []
    for inputs in calls(family, len(SCHEDULE)):
        assert torch.equal(run_model(model, inputs), run_model(eager, inputs))
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[-1]  # the first step's; no later one compiles anything
    assert actions(model) == SCHEDULE
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    assert (breaks == 0) == (family not in BREAKS_BY_ITSELF)
    if breaks:
        assert (breaks, graphs[-1]) == of_compiled_blocks(family)


def of_compiled_blocks(family: str) -> tuple[int, int]:
    """Graph breaks and graphs of the model without cache whose blocks are compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, counter = build(family), CompileCounterWithBackend("eager")
    for block in blocks(family, model):
        block.compile(backend=counter)
    run_model(model, calls(family, 1)[0])
    return sum(torch._dynamo.utils.counters["graph_break"].values()), counter.frame_count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compile_of_the_transformer_compiles_its_blocks(
    family: str, order: str, fullgraph: bool
) -> None:
    model, eager, counter = build(family), build(family), CompileCounterWithBackend("eager")
    apply_dicache(eager, config())
    expected = [eager(**inputs)[0] for inputs in sequence(family)]
    if order == "before":
        apply_dicache(model, config())
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    if order == "after":
        apply_dicache(model, config())
    outputs, graphs = [], []
    for inputs in sequence(family):
        outputs.append(compiled(**inputs)[0])
        graphs.append(counter.frame_count)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    # One graph a kind of block and of its inputs; the second run and the third size add none.
    first_run, second_size = len(SCHEDULE), 2 * len(SCHEDULE) + 4
    assert 0 < graphs[0] <= 3 and graphs[0] == graphs[first_run + 3]
    assert graphs[second_size - 1] == graphs[-1]


def test_blocks_are_compiled_only_where_a_compiled_transformer_calls_them() -> None:
    model, counter = build("flux"), CompileCounterWithBackend("eager")
    apply_dicache(model, config())
    compiled = torch.compile(model, backend=counter)
    first, second, *others = calls("flux", len(SCHEDULE))
    model(**first)
    assert counter.frame_count == 0
    compiled(**second)
    graphs = counter.frame_count
    assert graphs > 0
    torch._dynamo.reset()  # what was compiled is gone: compiling again would count
    for inputs in others:
        model(**inputs)
    assert counter.frame_count == graphs and actions(model) == SCHEDULE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_compiled_before_is_compiled_by_its_blocks_and_put_back(family: str) -> None:
    model, eager, counter = build(family), build(family), CompileCounterWithBackend("eager")
    model.compile(backend=counter, fullgraph=True)
    whole = model._compiled_call_impl
    for each in (model, eager):
        apply_dicache(each, config())
    outputs, graphs = [], []
    for inputs in sequence(family):
        outputs.append(model(**inputs)[0])
        graphs.append(counter.frame_count)
    expected = [eager(**inputs)[0] for inputs in sequence(family)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    # As compile_repeated_blocks: one graph a kind of block, and again for the second size.
    assert 0 < graphs[0] <= 3 and graphs[0] == graphs[len(SCHEDULE) + 3]
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    remove_dicache(model)
    assert model._compiled_call_impl is whole
    assert all(block._compiled_call_impl is None for block in blocks(family, model))


def test_a_model_compiled_by_something_unknown_is_taken_apart_with_a_warning() -> None:
    model = build("flux")
    model._compiled_call_impl = compiled = functools.partial(model._call_impl)
    with pytest.warns(DiCacheWarning, match="compile_repeated_blocks") as caught:
        apply_dicache(model, config())
    assert caught[0].filename == __file__
    for inputs in calls("flux", len(SCHEDULE)):
        model(**inputs)
    assert actions(model) == SCHEDULE
    remove_dicache(model)
    assert model._compiled_call_impl is compiled


@pytest.mark.parametrize("compiles", ["never", "before", "after"])
def test_removal_gives_every_call_back(compiles: str) -> None:
    model = build("flux")
    if compiles == "before":
        model.compile_repeated_blocks(backend="eager")
    before = [module._compiled_call_impl for module in model.modules()]
    apply_dicache(model, config())
    if compiles == "after":
        model.compile_repeated_blocks(backend="eager")
        before = None
    remove_dicache(model)
    after = [module._compiled_call_impl for module in model.modules()]
    if before is not None:
        assert after == before
    else:  # compiled under the cache, and still compiled
        assert all(block._compiled_call_impl is not None for block in blocks("flux", model))
    assert "compile" not in vars(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**calls("flux", 1)[0])


def test_a_skipped_block_does_not_wake_what_hangs_on_it() -> None:
    """Offloading brings a block's weights in by hooks on it; a skipped block needs none."""
    model, woken = build("flux"), []
    apply_dicache(model, config())
    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, index=index: woken.append(index))
    for inputs in calls("flux", 3):  # C, C, R
        model(**inputs)
    everyone = list(range(len(model.transformer_blocks)))
    assert woken == [*everyone, *everyone, 0]  # the reused step ran its probe alone


def test_a_copy_of_a_block_is_a_plain_block() -> None:
    model = build("flux")
    apply_dicache(model, config())
    copied: nn.Module = copy.deepcopy(model.transformer_blocks[1])
    assert copied._compiled_call_impl is None


def actions(model: Any) -> str:
    (records,) = get_stats(model).contexts.values()
    return "".join(LETTERS[record.action] for record in records)
