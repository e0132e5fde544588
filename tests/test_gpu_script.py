"""benchmarks/gpu.py keeps working without a GPU, keeps to its time, and invents no GPU figure."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dicache import ops, reference

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PACKAGE = BENCHMARKS.parent / "dicache"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """gpu.py and its modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu
        import gpu_report
        import gpu_tasks
        import stages

        yield SimpleNamespace(gpu=gpu, report=gpu_report, tasks=gpu_tasks, stages=stages)
    finally:
        sys.path.remove(str(BENCHMARKS))


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One dry run for all tests, with the compiled CPU library, if any, as one built elsewhere."""
    out = tmp_path_factory.mktemp("dry")
    libraries = sorted(PACKAGE.glob("_C.*so"))[:1]
    given = ["--prebuilt", str(libraries[0])] if libraries else []
    done = run_script("--out", str(out), "--dry-run", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu.json").read_text()), out


def test_dry_run_measures_every_operation_on_the_cpu(dry_run) -> None:
    """Operators, both skipped steps and the published sequence, by every backend of a CPU."""
    found, _ = dry_run
    backends = {"reference"} | ({"cpp"} if ops.backend_status()["cpp"] == "available" else set())
    measured = {(row["operation"], row["implementation"]) for row in found["rows"]}
    for operation in (*ops.MEMORY_PASSES, "skipped_step", "skipped_step_default"):
        assert {name for op, name in measured if op == operation} >= backends
    assert ("skipped_step", "published") in measured
    assert found["errors"] == [] and found["left_out"] == []
    assert found["backends"]["reference"] == "available"
    assert all(row["microseconds"] > 0 and row["copy_gb_per_s"] > 0 for row in found["rows"])


def test_dry_run_counts_launches(dry_run) -> None:
    """A compiled operator is dispatched once, a skipped step twice, the published sequence 28x."""
    found, _ = dry_run
    for row in found["rows"]:
        if row["implementation"] == "cpp":
            assert row["launches"] == row["stated_launches"], row
        if row["implementation"] == "published":
            assert row["launches"] == 28
    steps = [row["launches"] for row in found["rows"] if row["operation"] == "skipped_step"]
    assert len(steps) > 3 and min(steps) >= 2


def test_dry_run_reports_no_gpu_figure(dry_run, scripts) -> None:
    """No goal is met or missed, no host time or counter is there, GPU stages are not "passed"."""
    found, out = dry_run
    assert found["dry_run"] is True
    assert {goal["status"] for goal in found["goals"]} == {"not measured"}
    assert all(goal["measured"] is None for goal in found["goals"])
    assert found["host"] == [] and found["bytes"] == [] and found["exercised"] == []
    assert {row["implementation"] for row in found["rows"]} <= {"cpp", "reference", "published"}
    assert all(row["size"].startswith("dry-") for row in found["rows"])
    status = {stage["name"]: stage["status"] for stage in found["stages"]}
    skipped = {name for name, value in status.items() if value == "skipped: no CUDA device"}
    tools = {f"{tool} {b}" for tool in scripts.gpu.TOOLS for b in ("cuda", "triton")}
    assert skipped == {"tests", "bytes cuda", "bytes triton"} | tools
    assert status["build"] == "skipped: dry run"
    table = (out / "gpu.md").read_text()
    assert table.startswith("# Dry run on a CPU") and "None of the" in table


def test_dry_run_leaves_few_small_files(dry_run) -> None:
    """The table, the numbers, the logs and the plot."""
    _, out = dry_run
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert set(sizes) - {"gpu.png"} == {"gpu.json", "gpu.md", "gpu.log"}
    assert all(0 < size < 16 * 2**20 for size in sizes.values())


def test_a_library_from_elsewhere_is_the_one_that_is_loaded(dry_run) -> None:
    """The checked package is a copy with the given library, and every operator agrees there."""
    found, out = dry_run
    status = {stage["name"]: stage["status"] for stage in found["stages"]}["prebuilt"]
    if status == "skipped: no --prebuilt given":
        pytest.skip("no compiled CPU library to load")
    assert status == "passed", (out / "gpu.log").read_text()
    log = (out / "gpu.log").read_text()
    assert '"kind": "library"' in log and f'"package": "{PACKAGE}"' not in log
    checked = " ".join(result["case"] for result in found["checked"])
    assert all(f"{operator}-cpp" in checked for operator in ops.MEMORY_PASSES)


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, scripts, monkeypatch, capsys) -> None:
    """An error, not an empty report."""
    monkeypatch.setattr(scripts.gpu, "has_gpu", lambda: False)
    with pytest.raises(SystemExit) as caught:
        scripts.gpu.main(["--out", str(tmp_path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "--dry-run" in message
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_not_there_is_an_error(tmp_path: Path, scripts, capsys) -> None:
    """Found before anything runs."""
    with pytest.raises(SystemExit):
        scripts.gpu.main(["--out", str(tmp_path), "--dry-run", "--prebuilt", "nowhere/_C.so"])
    assert "nowhere/_C.so: there is no such file" in capsys.readouterr().err


def test_what_the_sanitizers_watch_compares_with_the_reference(scripts, monkeypatch) -> None:
    """Two launches in a row at every odd size; one that differs from the reference is an error."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(scripts.tasks, "_device", lambda: cpu)
    backends = scripts.tasks.workloads.backends(cpu)
    if "cpp" not in backends:
        with pytest.raises(SystemExit) as caught:
            scripts.tasks.exercise(["cpp"])
        assert caught.value.code == scripts.stages.SKIP_CODE
        return
    scripts.tasks.exercise(["cpp"])
    wrong = SimpleNamespace(**vars(reference))
    wrong.finish_probe_statistics = lambda *args: reference.finish_probe_statistics(*args) * 1.001
    resolve = ops.resolve_backend
    monkeypatch.setattr(
        ops, "resolve_backend", lambda name, device: wrong if name == "cpp" else resolve(name)
    )
    with pytest.raises(AssertionError, match="finish_probe_statistics-cpp"):
        scripts.tasks.exercise(["cpp"])


