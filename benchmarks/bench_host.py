"""Host time of a skipped step above its probe block, against diffusers' FirstBlockCache.

    pytest benchmarks/bench_host.py --benchmark-only

A Flux of FLUX.1's depth (19 + 38 blocks) and tiny width on one thread: the tensors take next to no
time, so what is left is Python, hooks and dispatch. From each time that of the same model with its
first block alone is to be taken away. The three take turns, and the fastest call of each counts,
because other programs only ever add time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

from dicache import DiCacheConfig, apply_dicache, get_stats

_SKIPS = DiCacheConfig(threshold=math.inf, retention_ratio=0, compute_last_step=False)
_ROUNDS, _STEPS, _WARM_UP = 12, 60, 5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def make_model() -> Any:
    """FLUX.1's 57 blocks at width 8."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    ).eval()


def make_inputs() -> dict[str, Any]:
    """One call's arguments but for the timestep; the text embedding stays the same object."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 8, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }


def run(model: Any, inputs: dict[str, Any]) -> list[float]:
    """Seconds of every step of one run but for the first ones, which compute."""
    seconds = []
    for step in range(_STEPS):
        timestep = torch.tensor([1.0 - step / 200])
        start = time.perf_counter()
        with model.cache_context("cond"):
            model(timestep=timestep, **inputs)
        seconds.append(time.perf_counter() - start)
    return seconds[_WARM_UP:]


def test_host_time_of_a_skipped_step(benchmark: Any) -> None:
    probe_alone, first_block, dicache = make_model(), make_model(), make_model()
    probe_alone.transformer_blocks = probe_alone.transformer_blocks[:1]
    probe_alone.single_transformer_blocks = nn.ModuleList()
    first_block.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    apply_dicache(dicache, _SKIPS)
    models = {"probe alone": probe_alone, "FirstBlockCache": first_block, "dicache": dicache}
    inputs, fastest = make_inputs(), dict.fromkeys(models, math.inf)

    def take_turns() -> None:
        for name, model in models.items():
            fastest[name] = min(fastest[name], *run(model, inputs))

    benchmark.pedantic(take_turns, rounds=_ROUNDS)
    assert get_stats(dicache).num_reused == _STEPS - 1
    above = {name: fastest[name] - fastest["probe alone"] for name in models}
    benchmark.extra_info.update(
        {f"{name}, us above the probe": above[name] * 1e6 for name in models},
        ratio=above["dicache"] / above["FirstBlockCache"],
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
    )
    print({**benchmark.extra_info})
