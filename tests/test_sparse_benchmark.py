"""benchmarks/sparse.py keeps working without a GPU, composes as it says, and hides no failure."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dicache.sparse_videogen import attention, processors

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
DENSITIES = {0.2, 0.25, 0.3}
SPARSE_CASES = {
    "sparse: all",
    "flex_attention",
    "flex_attention, layout",
    "plan, once a run",
}
LAYOUT_CASES = {
    f"permute {what}: {body}" for what in ("q, k, v", "back") for body in ("operator", "reference")
}


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """sparse.py and its modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import efficiency_runs
        import sparse_models
        import sparse_report
        import sparse_tasks
        import stages

        # Not as `sparse`: libraries take that name in sys.modules for the package.
        spec = importlib.util.spec_from_file_location("sparse_program", BENCHMARKS / "sparse.py")
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        yield SimpleNamespace(
            program=program,
            models=sparse_models,
            report=sparse_report,
            runs=efficiency_runs,
            tasks=sparse_tasks,
            stages=stages,
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run of the whole program at a tiny size, as a user starts it."""
    out = tmp_path_factory.mktemp("sparse")
    command = [sys.executable, str(BENCHMARKS / "sparse.py"), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "sparse.json").read_text()), out


# --- The program ---------------------------------------------------------------------------------


def test_every_part_of_attention_has_a_row(dry_run) -> None:
    """Dense flash, layout by operator and reference, profiling, and four rows a density."""
    found, _ = dry_run
    cases = {(row["case"], row.get("density")) for row in found["attention"]}
    parts = {(case, None) for case in (*LAYOUT_CASES, "profiling")}
    wanted = {(case, density) for case in SPARSE_CASES for density in DENSITIES}
    assert cases - {("dense cuDNN", 1.0)} == {("dense flash", 1.0)} | parts | wanted
    (dense,) = (row for row in found["attention"] if row["case"] == "dense flash")
    assert "flash_attention" in dense["operator"]
    for row in found["attention"]:
        assert row["over_dense"] == pytest.approx(dense["median_ms"] / row["median_ms"])
        assert 0 < row["fastest_ms"] <= row["median_ms"]
        if row["case"] in SPARSE_CASES:
            assert 0 < row["density"] - row["kept"] < 0.01 and row["kept_blocks"] >= row["kept"]
            assert row["ideal"] == pytest.approx(1 / row["kept"])


def test_every_block_is_dense_and_sparse_eager_and_compiled(dry_run) -> None:
    """And once as diffusers runs it, with the text's mask."""
    found, _ = dry_run
    rows = {(r["block"], r["mode"], r["attention"]): r for r in found["blocks"]}
    blocks = ("double block", "single block")
    assert set(rows) == {
        (block, mode, kind)
        for block in blocks
        for mode in ("eager", "compiled")
        for kind in ("dense", "sparse")
    } | {(block, "eager", "dense, masked") for block in blocks}
    for (block, mode, kind), row in rows.items():
        assert row["density"] == (0.25 if kind == "sparse" else 1.0)
        dense = rows[block, mode, "dense"]["median_ms"]
        assert row["over_dense"] == pytest.approx(dense / row["median_ms"])


def test_short_runs_do_what_they_are_told(dry_run) -> None:
    """Two steps of each kind at least; all blocks but the first one sparse, in computed steps."""
    found, _ = dry_run
    rows = {row["run"]: row for row in found["steps"]}
    layers = {name: row["sparse_layers"] for name, row in rows.items()}
    assert layers == {
        "dense": [0, 0],
        "sparse": [4, 4],
        "DiCache": [0] * 5,
        "both": [4, 4, 0, 0, 0],
    }
    assert {name: row["mask"] for name, row in rows.items() if "R" in row["mask"]} == {
        "DiCache": "CCRRR",
        "both": "CCRRR",
    }
    assert {row["reused_steps"] for row in rows.values() if "reused_steps" in row} == {3}
    both = rows["both"]
    assert both["computed_ms"] == pytest.approx(sum(both["step_ms"][:2]) / 2)
    assert both["reused_ms"] == sorted(both["step_ms"][2:])[1]


def test_dry_run_says_what_it_ran_on_and_meets_no_goal(dry_run) -> None:
    """A time on a CPU is not what the goals are about; only cuDNN's attention may be missing."""
    found, out = dry_run
    assert [goal["status"] for goal in found["goals"]] == ["not measured"] * 2
    assert found["errors"] == []
    assert {row["case"] for row in found["left_out"]} <= {"dense cuDNN"}
    for row in (*found["attention"], *found["blocks"], *found["steps"]):
        assert row["device"] and {"torch", "diffusers", "triton"} <= set(row["versions"])
    text = (out / "sparse.md").read_text()
    assert text.startswith("# Dry run on a CPU") and "composed, not run" in text
    assert all(goal["goal"] in text for goal in found["goals"])
    assert {stage["status"] for stage in found["stages"]} == {"passed"}
    assert (out / "sparse.log").stat().st_size > 0


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, scripts, monkeypatch, capsys) -> None:
    """An error, not an empty report."""
    monkeypatch.setattr(scripts.stages, "has_gpu", lambda: False)
    with pytest.raises(SystemExit) as error:
        scripts.program.main(["--out", str(tmp_path)])
    assert error.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


