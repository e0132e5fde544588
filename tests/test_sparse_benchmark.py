"""benchmarks/sparse_video.py composes as it says, and gives a wrong result no time."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import caches
import findings
import models
import pytest
import report
import sparse_video
import torch
from pipelines import Bench
from stages import Outcome

from dicache import SparseVideoGenConfig
from dicache.sparse_videogen import attention

CPU = torch.device("cpu")


def tiny_bench() -> Bench:
    """The pipeline of the dry run."""
    return Bench(models.find_model(sparse_video.MODEL, dry=True), CPU, dry=True)


def test_the_full_size_is_that_of_the_goal() -> None:
    """33 x 45 x 80 = 118,800 tokens of video and 256 of text, 24 heads of 128, in bf16."""
    size = sparse_video.Attention(CPU, dry=False)
    assert size.grid == (33, 45, 80) and size.video == 118_800
    assert size.video + size.text == 119_056
    assert size.heads == (24, 128) and size.dtype == torch.bfloat16


# --- What is composed ----------------------------------------------------------------------------

STEP_MS = {
    ("dense", "C"): 30.0,
    ("sparse", "C"): 14.0,
    ("DiCache", "C"): 31.0,
    ("DiCache", "R"): 2.0,
    ("both", "C"): 15.0,
    ("both", "R"): 1.0,
}


def test_composed_runs_are_counts_times_steps() -> None:
    """By hand: 50 x 30; 5 x 30 + 45 x 14; 20 x 31 + 30 x 2; 5 x 31 + 15 x 15 + 30 x 1."""
    mask = sparse_video.schedule()
    composed = {run: findings.compose(run, mask, 5, STEP_MS) for run in findings.RUNS}
    assert composed == {"dense": 1500.0, "sparse": 780.0, "DiCache": 680.0, "both": 410.0}
    missing = {kind: ms for kind, ms in STEP_MS.items() if kind != ("DiCache", "C")}
    assert findings.compose("both", mask, 5, missing) is None  # its leading steps are dense


def test_a_step_is_dense_up_to_the_leading_ones_and_reused_by_the_mask() -> None:
    """Also where a leading step is reused; without a cache the mask says nothing."""
    kinds = findings.step_kinds
    assert kinds("both", "CCRRC", 3) == {
        ("DiCache", "C"): 2,
        ("DiCache", "R"): 1,
        ("both", "R"): 1,
        ("both", "C"): 1,
    }
    assert kinds("sparse", "CCRRC", 3) == {("dense", "C"): 3, ("sparse", "C"): 2}
    assert kinds("DiCache", "CCRRC", 3) == {("DiCache", "C"): 3, ("DiCache", "R"): 2}
    assert kinds("dense", "CCRRC", 3) == {("dense", "C"): 5}


def test_the_schedule_keeps_the_published_retention() -> None:
    """10 of 50 steps, then 30 are reused; Sparse VideoGen leaves 5 dense."""
    mask = sparse_video.schedule()
    assert len(mask) == 50 and mask.count("R") == 30 and mask.startswith("C" * 10)
    assert "R" in mask[10:12] and sparse_video.leading_steps(0.10) == 5


def test_a_whole_run_has_the_steps_that_it_is_composed_of(monkeypatch) -> None:
    """50 real steps of the tiny model with both: as many dense, sparse and reused ones."""
    monkeypatch.setattr(attention, "COMPILED", False)
    bench, mask = tiny_bench(), sparse_video.schedule()
    config = SparseVideoGenConfig(block_size=sparse_video.block_size(dry=True))
    cache = sparse_video.with_sparse(config, partial(caches.dicache_with, "auto"))
    run = bench.run(mask, cache)
    found: Counter[tuple[str, str]] = Counter()
    for step, (count, (blocks,)) in enumerate(
        zip(run.held["sparse_layers"], run.blocks, strict=True)
    ):
        assert blocks in (1, bench.num_blocks) and count in (0, bench.num_blocks - 1)
        is_sparse = count > 0 if blocks > 1 else step >= 5
        found["both" if is_sparse else "DiCache", "C" if blocks > 1 else "R"] += 1
    assert found == findings.step_kinds("both", mask, 5)


def test_fewer_blocks_where_the_time_is_short() -> None:
    """Eight computed steps of 20 s are 160 s, and a tenth to spare 176."""
    plan = sparse_video.plan_share
    assert [plan(left, 20.0) for left in (177.0, 175.0, 87.0)] == [1.0, 0.5, 0.25]
    assert plan(1.0, 20.0) == sparse_video.SHARES[-1]


# --- Goals ---------------------------------------------------------------------------------------


def timed(row: str, median_ms: float, **more: Any) -> dict[str, Any]:
    """A row of attention as its stage emits it."""
    times = {"fastest_ms": 1.0, "median_ms": median_ms, "samples": 5, "peak_bytes": 2**20}
    return {"kind": "attention", "row": row, **times, **more}


def planted(sparse_ms: float, both_ms: float) -> list[dict[str, Any]]:
    """Dense attention takes 100 ms; steps are those of `STEP_MS` but for `both`'s computed ones."""
    shape = {"video": [33, 45, 80], "text": 256, "shape": [1, 119056, 24, 128]}
    plan = {"title": "a model", "blocks": 60, "mask": "C" * 20 + "R" * 30, "density": 0.25}
    found = [
        {"kind": "tokens", **shape},
        timed("dense flash", 100.0, density=1.0, operator="flash"),
        timed("sparse: all", 20.0, density=0.2, kept=0.2),  # no goal is about this density,
        timed("flex_attention", 20.0, density=0.25, kept=0.25),  # or about a part
        timed("sparse: all", sparse_ms, density=0.25, kept=0.25),
        {"kind": "schedule", "leading": 5, **plan},
    ]
    step_ms = {**STEP_MS, ("both", "C"): both_ms}
    for run in findings.RUNS:
        row = {"kind": "steps", "run": run, "mask": "CC", "blocks": 60, "step_ms": [1.0]}
        times = {"computed_ms": step_ms[run, "C"], "reused_ms": step_ms.get((run, "R"))}
        found.append({**row, **times})
    return found


