"""benchmarks/gpu.py keeps working without a GPU, keeps to its time, and invents no GPU figure."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import findings
import gpu
import operators
import pytest
import report
import torch
import workloads
from cases import Cases
from stages import SKIP_CODE, Outcome, Stage, run_stages

from dicache import ops, reference

SCRIPT = Path(gpu.__file__)
CPU = torch.device("cpu")
MODELS = ("flux", "wan", "hunyuan-video")
DENSITIES = {0.2, 0.25, 0.3}
SPARSE_ROWS = {"sparse: all", "flex_attention", "plan, once a run"}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=540)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[findings.Findings, Path]:
    """One dry run for all tests."""
    out = tmp_path_factory.mktemp("dry")
    done = run_script("--out", str(out), "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    return findings.Findings(report.read(out, dry=True), dry=True), out


# --- The program ---------------------------------------------------------------------------------


def test_every_operation_is_measured_on_the_cpu(dry_run) -> None:
    """Operators, both skipped steps and the published sequence, by every backend of a CPU."""
    found, _ = dry_run
    rows = found.times()
    backends = {"reference"} | ({"cpp"} if ops.backend_status()["cpp"] == "available" else set())
    measured = {(row["operation"], row["implementation"]) for row in rows}
    for operation in (*ops.MEMORY_PASSES, "skipped_step", "skipped_step_default"):
        assert {name for op, name in measured if op == operation} >= backends
    assert ("skipped_step", "published") in measured
    assert found.of_kind("error") == [] and found.of_kind("left out") == []
    assert all(row["microseconds"] > 0 and row["copy_gb_per_s"] > 0 for row in rows)
    assert tuple(ops.MEMORY_PASSES) == findings.OPERATORS


def test_launches_are_counted(dry_run) -> None:
    """A compiled operator is dispatched once, a skipped step twice, the published sequence 28x."""
    rows = dry_run[0].times()
    for row in rows:
        if row["implementation"] == "cpp":
            assert row["launches"] == row["stated_launches"], row
        if row["implementation"] == "published":
            assert row["launches"] == 28
    steps = [row["launches"] for row in rows if row["operation"] == "skipped_step"]
    assert len(steps) > 3 and min(steps) >= 2


def test_every_cache_follows_the_mask_on_every_model(dry_run) -> None:
    """Counted below the caches: all blocks on a computed step, at most a probe on a skipped one."""
    found, _ = dry_run
    wanted = {"dicache reference", "FirstBlockCache", "ideal", "un-cached, again"}
    for model in MODELS:
        rows = {r["implementation"]: r for r in found.pipelines() if r["model"] == model}
        assert set(rows) >= wanted
        assert {row["deviation"] for row in rows.values()} == {None}
        assert rows.pop("un-cached, again")["mask"] == "C" * 10
        assert {row["mask"].count("R") for row in rows.values()} == {6}
        blocks = {name: row["blocks_in_a_skipped_call"] for name, row in rows.items()}
        assert set(blocks.values()) == {1}
        for row in rows.values():
            assert row["speed_up"] == pytest.approx(row["uncached_loop_ms"] / row["loop_ms"])
    (compiled,) = (
        row
        for row in found.pipelines()
        if row["model"] == "flux, compiled blocks" and "dicache" in row["implementation"]
    )
    assert compiled["deviation"] is None and compiled["reused_steps"] == 6


def test_dicache_launches_hardly_more_than_an_ideal_step(dry_run) -> None:
    """Two or three operators a context, a third of what FirstBlockCache adds or less."""
    for model in MODELS:
        rows = [row for row in dry_run[0].pipelines() if row["model"] == model]
        launches = {row["implementation"]: row["launches"] for row in rows}
        contexts = 2 if model == "wan" else 1
        default = next(iter(launches))
        if default != "dicache reference":  # a compiled library: one operator for many
            added = launches[default] - launches["ideal"]
            assert 2 <= added / contexts <= 3
            assert launches["FirstBlockCache"] - launches["ideal"] >= 3 * added


def test_every_part_of_sparse_attention_has_a_row(dry_run) -> None:
    """Dense flash, and three rows a density."""
    rows = dry_run[0].attention()
    wanted = {(row, density) for row in SPARSE_ROWS for density in DENSITIES}
    found = {(row["row"], row.get("density")) for row in rows}
    assert found - {("dense cuDNN", 1.0)} == {("dense flash", 1.0)} | wanted
    (dense,) = (row for row in rows if row["row"] == "dense flash")
    assert "flash_attention" in dense["operator"]
    for row in rows:
        assert row["over_dense"] == pytest.approx(dense["median_ms"] / row["median_ms"])
        assert 0 < row["fastest_ms"] <= row["median_ms"]
        if row["row"] in SPARSE_ROWS:
            assert 0 < row["density"] - row["kept"] < 0.01 and row["kept_blocks"] >= row["kept"]
            assert row["ideal"] == pytest.approx(1 / row["kept"])


def test_sparse_steps_do_what_they_are_told(dry_run) -> None:
    """Two steps of each kind at least; all blocks but the first one sparse, in computed steps."""
    rows = {row["run"]: row for row in dry_run[0].of_kind("steps")}
    layers = {name: row["sparse_layers"] for name, row in rows.items() if "sparse_layers" in row}
    assert layers == {"sparse": [4, 4], "both": [4, 4, 0, 0, 0]} and len(rows) == 4
    assert {row["reused_steps"] for row in rows.values() if "reused_steps" in row} == {3}
    both = rows["both"]
    assert both["mask"] == rows["DiCache"]["mask"] == "CCRRR"
    assert both["computed_ms"] == pytest.approx(sum(both["step_ms"][:2]) / 2)
    assert both["reused_ms"] == sorted(both["step_ms"][2:])[1]


def test_a_dry_run_reports_no_gpu_figure(dry_run) -> None:
    """Tensors can be counted anywhere; nothing else is a goal that a CPU meets or misses."""
    found, out = dry_run
    goals = found.goals()
    counted = [goal for goal in goals if goal.measured is not None]
    assert {(goal.wanted, goal.measured) for goal in counted} == {(5, 4)}
    assert {goal.where for goal in counted} >= set(MODELS)
    assert {goal.status for goal in goals} == {"met", "not measured"}
    assert found.of_kind("host") == []
    assert {row["implementation"] for row in found.times()} <= {"cpp", "reference", "published"}
    assert all(row["size"].startswith("dry-") for row in found.times())
    status = {outcome.name: outcome.status for outcome in found.outcomes}
    skipped = {name for name, value in status.items() if value == "skipped: no CUDA device"}
    tools = {f"{tool} {b}" for tool in gpu.TOOLS for b in ("cuda", "triton")}
    assert skipped == {"build", "tests"} | tools
    assert {status[name] for name in set(status) - skipped} == {"passed"}
    text = (out / "gpu.md").read_text()
    assert text.startswith("# Dry run on a CPU") and "## Goals" in text and "composed" in text
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}


def test_what_is_there_is_not_measured_again(dry_run) -> None:
    """The same command finds everything done; its report still has all of it."""
    found, out = dry_run
    done = run_script("--out", str(out), "--dry-run", "--only", "times", "pipelines")
    assert done.returncode == 0 and done.stdout.startswith("# Dry run on a CPU")  # no stage ran
    again = report.read(out, dry=True)
    assert [vars(o) for o in again[1:]] == [vars(o) for o in found.outcomes[1:]]


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    """An error, not an empty report."""
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--out", str(tmp_path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "--dry-run" in message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match="--only pictures: expected build, tests, times"):
        gpu.main(["--out", str(tmp_path), "--dry-run", "--only", "pictures"])


def test_the_plan_for_a_gpu() -> None:
    """Important parts first; a broken backend cannot take the others' times; session tests run."""
    stages = gpu.Planner(dry=False).stages()
    timed = [stage.name for stage in stages if stage.part == "times"]
    assert timed == [
        "times cuda",
        "times triton",
        "times published reference",
        "times torch.compile",
    ]
    assert tuple(dict.fromkeys(stage.part for stage in stages)) == gpu.PARTS
    assert {stage.part for stage in stages if stage.skip} <= {"sanitizers"}
    (tests,) = (stage for stage in stages if stage.name == "tests")
    files = {Path(word).name for word in tests.command if word.endswith(".py")}
    assert files >= {"test_operators.py", "test_session.py", "test_overhead.py", "test_store.py"}
    (wan,) = gpu.chosen(stages, ["wan"])
    assert wan.limit_s == float("inf") and wan.part == "pipelines"