# --- Stages --------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    """A command that runs a line of Python."""
    return [sys.executable, "-S", "-c", code]


EMIT = "import os; open(os.environ['STAGE_RESULTS'], 'a').write('{}\\n'); "


def test_a_bad_report_does_not_end_the_measurements(scripts, capsys) -> None:
    def write() -> None:
        raise KeyError("missing figure")

    scripts.stages.tell(scripts.stages.Outcome("first", "passed", 3.2), write)
    told = capsys.readouterr()
    assert told.out == "first: passed, 3 s\n"
    assert "KeyError: 'missing figure'" in told.err


def test_a_stage_over_its_limit_is_stopped_and_later_ones_run(scripts, tmp_path: Path) -> None:
    """Its findings up to then count, a half-written one does not, its children end with it."""
    finding = EMIT.format('{"kind": "early"}')
    half = "open(os.environ['STAGE_RESULTS'], 'a').write('{\"kind\": '); "
    child = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    late, after = scripts.stages.run_stages(
        [
            scripts.stages.Stage("late", python(finding + half + child), limit_s=1.5),
            scripts.stages.Stage("after", python("print('here')")),
        ],
        60,
        tmp_path,
    )
    assert late.status == "timed out (2 s)" and "begun" in late.log
    assert late.results == [{"kind": "early"}]
    assert after.status == "passed" and "here" in after.log
    assert time.monotonic() - start < 20


def test_failures_say_how_and_do_not_stop_the_rest(scripts, tmp_path: Path) -> None:
    """An exit code, a program that is not there, a reason to skip, and nothing to do."""
    Stage = scripts.stages.Stage
    outcomes = scripts.stages.run_stages(
        [
            Stage("fails", python("raise SystemExit(3)")),
            Stage("missing", ["/nowhere/program"]),
            Stage("not here", skip="no CUDA device"),
            Stage("nothing", python(f"raise SystemExit({scripts.stages.SKIP_CODE})")),
            Stage("works", python("pass")),
        ],
        60,
        tmp_path,
    )
    status = [outcome.status for outcome in outcomes]
    assert status[0] == "failed (exit code 3)"
    assert status[1].startswith("failed (") and "/nowhere/program" in status[1]
    assert status[2:] == ["skipped: no CUDA device", "skipped: nothing for it to do here", "passed"]


def test_the_budget_is_kept_and_time_is_reserved(scripts, tmp_path: Path) -> None:
    """An early stage stops in time for what a later one has reserved; what is left over is said."""
    Stage = scripts.stages.Stage
    reports: list[int] = []
    start = time.monotonic()
    outcomes = scripts.stages.run_stages(
        [
            Stage("long", python("import time; time.sleep(60)"), limit_s=60),
            Stage("reserved", python("import time; time.sleep(60)"), limit_s=60, reserve_s=3),
            Stage("too late", python("pass")),
        ],
        5,
        tmp_path,
        lambda outcomes: reports.append(len(outcomes)),
    )
    assert [outcome.status.split(" (")[0] for outcome in outcomes] == [
        "timed out",
        "timed out",
        "skipped: no time left in the budget",
    ]
    assert outcomes[0].seconds < 2.8
    assert time.monotonic() - start < 15
    assert reports == [1, 2, 3]  # a report after every stage, whatever comes next


# --- The report ----------------------------------------------------------------------------------