def test_on_a_gpu_every_stage_is_a_process_and_all_fit_into_nine_minutes(scripts) -> None:
    """What later stages need is kept for them, even if the first one takes all of its time."""
    stages = scripts.program.plan("cuda", {})
    assert [stage.name for stage in stages] == ["environment", "attention", "stack", "blocks"]
    assert [stage.command[2:-2] for stage in stages[1:]] == [["attention"], ["stack"], ["blocks"]]
    environment, first, *rest = stages
    assert scripts.program.BUDGET_SECONDS < 540
    reserved = sum(stage.reserve_s for stage in rest)
    assert environment.limit_s + first.limit_s + reserved < scripts.program.BUDGET_SECONDS


def test_the_full_size_is_that_of_the_goal(scripts) -> None:
    """33 x 45 x 80 = 118,800 tokens of video and 256 of text, 24 heads of 128, in bf16."""
    size = scripts.models.FULL
    assert size.grid == (33, 45, 80) and size.video == 118_800
    assert size.video + size.text == 119_056
    assert size.heads == (24, 128) and size.dtype == torch.bfloat16
    config = size.model.config
    assert (config["num_layers"], config["num_single_layers"]) == (20, 40)


# --- What is composed ----------------------------------------------------------------------------

STEP_MS = {
    ("dense", "C"): 30.0,
    ("sparse", "C"): 14.0,
    ("DiCache", "C"): 31.0,
    ("DiCache", "R"): 2.0,
    ("both", "C"): 15.0,
    ("both", "R"): 1.0,
}


def test_composed_runs_are_counts_times_steps(scripts) -> None:
    """By hand: 50 x 30; 5 x 30 + 45 x 14; 20 x 31 + 30 x 2; 5 x 31 + 15 x 15 + 30 x 1."""
    mask = scripts.tasks.schedule()
    composed = {run: scripts.report.compose(run, mask, 5, STEP_MS) for run in scripts.report.RUNS}
    assert composed == {"dense": 1500.0, "sparse": 780.0, "DiCache": 680.0, "both": 410.0}
    missing = {kind: ms for kind, ms in STEP_MS.items() if kind != ("DiCache", "C")}
    assert scripts.report.compose("both", mask, 5, missing) is None  # its leading steps are dense


def test_a_step_is_dense_up_to_the_leading_ones_and_reused_by_the_mask(scripts) -> None:
    """Also where a leading step is reused; without a cache the mask says nothing."""
    kinds = scripts.report.step_kinds
    assert kinds("both", "CCRRC", 3) == {
        ("DiCache", "C"): 2,
        ("DiCache", "R"): 1,
        ("both", "R"): 1,
        ("both", "C"): 1,
    }
    assert kinds("sparse", "CCRRC", 3) == {("dense", "C"): 3, ("sparse", "C"): 2}
    assert kinds("DiCache", "CCRRC", 3) == {("DiCache", "C"): 3, ("DiCache", "R"): 2}
    assert kinds("dense", "CCRRC", 3) == {("dense", "C"): 5}


def test_the_schedule_keeps_the_published_retention(scripts) -> None:
    """10 of 50 steps, then 30 are reused; Sparse VideoGen leaves 5 dense."""
    mask = scripts.tasks.schedule()
    assert len(mask) == 50 and mask.count("R") == 30 and mask.startswith("C" * 10)
    assert "R" in mask[10:12] and scripts.tasks.leading_steps(0.10) == 5