# --- Stages --------------------------------------------------------------------------------------


def stage(name: str, code: str, limit_s: float = 60.0) -> Stage:
    """A stage that runs some Python."""
    environment = {"PYTHONPATH": str(SCRIPT.parent)}
    return Stage(name, "a part", [sys.executable, "-c", code], limit_s, environment)


EMIT = "import os; open(os.environ['STAGE_RESULTS'], 'a').write('{}\\n'); "
# Three cases that are told apart by their letter; "b" takes its process along.
DYING = """
import torch, sys
from cases import Cases
cases = Cases(torch.device("cpu"))
for name in "abc":
    cases.attempt(name, lambda: sys.exit(3) if name == "b" else [{"kind": "row", "name": name}])
"""


def test_a_stage_over_its_limit_is_stopped_and_later_ones_run(tmp_path: Path) -> None:
    """Its findings up to then count, a half-written one does not, its children end with it."""
    finding = EMIT.format('{"kind": "early"}')
    half = "open(os.environ['STAGE_RESULTS'], 'a').write('{\"kind\": '); "
    child = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '90'])"
    start = time.monotonic()
    late, after = run_stages(
        [stage("late", finding + half + child, limit_s=6), stage("after", "print('here')")],
        60,
        tmp_path,
    )
    assert late.status == "timed out (6 s)" and "begun" in late.log and late.failed
    assert late.results == [{"kind": "early"}]
    assert after.status == "passed" and "here" in after.log
    assert time.monotonic() - start < 60