def row(operation: str, size: str, microseconds: float, fraction: float, **more: Any) -> dict:
    """A row as the bench stage emits it."""
    return {
        "kind": "row",
        "operation": operation,
        "implementation": "cuda",
        "size": size,
        "microseconds": microseconds,
        "fraction_of_copy": fraction,
        "launches": 1,
    } | more


def test_goals_are_judged_by_their_numbers(scripts) -> None:
    """89 % of a copy misses 90 %, 4.6x meets 4.5x, 8.1 us misses 8, two launches miss one."""
    results = [
        row("combine_residuals", "wan", 100.0, 0.89),
        row("record_residuals", "flux", 100.0, 0.76, launches=2),
        row("skipped_step", "wan", 100.0, 0.9),
        row("skipped_step", "wan", 460.0, 0.5, implementation="published"),
        {
            "kind": "host",
            "operation": "combine_residuals",
            "implementation": "cuda",
            "microseconds": 8.1,
        },
    ]
    outcome = scripts.stages.Outcome("bench", "passed", 1.0, results)
    found = scripts.report.Findings([outcome], dry=False)
    judged = {(g.text, g.where): g.status for g in found.goals() if g.backend == "cuda"}
    assert judged["combine_residuals reaches 90% of a copy", "wan"] == "missed"
    assert judged["record_residuals reaches 75% of a copy", "flux"] == "met"
    assert judged["record_residuals is one launch", "flux"] == "missed"
    step = "a skipped step is 4.5x as fast as the published sequence"
    assert judged[step, "wan"] == "met" and judged[step, "flux"] == "not measured"
    host = "combine_residuals takes less than 8 us of host time"
    assert judged[host, "small"] == "missed"
    assert {g.status for g in found.goals() if g.backend == "triton"} == {"not measured"}


def test_counters_of_the_profiler_are_read_by_launch(scripts) -> None:
    """`ncu --csv` prints a line a metric, in base units, below lines of its own."""
    printed = "\n".join(
        [
            "==PROF== Connected to process 7",
            '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","probe_kernel","dram__bytes_read.sum","byte","1,654,000,000"',
            '"0","probe_kernel","dram__bytes_write.sum","byte","413000000"',
            '"1","combine_kernel","dram__bytes_read.sum","byte","5"',
        ]
    )
    assert scripts.tasks.read_counters(printed) == [
        ("probe_kernel", {"dram__bytes_read.sum": 1.654e9, "dram__bytes_write.sum": 4.13e8}),
        ("combine_kernel", {"dram__bytes_read.sum": 5.0}),
    ]
    assert scripts.tasks.read_counters("==ERROR== no permission") == []


def test_a_backend_that_is_not_there_is_skipped(scripts, monkeypatch) -> None:
    """Neither its times nor its sanitizer runs count as passed."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(scripts.tasks, "_device", lambda: cpu)
    monkeypatch.delenv("STAGE_RESULTS", raising=False)
    for task in (scripts.tasks.TASKS[name] for name in ("dry-bench", "exercise", "count-bytes")):
        with pytest.raises(SystemExit) as caught:
            task(["cuda"])
        assert caught.value.code == scripts.stages.SKIP_CODE


def test_counted_bytes_are_set_against_the_stated_passes(scripts) -> None:
    """combine reads three tensors of 413,614,080 bytes and writes one."""
    counters = {"dram__bytes_read.sum": 3 * 413_614_080, "dram__bytes_write.sum": 0.5 * 413_614_080}
    read, written = scripts.tasks.passes_found("combine_residuals", counters)
    assert (read["stated_passes"], read["counted_passes"]) == (3, 3.0)
    assert (written["stated_passes"], written["counted_passes"]) == (1, 0.5)


def test_a_broken_backend_cannot_take_the_others_times(scripts, tmp_path: Path) -> None:
    """On a GPU every backend and every kind of baseline is timed in a process of its own."""
    stages = scripts.gpu.plan(False, None, tmp_path)
    timed = [stage.name for stage in stages if stage.name.startswith("bench")]
    assert timed == [
        "bench cuda",
        "bench triton",
        "bench published reference",
        "bench torch.compile",
    ]
    assert sum(stage.reserve_s for stage in stages) < 200 < scripts.gpu.BUDGET_SECONDS < 540


def test_tests_are_counted_by_backend(scripts, tmp_path: Path) -> None:
    """From pytest's report: passed, failed and skipped for each."""
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_operators" name="test_a[cuda]"/>'
        '<testcase classname="tests.test_operators" name="test_b[cuda]"><failure/></testcase>'
        '<testcase classname="tests.test_triton_gpu" name="test_c"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    outcome = scripts.stages.Outcome("tests", "failed (exit code 1)")
    scripts.gpu.count_tests([outcome], report)
    counts = {result["backend"]: result["counts"] for result in outcome.results}
    assert counts == {"cuda": "1 passed, 1 failed", "triton": "1 skipped"}
