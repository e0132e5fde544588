"""The cache on the real classes of the original repositories, tiny and on the CPU.

For those who have clones of HunyuanVideo, Wan2.1 and Wan2.2 in one folder: beside this checkout, or
where DICACHE_ORIGINALS says. Elsewhere these tests are skipped. The classes are loaded alone,
without the packages around them; where their code needs a GPU (flash attention, one
`device="cuda"`), it gets something else here. HunyuanVideo's needs einops.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mask
from torch import Tensor, nn

from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache

ORIGINALS = Path(os.environ.get("DICACHE_ORIGINALS", Path(__file__).parents[2]))
NUM_STEPS = 8


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of a repository as if the packages around it were empty."""

    def load_module(repository: str, name: str) -> Any:
        root = ORIGINALS / repository
        if not (root / name.partition(".")[0]).is_dir():
            pytest.skip(f"no clone of {repository} in the folder of originals")
        if repository == "HunyuanVideo":
            pytest.importorskip("einops")
        *packages, _ = name.split(".")
        for depth in range(1, len(packages) + 1):
            package = types.ModuleType(".".join(packages[:depth]))
            package.__path__ = [str(root.joinpath(*packages[:depth]))]
            monkeypatch.setitem(sys.modules, package.__name__, package)
        return importlib.import_module(name)

    known = set(sys.modules)
    yield load_module
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("wan", "hyvideo"):
            del sys.modules[name]


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def wan_model(load: Any, repository: str, model_type: str, **options: Any) -> nn.Module:
    module = load(repository, "wan.modules.model")
    attention = importlib.import_module("wan.modules.attention").attention
    module.flash_attention = lambda q, k, v, **_: attention(q, k, v, dtype=torch.float32)
    if model_type == "vace":
        module = load(repository, "wan.modules.vace_model")
        model = module.VaceWanModel(
            vace_layers=[0, 2], vace_in_dim=4, in_dim=4, model_type="vace", **TINY_WAN, **options
        )
    else:
        in_dim = 8 if model_type in ("i2v", "flf2v") else 4
        model = module.WanModel(model_type=model_type, in_dim=in_dim, **TINY_WAN, **options)
    return randomised(model)


TINY_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "text_len": 8,
    "dim": 24,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": 12,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 4,
}


def wan_calls(model_type: str, repository: str) -> list[list[tuple[tuple[Any, ...], Any]]]:
    """Of every step the calls of both branches, with the padding of a longer sequence."""
    generator = torch.Generator().manual_seed(1)
    noise, picture = torch.randn(2, 4, 2, 8, 8, generator=generator)
    texts = [[torch.randn(n, 12, generator=generator)] for n in (5, 3)]
    shared: dict[str, Any] = {"seq_len": 40}
    if model_type in ("i2v", "flf2v"):
        shared["y"] = [torch.randn(4, 2, 8, 8, generator=generator)]
        if repository == "Wan2.1":
            pictures = 2 if model_type == "flf2v" else 1
            shared["clip_fea"] = torch.randn(pictures, 257, 1280, generator=generator)
    if model_type == "vace":
        shared["vace_context"] = [torch.randn(4, 2, 8, 8, generator=generator)]
    steps = []
    for share in torch.linspace(0, 1, NUM_STEPS + 1)[:-1].tolist():
        x = [(1 - share) * noise + share * picture + 0.3 * torch.sin(4 * share + picture)]
        given = {"t": torch.tensor([1000 * (1 - share)]), **shared}
        steps.append([((x,), {**given, "context": text}) for text in texts])
    return steps


def answers_of(model: nn.Module, steps: list[list[tuple[tuple[Any, ...], Any]]]) -> list[Tensor]:
    with torch.no_grad():
        found = [model(*args, **given) for step in steps for args, given in step]
    return [each["x"] if isinstance(each, dict) else torch.stack(list(each)) for each in found]


def check(model: nn.Module, steps: list[list[tuple[tuple[Any, ...], Any]]]) -> None:
    """Bits without reuse, schedules as told, and nothing left behind."""
    plain = answers_of(model, steps)
    apply_dicache(
        model, DiCacheConfig(threshold=0, retention_ratio=0, num_inference_steps=NUM_STEPS)
    )
    assert all(torch.equal(*pair) for pair in zip(answers_of(model, steps), plain, strict=True))
    remove_dicache(model)
    rules = {"threshold": math.inf, "retention_ratio": 0.25, "num_inference_steps": NUM_STEPS}
    apply_dicache(model, DiCacheConfig(**rules))
    reused = answers_of(model, steps)
    found = {mask(records) for records in get_stats(model).contexts.values()}
    assert found == {"CCRRRRRC"} and len(get_stats(model).contexts) == len(steps[0])
    assert all(torch.isfinite(each).all() for each in reused)
    assert not any(torch.equal(a, b) for a, b in zip(reused[5:7], plain[5:7], strict=True))
    remove_dicache(model)
    assert all(torch.equal(*pair) for pair in zip(answers_of(model, steps), plain, strict=True))


@pytest.mark.parametrize("model_type", ["t2v", "i2v", "flf2v", "vace"])
def test_wan_2_1(load: Any, model_type: str) -> None:
    check(wan_model(load, "Wan2.1", model_type), wan_calls(model_type, "Wan2.1"))


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_wan_2_2(load: Any, model_type: str) -> None:
    check(wan_model(load, "Wan2.2", model_type), wan_calls(model_type, "Wan2.2"))


def test_hunyuan_video(load: Any) -> None:
    module = load("HunyuanVideo", "hyvideo.modules.models")
    attention = module.attention

    def lengths(text_mask: Tensor, image_length: int) -> Tensor:
        longest = text_mask.shape[1] + image_length
        ends = [
            [k * longest + int(n) + image_length, (k + 1) * longest]
            for k, n in enumerate(text_mask.sum(1))
        ]
        return torch.tensor([0, *sum(ends, [])], dtype=torch.int32)

    module.get_cu_seqlens = lengths
    module.attention = lambda q, k, v, **_: attention(q, k, v, mode="vanilla")
    model = module.HYVideoDiffusionTransformer(
        Namespace(text_states_dim=12, text_states_dim_2=10),
        hidden_size=24,
        heads_num=2,
        mm_double_blocks_depth=2,
        mm_single_blocks_depth=2,
        rope_dim_list=[4, 4, 4],
    )
    generator = torch.Generator().manual_seed(1)
    noise, picture = torch.randn(2, 1, 4, 2, 8, 8, generator=generator)
    angles = torch.randn(32, 12, generator=generator)
    shared = {
        "text_states": torch.randn(1, 5, 12, generator=generator),
        "text_mask": torch.ones(1, 5, dtype=torch.long),
        "text_states_2": torch.randn(1, 10, generator=generator),
        "freqs_cos": angles.cos(),
        "freqs_sin": angles.sin(),
        "return_dict": True,
    }
    steps = []
    for share in torch.linspace(0, 1, NUM_STEPS + 1)[:-1].tolist():
        x = (1 - share) * noise + share * picture + 0.3 * torch.sin(4 * share + picture)
        steps.append([((x, torch.tensor([1000 * (1 - share)])), shared)])
    check(randomised(model), steps)
