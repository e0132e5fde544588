"""What the cache adds to a step, counted: waits, Python calls, operators. Times are benchmarks'."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny_models import build, calls
from tiny_pipelines import pipeline, run
from torch.utils._python_dispatch import TorchDispatchMode

import dicache
from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.adapters import schedule
from dicache.adapters.diffusers import locate
from dicache.core import session
from dicache.core.readback import Readback, as_number

NO_RULES: dict[str, Any] = {"retention_ratio": 0, "compute_last_step": False}
ALWAYS = DiCacheConfig(threshold=math.inf, **NO_RULES)
NEVER = DiCacheConfig(threshold=0.0, **NO_RULES)
# As deep as the real models: both caches add something to a step, and something to a block.
REAL_DEPTH = {
    "flux": {"num_layers": 19, "num_single_layers": 38},
    "hunyuan-video": {"num_layers": 20, "num_single_layers": 40},
}
PUBLISHED = DiCacheConfig.preset("flux", threshold=0.0, **NO_RULES)


@pytest.mark.parametrize("kind", ["flux", "wan", "flux-true-guidance", "qwen-image"])
def test_a_pipelines_step_waits_for_its_decision_and_nothing_else(kind, monkeypatch) -> None:
    waits, reads = [], []
    wait = Readback.wait

    def counted_wait(readback: Readback) -> Any:
        waits.append(readback)
        return wait(readback)

    def counted_read(timestep: Any) -> Any:
        reads.append(isinstance(timestep, torch.Tensor))
        return as_number(timestep)

    pipe = pipeline(kind)
    apply_dicache(pipe, DiCacheConfig(threshold=math.inf, retention_ratio=0.2))
    monkeypatch.setattr(Readback, "wait", counted_wait)
    for module in (locate, schedule, session):
        monkeypatch.setattr(module, "as_number", counted_read)
    for _ in range(2):
        waits.clear(), reads.clear()
        run(kind, pipe, num_steps=8)
        stats = get_stats(pipe)["transformer"]
        assert stats.num_reused == 6 * len(stats.contexts)
        # Where a run begins, its timesteps and the first value that the model is given are read.
        assert len(waits) == stats.num_reused + stats.num_resumed + 1
        # Some give every branch a tensor of its own, which is noticed once, and read beside it.
        assert reads.count(True) == (1 if kind in ("flux", "wan") else 3)


# What reads a tensor on the host, and on a GPU waits for it.
HOST_READS = [
    *((torch, name) for name in ("allclose", "equal", "is_nonzero", "nonzero", "unique")),
    (torch.Tensor, "__array__"),
    (torch.Tensor, "__bool__"),
    (torch.Tensor, "__complex__"),
    (torch.Tensor, "__contains__"),
    (torch.Tensor, "__float__"),
    (torch.Tensor, "__index__"),
    (torch.Tensor, "__int__"),
    (torch.Tensor, "__iter__"),
    (torch.Tensor, "allclose"),
    (torch.Tensor, "cpu"),
    (torch.Tensor, "equal"),
    (torch.Tensor, "is_nonzero"),
    (torch.Tensor, "item"),
    (torch.Tensor, "nonzero"),
    (torch.Tensor, "numpy"),
    (torch.Tensor, "to"),
    (torch.Tensor, "tolist"),
    (torch.Tensor, "type"),
    (torch.Tensor, "unique"),
]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("error", ["weighted_alignment", "delta_y"])
@pytest.mark.parametrize("kind", ["flux", "flux-true-guidance", "wan", "cogvideox"])
def test_nothing_in_the_package_reads_a_tensor_but_the_readback(
    kind: str, error: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by who asks: whatever the package does with a tensor on the host goes by one door."""
    package = str(Path(dicache.__file__).parent)
    door, elsewhere = [0], []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "to" and "cpu" not in map(str, (*args, *kwargs.values())):
                return original(tensor, *args, **kwargs)
            frame = sys._getframe(1)
            while "torch" in Path(frame.f_code.co_filename).parts and frame.f_back is not None:
                frame = frame.f_back  # of a method that calls another
            path = frame.f_code.co_filename
            if path.endswith("core/readback.py"):
                door[0] += 1
            elif path.startswith(package):
                elsewhere.append(f"{name} in {path}:{frame.f_lineno}")
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    alignment = "l1" if error == "delta_y" else "least_squares"
    rules = {"error": error, "alignment": alignment, "granularity": granularity}
    pipe = pipeline(kind)
    apply_dicache(pipe, DiCacheConfig(threshold=math.inf, retention_ratio=0.2, **rules))
    run(kind, pipe, num_steps=8)  # what is learned of a model is learned once
    for owner, name in HOST_READS:
        watch(owner, name)
    run(kind, pipe, num_steps=8)
    assert not elsewhere
    assert get_stats(pipe)["transformer"].num_reused > 0
    assert door[0] > 0  # the watch works