def test_a_whole_run_has_the_steps_that_it_is_composed_of(scripts, monkeypatch) -> None:
    """50 real steps of the tiny model with both: as many dense, sparse and reused ones."""
    monkeypatch.setattr(attention, "COMPILED", False)
    size, mask = scripts.models.TINY, scripts.tasks.schedule()
    bench = scripts.runs.Bench(size.model, torch.device("cpu"), size.dtype)
    layers = scripts.models.SparseLayers(bench.transformer)
    config = scripts.models.SparseVideoGenConfig(block_size=size.block_size)
    cache = scripts.models.with_sparse(config, lambda pipe, mask: dicache(scripts, pipe, mask))
    run = bench.run(mask, cache, layers.boundary)
    found: Counter[tuple[str, str]] = Counter()
    for step, (count, (blocks,)) in enumerate(zip(layers.finish(), run.blocks, strict=True)):
        assert blocks in (1, bench.num_blocks) and count in (0, bench.num_blocks - 1)
        is_sparse = count > 0 if blocks > 1 else step >= 5
        found["both" if is_sparse else "DiCache", "C" if blocks > 1 else "R"] += 1
    assert found == scripts.report.step_kinds("both", mask, 5)


def dicache(scripts: SimpleNamespace, pipe: Any, mask: str) -> Any:
    """DiCache with its default backend and this mask."""
    return scripts.tasks.dicache_with("auto", pipe, mask)


def test_fewer_blocks_where_the_time_is_short(scripts) -> None:
    """60 blocks, 0.5 s dense and 0.25 s sparse: 4 x 30 + 4 x 15 = 180 s, and a tenth to spare."""
    each = scripts.tasks.StepSeconds(0.0, 0.5, 0.25)
    assert each.of_run("dense", 60) == pytest.approx(66)
    assert each.of_run("both", 60) == pytest.approx(33)
    assert each.plan_share(199.0, 60) == 1.0
    assert each.plan_share(197.0, 60) == 0.5
    assert each.plan_share(1.0, 60) == scripts.tasks.SHARES[-1]
    # 5 s more for each of the eight computed steps, and for six reused ones: 250 s.
    each = scripts.tasks.StepSeconds(5.0, 0.5, 0.25)
    assert (each.plan_share(276.0, 60), each.plan_share(274.0, 60)) == (1.0, 0.5)


# --- The report ----------------------------------------------------------------------------------

ON = {"device": "a device", "versions": {"torch": "2"}}


def timed(case: str, median_ms: float, **more: Any) -> dict[str, Any]:
    """A row of attention as its stage emits it."""
    times = {"fastest_ms": 1.0, "median_ms": median_ms, "samples": 5, "peak_bytes": 2**20}
    return {"kind": "attention", "case": case, **times, **more, **ON}


def planted(sparse_ms: float, both_ms: float) -> list[dict[str, Any]]:
    """Dense attention takes 100 ms; steps are those of `STEP_MS` but for `both`'s computed ones."""
    shape = {"video": [33, 45, 80], "text": 256, "shape": [1, 119056, 24, 128]}
    found = [
        {"kind": "tokens", **shape, **ON},
        timed("dense flash", 100.0, density=1.0, operator="flash"),
        timed("sparse: all", 20.0, density=0.2, kept=0.2),  # no goal is about this density,
        timed("flex_attention", 20.0, density=0.25, kept=0.25),  # or about a part
        timed("sparse: all", sparse_ms, density=0.25, kept=0.25),
        {
            "kind": "schedule",
            "title": "a model",
            "blocks": 60,
            "mask": "C" * 20 + "R" * 30,
            "leading": 5,
            "density": 0.25,
            **ON,
        },
    ]
    step_ms = {**STEP_MS, ("both", "C"): both_ms}
    for run in ("dense", "sparse", "DiCache", "both"):
        row = {"kind": "steps", "run": run, "mask": "CC", "blocks": 60, "step_ms": [1.0], **ON}
        times = {"computed_ms": step_ms[run, "C"], "reused_ms": step_ms.get((run, "R"))}
        found.append({**row, **times})
    return found


def goals(scripts: SimpleNamespace, results: list[dict[str, Any]], tiny: bool = False) -> list[Any]:
    """Measured and status of both goals."""
    outcome = scripts.stages.Outcome("a stage", "passed", results=results)
    found = scripts.report.Findings([outcome], tiny).goals()
    return [(goal.measured, goal.status) for goal in found]


def test_goals_are_judged_by_their_numbers(scripts) -> None:
    """100 / 40 is 2.5, 100 / 41 less; 1500 / (155 + 15 x 15 + 30) is 3.66, with 19 it is 3.19."""
    attention_goal, both_goal = goals(scripts, planted(40.0, 15.0))
    assert attention_goal == (2.5, "met")
    assert both_goal == (pytest.approx(1500 / 410), "met")
    attention_goal, both_goal = goals(scripts, planted(41.0, 19.0))
    assert attention_goal == (pytest.approx(2.439, abs=1e-3), "missed")
    assert both_goal == (pytest.approx(1500 / 470), "missed")