def test_failures_say_how_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    """An exit code, a program that is not there, a reason to skip, and nothing to do."""
    outcomes = run_stages(
        [
            stage("fails", "raise SystemExit(3)"),
            Stage("missing", "a part", ["/nowhere/program"]),
            Stage("not here", "a part", skip="no CUDA device"),
            stage("nothing", f"raise SystemExit({SKIP_CODE})"),
            stage("works", "pass"),
        ],
        60,
        tmp_path,
    )
    status = [outcome.status for outcome in outcomes]
    assert status[0] == "failed (exit code 3)"
    assert status[1].startswith("failed (") and "/nowhere/program" in status[1]
    assert status[2:] == ["skipped: no CUDA device", "skipped: nothing for it to do here", "passed"]


def test_the_budget_is_kept(tmp_path: Path) -> None:
    """What is left over is said, and a report follows every stage."""
    reports: list[int] = []
    outcomes = run_stages(
        [stage("long", "import time; time.sleep(60)"), stage("too late", "pass")],
        2,
        tmp_path,
        lambda outcomes: reports.append(len(outcomes)),
    )
    assert outcomes[0].status.startswith("timed out") and outcomes[0].seconds < 4
    assert outcomes[1].status == "skipped: no time left in the budget"
    assert reports == [1, 2]


def test_a_process_that_dies_is_followed_by_one_for_the_rest(tmp_path: Path) -> None:
    """The dead one's findings are kept; what it died of is an error; the stage has failed."""
    (outcome,) = run_stages([stage("dying", DYING)], 60, tmp_path)
    assert [row["name"] for row in outcome.of_kind("row")] == ["a", "c"]
    (error,) = outcome.of_kind("error")
    assert error["case"] == "b" and "its process ended" in error["error"]
    assert outcome.status == "failed (1 cases)" and outcome.failed


def test_a_later_run_does_what_is_not_done(tmp_path: Path) -> None:
    """A complete stage is left alone; of another one the cases that ended are not tried again."""
    done = [
        {"kind": kind, "case": "a", "name": "a of before"} for kind in ("begun", "row", "ended")
    ]
    earlier = [
        Outcome("complete", "passed"),
        Outcome("dying", "timed out (9 s)", results=[*done, {"kind": "begun", "case": "b"}]),
        Outcome("short of time", "passed", results=[{"kind": "left out", "case": "x"}]),
    ]
    program = [stage(outcome.name, DYING) for outcome in earlier]
    complete, dying, short = run_stages(program, 60, tmp_path, earlier=earlier)
    assert complete.status == "passed" and complete.seconds == 0
    assert [row["name"] for row in dying.of_kind("row")] == ["a of before", "c"]
    assert [error["case"] for error in dying.of_kind("error")] == ["b"]
    assert [row["name"] for row in short.of_kind("row")] == ["a", "c"]