@pytest.mark.parametrize("config", [NEVER, PUBLISHED], ids=["default", "published"])
@pytest.mark.parametrize("family", REAL_DEPTH)
def test_a_computed_step_adds_less_than_first_block_cache(family: str, config: Any) -> None:
    plain, other, ours = (build(family, **REAL_DEPTH[family]) for _ in range(3))
    other.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    apply_dicache(ours, config)
    for count in (python_calls, dispatched):
        alone = count(family, plain)
        assert count(family, ours) - alone <= count(family, other) - alone
    assert get_stats(ours).num_reused == 0


@pytest.mark.parametrize("family", REAL_DEPTH)
def test_a_skipped_step_adds_less_than_half_of_first_block_caches_calls(family: str) -> None:
    probe_alone, other, ours = (build(family, **REAL_DEPTH[family]) for _ in range(3))
    probe_alone.transformer_blocks = probe_alone.transformer_blocks[:1]
    probe_alone.single_transformer_blocks = torch.nn.ModuleList()
    other.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    apply_dicache(ours, ALWAYS)
    alone = python_calls(family, probe_alone)
    assert python_calls(family, ours) - alone < (python_calls(family, other) - alone) / 2
    assert get_stats(ours).num_reused == 3


@pytest.mark.parametrize("family", REAL_DEPTH)
def test_blocks_behind_the_probes_list_cost_a_skipped_step_no_call(family: str) -> None:
    short, deep = (build(family, num_layers=2, num_single_layers=n) for n in (2, 40))
    for model in (short, deep):
        apply_dicache(model, ALWAYS)
    assert python_calls(family, short) == python_calls(family, deep)


@pytest.mark.parametrize("family", ["flux", "hunyuan-video", "wan"])
def test_a_skipped_step_dispatches_two_operators_beside_its_probe(family: str) -> None:
    model, probe_alone = build(family), build(family)
    apply_dicache(model, ALWAYS)
    for name, blocks in list(probe_alone.named_children()):
        if isinstance(blocks, torch.nn.ModuleList) and name.endswith("blocks"):
            probe_alone._modules[name] = blocks[: int(name in ("transformer_blocks", "blocks"))]
    added = operators_of_last_step(family, model)
    for operator in operators_of_last_step(family, probe_alone):
        added.remove(operator)
    launched = [name.split(".")[1] for name in added]
    for timestep in ("max", "_local_scalar_dense"):  # read on the host: there is no pipeline
        launched.remove(timestep)
    assert launched == ["alignment_statistics_out", "combine_residuals"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_on_a_gpu_no_call_of_the_transformer_synchronises(kind: str) -> None:
    pipe = pipeline(kind).to("cuda")
    apply_dicache(pipe, DiCacheConfig(threshold=math.inf, retention_ratio=0.2))
    run(kind, pipe, num_steps=8)  # compiles, loads, takes memory
    call = pipe.transformer._compiled_call_impl

    def guarded(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")  # schedulers wait on their own, the model must not
        try:
            return call(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipe.transformer._compiled_call_impl = guarded
    run(kind, pipe, num_steps=8)
    assert get_stats(pipe)["transformer"].num_reused > 0


def python_calls(family: str, model: Any) -> int:
    """Python and C functions called in the last of four steps."""
    seen = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    def measured(call: Callable[[], Any]) -> None:
        gc.collect()
        gc.disable()  # what it calls for models of other tests is none of this step's
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
            gc.enable()

    _last_of_four_steps(family, model, measured)
    return seen


def dispatched(family: str, model: Any) -> int:
    """Operators dispatched in the last of four steps, views left out."""
    return len(operators_of_last_step(family, model))


def operators_of_last_step(family: str, model: Any) -> list[str]:
    """Their names, in order."""
    counter = _Operators()

    def measured(call: Callable[[], Any]) -> None:
        with counter:
            call()

    _last_of_four_steps(family, model, measured)
    return counter.names


def _last_of_four_steps(
    family: str, model: Any, measured: Callable[[Callable[[], Any]], None]
) -> None:
    *warm_up, last = calls(family, 4)
    with torch.no_grad():
        for inputs in warm_up:
            with model.cache_context("cond"):
                model(**inputs)
        with model.cache_context("cond"):
            measured(lambda: model(**last))


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