def test_what_was_not_measured_is_not_met(scripts) -> None:
    """On a CPU, without the dense row, and without a kind of step."""
    unmeasured = (None, "not measured")
    results = planted(40.0, 15.0)
    assert goals(scripts, results, tiny=True) == [unmeasured] * 2
    no_dense = [row for row in results if row.get("case") != "dense flash"]
    assert goals(scripts, no_dense)[0] == unmeasured
    no_dense = [row for row in results if row.get("run") != "dense"]
    assert goals(scripts, no_dense)[1] == unmeasured
    assert goals(scripts, []) == [unmeasured] * 2


def started(scripts: Any, monkeypatch: Any, out: Path, *codes: str) -> tuple[int, str]:
    """Exit code and report of the program with these programs for stages."""
    stages = [
        scripts.stages.Stage(f"stage {index}", [sys.executable, "-S", "-c", code])
        for index, code in enumerate(codes)
    ]
    monkeypatch.setattr(scripts.stages, "has_gpu", lambda: True)
    monkeypatch.setattr(scripts.program, "plan", lambda device, environment: stages)
    code = scripts.program.main(["--out", str(out)])
    return code, (out / "sparse.md").read_text()


def emitting(results: list[dict[str, Any]]) -> str:
    """A program that emits these findings."""
    lines = "\n".join(map(json.dumps, results))
    return f"import os; open(os.environ['STAGE_RESULTS'], 'a').write({lines!r} + '\\n'); "


def test_a_missed_goal_is_a_finding(scripts, monkeypatch, tmp_path) -> None:
    """The report says so, and the exit code is 0."""
    code, text = started(scripts, monkeypatch, tmp_path, emitting(planted(41.0, 15.0)))
    assert code == 0
    assert "| 2.44x | **missed** |" in text and "| 3.66x | met |" in text


def test_a_failed_stage_is_told_beside_what_was_found(scripts, monkeypatch, tmp_path) -> None:
    """Its own findings up to then and those of the stages after it are in the report."""
    results = planted(40.0, 15.0)
    error = {"kind": "error", "case": "layout", "error": "AssertionError: wrong"}
    first = emitting([*results[:5], error]) + "raise SystemExit(3)"
    code, text = started(scripts, monkeypatch, tmp_path, first, emitting(results[5:]))
    assert code == 1
    assert "| stage 0 | failed (exit code 3) |" in text and "| stage 1 | passed |" in text
    assert "- layout: AssertionError: wrong" in text
    assert "| 2.5x | met |" in text and "| 3.66x | met |" in text
    assert "119,056 tokens (33 x 45 x 80 of video, 256 of text)" in text


def test_a_faster_dense_kernel_is_told(scripts, monkeypatch, tmp_path) -> None:
    """The goal is about flash attention; whoever has cuDNN's compares with that."""
    results = planted(40.0, 15.0)
    _, text = started(scripts, monkeypatch, tmp_path, emitting(results))
    assert "the fastest dense attention" not in text
    results.append(timed("dense cuDNN", 60.0, density=1.0))
    _, text = started(scripts, monkeypatch, tmp_path, emitting(results))
    assert "dense cuDNN was the fastest dense attention" in text
    assert "at density 0.25 is 1.50x as fast as that" in text


def test_fewer_blocks_than_the_model_has_are_told(scripts, monkeypatch, tmp_path) -> None:
    """A figure of half a model is none of the whole one."""
    results = planted(40.0, 15.0)
    for row in results:
        if row["kind"] == "steps":
            row["blocks"] = 30
    _, text = started(scripts, monkeypatch, tmp_path, emitting(results))
    assert "**30 of 60 blocks**" in text


# --- What fails ----------------------------------------------------------------------------------


def findings(scripts: Any, monkeypatch: Any, folder: Path, name: str) -> tuple[bool, list[Any]]:
    """Whether a task at the tiny size failed, and what it emitted."""
    monkeypatch.setattr(attention, "COMPILED", False)
    monkeypatch.setenv("STAGE_RESULTS", str(folder / "results.jsonl"))
    monkeypatch.setattr(scripts.tasks, "_MOST_SAMPLES", scripts.tasks._FEWEST_SAMPLES)
    task = scripts.tasks.TASKS[name](scripts.models.TINY, torch.device("cpu"))
    task.run()
    lines = (folder / "results.jsonl").read_text().splitlines()
    return task.failed, [json.loads(line) for line in lines]