@pytest.fixture
def emitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads what was emitted, as pairs of kind and case."""
    path = tmp_path / "results.jsonl"
    monkeypatch.setenv("STAGE_RESULTS", str(path))

    def read() -> list[tuple[str, str]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            (line["kind"], line["case"]) for line in lines if line["kind"] not in ("begun", "ended")
        ]

    return read


def test_a_case_that_fails_costs_its_own_row(emitted, monkeypatch) -> None:
    """Another one has its row, an optional one may be impossible, a late one is left out."""

    def fails() -> Sequence[dict]:
        raise RuntimeError("no kernel")

    monkeypatch.setenv("STAGE_SECONDS", "60")
    cases = Cases(CPU)
    cases.attempt("broken", fails)
    cases.attempt("impossible", fails, optional=True)
    cases.attempt("late", fails, needs_s=100)
    cases.attempt("right", lambda: [{"kind": "row"}])
    assert emitted() == [
        ("error", "broken"),
        ("absent", "impossible"),
        ("left out", "late"),
        ("row", "right"),
    ]


def start(monkeypatch: Any, out: Path, program: Stage, revision: str = "a") -> int:
    """Exit code of the program with this program for its only stage."""
    facts = EMIT.format(json.dumps({"kind": "facts", "facts": {"revision": revision}}))
    monkeypatch.setattr(gpu.Planner, "facts", lambda self: stage("facts", facts))
    monkeypatch.setattr(gpu.Planner, "stages", lambda self: [program])
    return gpu.main(["--out", str(out), "--dry-run"])


def test_another_revision_is_measured_anew(tmp_path: Path, monkeypatch: Any) -> None:
    """Figures of two revisions, or of two machines, do not stand in one report."""
    for revision, runs in (("a", 1), ("a", 1), ("b", 2), ("b", 2)):
        assert start(monkeypatch, tmp_path, stage("one", "print('it ran')"), revision) == 0
        assert (tmp_path / "gpu.log").read_text().count("it ran") == runs
    assert "- revision: b" in (tmp_path / "gpu.md").read_text()


def test_what_pytest_counted_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    """A stage whose tests all skipped has passed, too."""
    tests = stage("tests", "print('....'); print('2 passed, 3 skipped in 4 s')")
    assert start(monkeypatch, tmp_path, tests) == 0
    assert "| 2 passed, 3 skipped in 4 s |" in (tmp_path / "gpu.md").read_text()


def test_a_bad_report_loses_no_finding(tmp_path: Path, monkeypatch: Any) -> None:
    """Findings are stored before anything is made of them; a failed stage is told by the code."""
    code = EMIT.format('{"kind": "attention", "row": "dense flash"}')
    with pytest.raises(KeyError):
        start(monkeypatch, tmp_path, stage("one", code))
    stored = json.loads((tmp_path / "gpu.json").read_text())["stages"][-1]
    assert stored["results"] == [{"kind": "attention", "row": "dense flash"}]
    assert start(monkeypatch, tmp_path, stage("two", "raise SystemExit(3)"), "b") == 1


# --- What is asked of the operators --------------------------------------------------------------


def test_what_the_sanitizers_watch_compares_with_the_reference(monkeypatch) -> None:
    """Two launches in a row at every odd size; one that differs from the reference is an error."""
    if "cpp" not in workloads.backends(CPU):
        with pytest.raises(SystemExit) as caught:
            operators.exercise(CPU, True, ["cpp"])
        assert caught.value.code == SKIP_CODE
        return
    operators.exercise(CPU, True, ["cpp"])
    wrong = SimpleNamespace(**vars(reference))
    wrong.finish_probe_statistics = lambda *args: reference.finish_probe_statistics(*args) * 1.001
    resolve = ops.resolve_backend
    monkeypatch.setattr(
        ops, "resolve_backend", lambda name, device: wrong if name == "cpp" else resolve(name)
    )
    with pytest.raises(AssertionError, match="probe_statistics-cpp: result"):
        operators.exercise(CPU, True, ["cpp"])


def test_a_backend_that_is_not_there_is_skipped() -> None:
    """Neither its times nor its sanitizer runs count as passed."""
    for task in (operators.times, operators.exercise):
        with pytest.raises(SystemExit) as caught:
            task(CPU, True, ["cuda"])
        assert caught.value.code == SKIP_CODE


# --- Goals ---------------------------------------------------------------------------------------


def goals_of(results: list[dict[str, Any]], dry: bool = False) -> dict[tuple[str, str], Any]:
    """All goals by text and place."""
    found = findings.Findings([Outcome("a stage", "passed", results=results)], dry).goals()
    return {(goal.text, goal.where): goal for goal in found}


def row(operation: str, size: str, microseconds: float, fraction: float, **more: Any) -> dict:
    """A row as the operators' stage emits it."""
    return {
        "kind": "time",
        "operation": operation,
        "implementation": "cuda",
        "size": size,
        "microseconds": microseconds,
        "fraction_of_copy": fraction,
        "launches": 1,
    } | more


