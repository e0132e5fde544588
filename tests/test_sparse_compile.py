"""torch.compile and Sparse VideoGen: two graphs where a dense model has one, for all layers.

Graphs are counted by a backend that compiles nothing. Compiled code sees neither the step nor the
layer, nor a prompt's length, nor the resolution beyond what the dense model sees of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_sparse_videogen import SPARSE, changed, video
from tiny_models import build
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dicache import DiCacheConfig, apply_dicache, apply_sparse_videogen, get_stats
from dicache.sparse_videogen import attention

FAMILIES = ("hunyuan-video", "wan")
DEEP: dict[str, dict[str, int]] = {
    "hunyuan-video": {"num_layers": 5, "num_single_layers": 6},
    "wan": {"num_layers": 12},
}
CACHE = DiCacheConfig(schedule="CCCCR", num_inference_steps=5)  # two sparse steps first


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "COMPILED", False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def sequence(family: str, runs: int) -> Iterator[list[dict[str, Any]]]:
    """Runs from dense to sparse steps: two prompts of other lengths, then other resolutions."""
    yield video(family, lengths=(5, 4))
    yield video(family, lengths=(2, 3), seed=3)
    for size in (6, 8)[: runs - 2]:
        yield video(family, lengths=(5, 4), size=size)


def run_all(model: Any, family: str, counter: Any, runs: int = 2) -> tuple[list[int], list[Tensor]]:
    """Graphs after each run, and all outputs."""
    graphs, outputs = [], []
    for run in sequence(family, runs):
        outputs += [model(**inputs)[0] for inputs in run]
        graphs.append(counter.frame_count if counter is not None else 0)
    return graphs, outputs


def eager_outputs(family: str, runs: int = 2, cached: bool = False) -> list[Tensor]:
    model = build(family)
    apply_sparse_videogen(model, SPARSE)
    if cached:
        apply_dicache(model, CACHE)
    return run_all(model, family, None, runs)[1]


def counted(
    family: str, put_on: str, runs: int = 2, backend: str = "eager", **overrides: int
) -> tuple[list[int], list[Tensor], nn.Module]:
    """A model whose blocks are compiled, with what `put_on` names applied before or after."""
    torch._dynamo.reset()
    model, counter = build(family, **overrides), CompileCounterWithBackend(backend)
    for step in put_on.split():
        if step == "sparse":
            apply_sparse_videogen(model, SPARSE)
        elif step == "cache":
            apply_dicache(model, CACHE)
        else:
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
    graphs, outputs = run_all(model, family, counter, runs)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    return graphs, outputs, model


@pytest.mark.parametrize(
    ("family", "backend", "order", "runs"),
    [
        ("hunyuan-video", "eager", "sparse compile", 3),
        ("wan", "eager", "compile sparse", 4),
        ("wan", "aot_eager", "sparse compile", 2),
    ],
)
def test_at_most_two_graphs_for_each_of_the_dense_model(family, backend, order, runs):
    plain, _, _ = counted(family, "compile", runs, backend)
    graphs, outputs, _ = counted(family, order, runs, backend)
    assert all(ours <= 2 * dense for ours, dense in zip(graphs, plain, strict=True))
    assert graphs[1] == graphs[0]  # a prompt of another length
    if runs == 4:  # a third resolution
        assert graphs[3] - graphs[2] == plain[3] - plain[2]
    for output, expected in zip(outputs, eager_outputs(family, runs), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_layers_share_the_graphs_of_few(family):
    few, _, _ = counted(family, "sparse compile")
    many, _, _ = counted(family, "sparse compile", **DEEP[family])
    assert many == few


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_cache_in_both_orders(family):
    wanted = eager_outputs(family, cached=True)
    graphs = set()
    for order in ("sparse cache compile", "compile cache sparse"):
        counts, outputs, model = counted(family, order)
        graphs.add(tuple(counts))
        (records,) = get_stats(model).contexts.values()
        assert "".join(each.action[0] for each in records) == "ccccr"
        for output, expected in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("family", "how", "order"),
    [
        ("hunyuan-video", "torch.compile", "before"),
        ("wan", "model.compile", "before"),
        ("wan", "torch.compile", "after"),
    ],
)
def test_the_whole_transformer_compiled(family, how, order):
    """Twice the graphs of the dense model again: one for dense steps, one for sparse ones."""
    wanted, counts = eager_outputs(family), []
    for sparse in (False, True):
        torch._dynamo.reset()
        model, counter = build(family), CompileCounterWithBackend("eager")
        called: Any = model
        if sparse and order == "before":
            apply_sparse_videogen(model, SPARSE)
        if how == "model.compile":
            model.compile(backend=counter, fullgraph=True)
        else:
            called = torch.compile(model, backend=counter, fullgraph=True)
        if sparse and order == "after":
            apply_sparse_videogen(model, SPARSE)
        graphs, outputs = run_all(called, family, counter)
        counts.append(graphs)
    assert all(ours <= 2 * dense for ours, dense in zip(counts[1], counts[0], strict=True))
    for output, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_part_of_the_batch_is_full_attention_in_compiled_code_too():
    model = build("wan")
    apply_sparse_videogen(model, changed(dense_steps=0.0))
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    block, plain = model.blocks[2], build("wan").blocks[2]
    pairs: list[tuple[Tensor, Tensor]] = []

    usual: Any = model.blocks[1]._compiled_call_impl

    def also_call_one(*args: Any) -> Any:
        """Outside of what is compiled: a hook of the block might be traced."""
        one = [each[:1] if each.shape[0] == 2 else each for each in args[:3]]
        pairs.append((torch.compile(block.forward, backend="eager")(*one, *args[3:]), one))
        pairs[-1] = (pairs[-1][0], plain(*one, *args[3:]))
        return usual(*args)

    model.blocks[1]._compiled_call_impl = also_call_one
    with pytest.warns(UserWarning, match="a part of the batch"):
        model(**video("wan", 1)[0])
    ((given, wanted),) = pairs
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


def test_inductor():
    """The compiled blocks have the sparse kernel of the CPU in them."""
    family = "wan"
    if not attention._has_compiler():
        pytest.skip("there is no C++ compiler")
    eager, model = build(family), build(family)
    for each in (eager, model):
        apply_sparse_videogen(each, changed(dense_layers=0))
    model.compile_repeated_blocks(fullgraph=True)
    for inputs in video(family):
        torch.testing.assert_close(model(**inputs)[0], eager(**inputs)[0], rtol=1e-4, atol=1e-4)