def test_a_wrong_result_has_no_time(scripts, monkeypatch, tmp_path) -> None:
    """Heads in the other order than they were profiled for, and a kernel that moves nothing."""
    told = attention.temporal_heads
    monkeypatch.setattr(attention, "temporal_heads", lambda *given: 1 - told(*given))
    monkeypatch.setattr(scripts.tasks.layout, "permute_qkv", lambda q, k, v, *_: (q, k, v))
    failed, found = findings(scripts, monkeypatch, tmp_path, "attention")
    assert failed
    errors = {row["case"]: row["error"] for row in found if row["kind"] == "error"}
    assert set(errors) == {"layout", "sparse 0.2", "sparse 0.25", "sparse 0.3"}
    assert "not what the reference gives" in errors["layout"]
    assert "a row of sparse attention is off by" in errors["sparse 0.25"]
    timed_cases = {row["case"] for row in found if row["kind"] == "attention"}
    assert timed_cases - {"dense cuDNN"} == {"dense flash", "profiling"}


def test_a_step_that_fell_back_to_full_attention_has_no_time(
    scripts, monkeypatch, tmp_path
) -> None:
    """Its run is an error, and the dense ones have their rows."""
    monkeypatch.setattr(scripts.tasks, "with_sparse", lambda config, cache: cache)
    failed, found = findings(scripts, monkeypatch, tmp_path, "stack")
    assert failed
    errors = {row["case"]: row["error"] for row in found if row["kind"] == "error"}
    assert set(errors) == {"steps, both", "steps, sparse"}
    assert "step 0 should have 4 sparse layers, and had 0" in errors["steps, both"]
    assert {row["run"] for row in found if row["kind"] == "steps"} == {"dense", "DiCache"}


def test_a_blocks_dense_call_is_dense_and_its_sparse_call_sparse(scripts, monkeypatch) -> None:
    """On the tensors of a step of the model, through Sparse VideoGen's own processors."""
    monkeypatch.setattr(attention, "COMPILED", False)
    tokens: list[int] = []
    compute = processors.sparse_attention

    def note(q: torch.Tensor, *given: Any) -> torch.Tensor:
        tokens.append(q.shape[1])
        return compute(q, *given)

    size = scripts.models.TINY
    calls = scripts.tasks.Blocks(size, torch.device("cpu"))._capture()
    assert [type(call.block).__name__ for call in calls.values()] == [
        "HunyuanVideoTransformerBlock",
        "HunyuanVideoSingleTransformerBlock",
    ]
    monkeypatch.setattr(processors, "sparse_attention", note)
    for call in calls.values():
        dense, _ = call.bind(False)()
        assert tokens == []
        sparse, _ = call.bind(True)()
        assert tokens == [size.video + size.text]
        assert not torch.allclose(dense, sparse, atol=1e-4)
        tokens.clear()


def test_dense_attention_is_flash_without_a_mask(scripts, monkeypatch) -> None:
    """Inside of the context only; diffusers' own call has the mask of the text."""
    size = scripts.models.TINY
    bench = scripts.runs.Bench(size.model, torch.device("cpu"), size.dtype)
    seen: list[tuple[bool, bool]] = []
    compute = torch.nn.functional.scaled_dot_product_attention

    def note(*args: Any, **kwargs: Any) -> Any:
        query = kwargs.get("query", args[0] if args else None)
        if query.shape[2] == size.video + size.text:  # not the text's own layers
            seen.append((kwargs["attn_mask"] is None, torch.backends.cuda.math_sdp_enabled()))
        return compute(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with scripts.models.flash_attention(bench.transformer):
        bench.run("C")
    assert seen == [(True, False)] * bench.num_blocks
    seen.clear()
    bench.run("C")
    assert seen == [(False, True)] * bench.num_blocks


def test_what_there_is_no_time_for_is_told(scripts, monkeypatch, tmp_path) -> None:
    """Left out by name; running out of time is no failure of the stage."""
    monkeypatch.setenv("STAGE_SECONDS", "0")
    failed, found = findings(scripts, monkeypatch, tmp_path, "attention")
    assert not failed and "attention" not in {row["kind"] for row in found}
    left_out = {row["case"]: row["reason"] for row in found if row["kind"] == "left out"}
    assert left_out["sparse 0.25"] == left_out["dense flash"] == "no time left"