def test_goals_of_operators_are_judged_by_their_numbers() -> None:
    """89 % of a copy misses 90 %, 4.6x meets 4.5x, 8.1 us misses 8, two launches miss one."""
    host = {"kind": "host", "operation": "combine_residuals", "implementation": "cuda"}
    goals = goals_of(
        [
            row("combine_residuals", "wan", 100.0, 0.89),
            row("record_residuals", "flux", 100.0, 0.76, launches=2),
            row("skipped_step", "wan", 100.0, 0.9),
            row("skipped_step", "wan", 460.0, 0.5, implementation="published"),
            {**host, "microseconds": 8.1},
        ]
    )
    judged = {key: goal.status for key, goal in goals.items()}
    assert judged["combine_residuals reaches 90% of a copy", "cuda, wan"] == "missed"
    assert judged["record_residuals reaches 75% of a copy", "cuda, flux"] == "met"
    assert judged["record_residuals is one launch", "cuda, flux"] == "missed"
    step = "a skipped step is 4.5x as fast as the published sequence"
    assert judged[step, "cuda, wan"] == "met" and judged[step, "cuda, flux"] == "not measured"
    taken = "combine_residuals takes less than 8 us of host time"
    assert judged[taken, "cuda, small"] == "missed"
    assert {judged[key] for key in judged if "triton" in key[1]} == {"not measured"}


def pipeline_row(implementation: str, mask: str, loop_ms: float, **more: Any) -> dict[str, Any]:
    """A row as the pipelines' stage emits it: full steps of 100 ms, ideal ones of 10."""
    return {
        "kind": "pipeline",
        "model": "flux",
        "implementation": implementation,
        "mask": mask,
        "blocks": 57,
        "full_ms": 100.0,
        "ideal_ms": 10.0,
        "uncached_loop_ms": 1000.0,
        "loop_ms": loop_ms,
        "skipped_ms": None,
        "deviation": None,
        "cache_tensors": 6,
    } | more


def test_efficiency_is_ideal_over_measured_time() -> None:
    """4 full steps of 100 and 6 ideal ones of 10 are 460; in 500 that is 0.92."""
    mask = "CCCCRRRRRR"
    model = {
        "kind": "model",
        "model": "flux",
        "title": "FLUX",
        "blocks": 57,
        "contexts": 1,
        "wanted_steps": 50,
        "mask": mask,
        "default": "dicache cuda",
    }
    results = [
        model,
        pipeline_row("dicache cuda", mask, 500.0),
        pipeline_row("ideal", mask, 450.0),
        pipeline_row("un-cached, again", "C" * 10, 1010.0),
        pipeline_row("ignorant", mask, 1000.0, deviation="step 4 should be skipped"),
    ]
    found = findings.Findings([Outcome("flux", "passed", results=results)], dry=False)
    mine, _, again, ignorant = found.pipelines()
    assert mine["efficiency"] == pytest.approx(0.92) and mine["speed_up"] == pytest.approx(2.0)
    assert mine["of_ideal_run"] == pytest.approx(0.9)
    assert again["efficiency"] == pytest.approx(1000 / 1010) and "of_ideal_run" not in again
    assert not {"efficiency", "speed_up", "of_ideal_run"} & set(ignorant)
    longer = [model, pipeline_row("ideal", mask + "C", 450.0), results[1]]
    longer_runs = findings.Findings([Outcome("flux", "passed", results=longer)], dry=False)
    assert "of_ideal_run" not in longer_runs.pipelines()[1]
    goals = goals_of(results)
    goal = goals["efficiency of a run is 0.98 or more", "flux"]
    assert (goal.measured, goal.status) == (pytest.approx(0.92), "missed")
    assert goals["at most 5 cache tensors a context", "flux"].status == "missed"
    assert goals_of(results, dry=True)[goal.text, "flux"].status == "not measured"
    text = report.markdown(found, "a command")
    assert "| ignorant | **no** |" in text and "- ignorant: step 4 should be skipped" in text
    assert "**10 of 50 steps**" in text and "weighs more" not in text
    fewer = [model, *({**each, "blocks": 29} for each in results[1:])]
    found = findings.Findings([Outcome("flux", "passed", results=fewer)], dry=False)
    assert "**29 of 57 blocks**" in report.markdown(found, "a command")
