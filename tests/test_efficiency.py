"""benchmarks/pipelines.py counts what runs, and gives a cache that fails or disobeys no figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import caches
import models
import pipelines
import pytest
import torch
import workloads

CPU = torch.device("cpu")


def measured(monkeypatch: Any, folder: Path, cache: Any) -> list[dict[str, Any]]:
    """Findings of the tiny Flux where the second cache is replaced."""
    everything = {"dicache reference": caches.caches(CPU)["dicache reference"]}
    everything |= {"planted": cache, "FirstBlockCache": caches.first_block_cache}
    monkeypatch.setattr(pipelines, "caches", lambda device: dict(everything))
    monkeypatch.setenv("STAGE_RESULTS", str(folder / "results.jsonl"))
    pipelines.compare(CPU, True, ["flux"])
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_failing_cache_does_not_lose_the_others(tmp_path, monkeypatch) -> None:
    """It is an error in the report, and its neighbours have their rows."""

    @contextmanager
    def fails(pipe: Any, mask: str) -> Iterator[Any]:
        raise RuntimeError("out of order")
        yield

    found = measured(monkeypatch, tmp_path, fails)
    rows = [row["implementation"] for row in found if row["kind"] == "pipeline"]
    assert rows == ["dicache reference", "ideal", "un-cached, again", "FirstBlockCache"]
    (error,) = (row for row in found if row["kind"] == "error")
    assert error["case"] == "flux: planted" and "out of order" in error["error"]


def test_a_cache_that_ignores_the_mask_gets_no_row(tmp_path, monkeypatch) -> None:
    """One that computes every step is reported as such, not as slow."""
    found = measured(monkeypatch, tmp_path, lambda pipe, mask: caches.uncached(pipe, mask))
    assert "planted" not in {row.get("implementation") for row in found}
    (error,) = (row for row in found if row["kind"] == "error")
    assert error["case"] == "flux: planted"
    assert "step 2 should be skipped, and ran" in error["error"]


def test_a_run_that_leaves_its_mask_says_where() -> None:
    """Blocks are counted below the caches."""
    bench = pipelines.Bench(models.find_model("flux", dry=True), CPU, dry=True)
    run = bench.run("CCRC", caches.ideal)
    assert run.blocks == [[5], [5], [1], [5]] and bench.deviation(run) is None
    plain = bench.run("CCC")
    told = pipelines.Run("CRC", plain.step_ms, 1.0, plain.blocks, None, {})
    assert bench.deviation(told) == "step 1 should be skipped, and ran 5 of 5 blocks"
    told = pipelines.Run("CCCC", run.step_ms, 1.0, run.blocks, None, {})
    assert bench.deviation(told) == "step 2 should compute, and ran 1 of 5 blocks"


def test_medians_leave_the_warm_up_out() -> None:
    run = pipelines.Run("CCCRRCR", [90.0, 80.0, 5.0, 1.0, 2.0, 7.0, 9.0], 1.0, [], None, {})
    assert (run.median_ms("C"), run.median_ms("R")) == (6.0, 2.0)
    assert run.median_ms("C", warm_up=0) == 43.5
    assert pipelines.Run("CC", [1.0, 2.0], 1.0, [], None, {}).median_ms("R") is None


@pytest.mark.parametrize(("steps", "skipped"), [(50, 30), (30, 18), (10, 6)])
def test_masks_skip_the_share_they_say(steps: int, skipped: int) -> None:
    """Three in five; the first tenth, two at least, and the last step are computed."""
    mask = pipelines.make_mask(steps)
    assert len(mask) == steps and mask.count("R") == skipped
    assert mask.startswith("C" * max(2, steps // 10)) and mask.endswith("C")


def test_plans_keep_to_the_time() -> None:
    """Fewer steps before fewer blocks: by hand, full steps of 1 s and ideal ones of 0.1 s.

    50 steps: 2 x 50 + 5 x (20 + 3) = 215 s, and a tenth to spare: 236.5; 30: 129 and 141.9.
    """
    assert pipelines.plan(50, 237.0, 1.0, 0.1, 5) == (1.0, 50)
    assert pipelines.plan(50, 236.0, 1.0, 0.1, 5) == (1.0, 30)
    assert pipelines.plan(10, 237.0, 1.0, 0.1, 5) == (1.0, 10)
    # 10 steps: 2 x 10 + 5 x (4 + 0.6) = 43 and 47.3. Of half the blocks a step takes 0.55 s:
    # 20 steps 22 + 5 x (8 x 0.55 + 1.2) = 50 and 55, 15 steps 16.5 + 5 x (3.3 + 0.9) = 37.5.
    assert pipelines.plan(50, 47.4, 1.0, 0.1, 5) == (1.0, 10)
    assert pipelines.plan(50, 47.2, 1.0, 0.1, 5) == (0.5, 15)
    assert pipelines.plan(50, 0.0, 1.0, 0.1, 5) == (1 / 16, 10)


@pytest.mark.parametrize("name", ["flux", "wan", "hunyuan-video", "hunyuan-video-720p"])
def test_the_full_models_have_the_sizes_of_the_operators(name: str) -> None:
    """The tokens that enter block 0 are those that the operator benchmarks work on; no memory."""
    model, meta = models.find_model(name, dry=False), torch.device("meta")
    transformer = models.build_transformer(model, meta, torch.bfloat16)
    seen: list[torch.Size] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape)

    block, _ = caches.family_of(transformer).blocks(transformer)[0]
    block.register_forward_pre_hook(note, with_kwargs=True)
    if name == "hunyuan-video-720p":  # 33 x 45 x 80
        shape, text = (1, 118_800, 3072), 256
    else:
        shape, text = workloads.SIZES[name].shape, workloads.SIZES[name].text_tokens
    assert model.text[0] == text
    with caches.shortened(transformer, 0), torch.no_grad():
        transformer(**_meta_inputs(model, shape[1]))
    assert seen == [torch.Size(shape)]


def _meta_inputs(model: Any, tokens: int) -> dict[str, Any]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = {
        "hidden_states": empty(*model.latents),
        "encoder_hidden_states": empty(1, *model.text),
        "timestep": empty(1),
    }
    if "pooled_projection_dim" in model.config:
        inputs |= {"pooled_projections": empty(1, 768), "guidance": empty(1)}
    if model.name == "flux":
        inputs |= {"img_ids": empty(tokens, 3), "txt_ids": empty(model.text[0], 3)}
    if model.name.startswith("hunyuan-video"):
        inputs |= {"encoder_attention_mask": empty(1, model.text[0])}
    return inputs