def found_of(results: list[dict[str, Any]], dry: bool = False) -> findings.Findings:
    return findings.Findings([Outcome("a stage", "passed", results=results)], dry)


def goals(results: list[dict[str, Any]], dry: bool = False) -> list[Any]:
    """Measured and status of both goals."""
    return [(g.measured, g.status) for g in found_of(results, dry).goals() if g.where == "720p"]


def test_goals_are_judged_by_their_numbers() -> None:
    """100 / 40 is 2.5, 100 / 41 less; 1500 / (155 + 15 x 15 + 30) is 3.66, with 19 it is 3.19."""
    assert goals(planted(40.0, 15.0)) == [(2.5, "met"), (pytest.approx(1500 / 410), "met")]
    missed = [(pytest.approx(100 / 41), "missed"), (pytest.approx(1500 / 470), "missed")]
    assert goals(planted(41.0, 19.0)) == missed


def test_what_was_not_measured_is_not_met() -> None:
    """On a CPU, without the dense row, without a kind of step, or with one of another depth."""
    unmeasured = (None, "not measured")
    results = planted(40.0, 15.0)
    assert goals(results, dry=True) == [unmeasured] * 2
    no_dense = [row for row in results if row.get("row") != "dense flash"]
    assert goals(no_dense)[0] == unmeasured
    no_dense = [row for row in results if row.get("run") != "dense"]
    assert goals(no_dense)[1] == unmeasured
    assert goals([]) == [unmeasured] * 2
    for row in results:  # steps of other models say nothing about a run of this one
        if row.get("run") == "dense":
            row["blocks"] = 30
    assert goals(results)[1] == unmeasured


def test_the_report_tells_what_a_figure_is_not() -> None:
    """A faster dense kernel than flash attention, and fewer blocks than the model has."""
    results = planted(41.0, 15.0)
    text = report.markdown(found_of(results), "a command")
    assert "| 2.439 | 2.50 | **missed** |" in text and "| 3.659 | 3.30 | met |" in text
    assert "119,056 tokens (33 x 45 x 80 of video, 256 of text)" in text
    assert "the fastest dense attention" not in text and "60 blocks" not in text
    results.append(timed("dense cuDNN", 60.0, density=1.0))
    for row in results:
        if row["kind"] == "steps":
            row["blocks"] = 30
    text = report.markdown(found_of(results), "a command")
    assert "dense cuDNN was the fastest dense attention here, 1.67x as fast as flash" in text
    assert "**30 of 60 blocks**" in text


# --- What fails ----------------------------------------------------------------------------------


def emitted(monkeypatch: Any, folder: Path, task: Any) -> list[Any]:
    """What a task at the tiny size emits."""
    monkeypatch.setattr(attention, "COMPILED", False)
    monkeypatch.setenv("STAGE_RESULTS", str(folder / "results.jsonl"))
    monkeypatch.setattr(sparse_video, "_MOST_SAMPLES", sparse_video._FEWEST_SAMPLES)
    task(CPU, True, [])
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def errors_of(found: list[Any]) -> dict[str, str]:
    return {row["case"]: row["error"] for row in found if row["kind"] == "error"}


def test_a_wrong_result_has_no_time(monkeypatch, tmp_path) -> None:
    """Heads in the other order than they were profiled for."""
    told = attention.temporal_heads
    monkeypatch.setattr(attention, "temporal_heads", lambda *given: 1 - told(*given))
    found = emitted(monkeypatch, tmp_path, sparse_video.attention)
    errors = errors_of(found)
    assert set(errors) == {"sparse 0.2", "sparse 0.25", "sparse 0.3"}
    assert "a row of sparse attention is off by" in errors["sparse 0.25"]
    rows = {row["row"] for row in found if row["kind"] == "attention"}
    assert rows - {"dense cuDNN"} == {"dense flash"}


def test_a_step_that_fell_back_to_full_attention_has_no_time(monkeypatch, tmp_path) -> None:
    """Its run is an error, and the dense ones have their rows."""
    monkeypatch.setattr(sparse_video, "with_sparse", lambda config, cache: cache)
    found = emitted(monkeypatch, tmp_path, sparse_video.steps)
    errors = errors_of(found)
    assert set(errors) == {"steps, both", "steps, sparse"}
    assert "step 0 should have 4 sparse layers, and had 0" in errors["steps, both"]
    assert {row["run"] for row in found if row["kind"] == "steps"} == {"dense", "DiCache"}


def test_dense_attention_is_flash_without_a_mask(monkeypatch) -> None:
    """Inside of the context only; diffusers' own call has the mask of the text."""
    bench, tokens = tiny_bench(), 5 * 8 * 8 + 8
    seen: list[tuple[bool, bool]] = []
    compute = torch.nn.functional.scaled_dot_product_attention

    def note(*args: Any, **kwargs: Any) -> Any:
        query = kwargs.get("query", args[0] if args else None)
        if query.shape[2] == tokens:  # not the text's own layers
            seen.append((kwargs["attn_mask"] is None, torch.backends.cuda.math_sdp_enabled()))
        return compute(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with sparse_video.flash_attention(bench.transformer):
        bench.run("C")
    assert seen == [(True, False)] * bench.num_blocks
    seen.clear()
    bench.run("C")
    assert seen == [(False, True)] * bench.num_blocks
