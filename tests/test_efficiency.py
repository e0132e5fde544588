"""benchmarks/efficiency.py keeps working without a GPU, and counts and computes what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODELS = ("flux", "wan", "hunyuan-video")
EVERYWHERE = {"dicache reference", "published", "FirstBlockCache", "SeaCache"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """efficiency.py and its modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import efficiency
        import efficiency_caches
        import efficiency_models
        import efficiency_report
        import efficiency_runs
        import efficiency_tasks
        import stages
        import workloads

        yield SimpleNamespace(
            program=efficiency,
            caches=efficiency_caches,
            models=efficiency_models,
            report=efficiency_report,
            runs=efficiency_runs,
            tasks=efficiency_tasks,
            stages=stages,
            workloads=workloads,
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run of the whole program with tiny models, as a user starts it."""
    out = tmp_path_factory.mktemp("efficiency")
    command = [sys.executable, str(BENCHMARKS / "efficiency.py")]
    command += ["--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "efficiency.json").read_text()), out


# --- The program ---------------------------------------------------------------------------------


def test_every_implementation_follows_the_mask_on_every_model(dry_run) -> None:
    """Counted below the caches: all blocks on a computed step, at most a probe on a skipped one."""
    found, _ = dry_run
    for model in MODELS:
        rows = [row for row in found["short"] if row["model"] == model]
        assert {row["implementation"] for row in rows} >= EVERYWHERE
        assert [row["deviation"] for row in rows] == [None] * len(rows)
        blocks = {row["implementation"]: row["blocks_in_a_skipped_call"] for row in rows}
        assert blocks.pop("SeaCache") == 0
        blocks.pop("cache-dit F1B0", None)  # it has a probe in every list of blocks
        assert set(blocks.values()) == {1}
    assert [(row["model"], row["deviation"]) for row in found["whole"]] == [
        (model, None) for model in MODELS
    ]
    assert found["errors"] == [] and found["unfinished"] == [] and found["left_out"] == []


def test_dicache_dispatches_less_than_the_published_sequence(dry_run) -> None:
    """Above the ideal step: 28 operators and a read in the published step, few in dicache's."""
    found, _ = dry_run
    for model in MODELS:
        operators = {
            row["implementation"]: row["operators"]
            for row in found["short"]
            if row["model"] == model
        }
        (ideal,) = (row["operators"] for row in found["ideal"] if row["model"] == model)
        contexts = 2 if model == "wan" else 1
        assert operators["published"] - ideal == 29 * contexts
        default = next(row["default"] for row in found["models"] if row["model"] == model)
        if default != "dicache reference":  # a compiled library: one operator for many
            assert ideal < operators[default] < operators["published"]


def test_dry_run_states_goals_and_meets_none_by_a_time(dry_run) -> None:
    """Tensors can be counted anywhere; a time on a CPU is not what the goal is about."""
    found, out = dry_run
    goals = {(goal["model"], goal["wanted"]): goal for goal in found["goals"]}
    assert set(goals) == {(model, wanted) for model in MODELS for wanted in (0.98, 5)}
    for model in MODELS:
        assert goals[model, 0.98]["status"] == "not measured"
        assert (goals[model, 5]["measured"], goals[model, 5]["status"]) == (4, "met")
    text = (out / "efficiency.md").read_text()
    assert text.startswith("# Dry run on a CPU") and "## Goals" in text
    assert all(goal["goal"] in text for goal in found["goals"])
    assert {row["extra_peak_bytes"] for row in found["short"]} == {None}


def test_only_what_explores_a_gpu_is_skipped(dry_run) -> None:
    """Every other stage passed."""
    found, _ = dry_run
    skipped = {s["name"] for s in found["stages"] if s["status"] == "skipped: no CUDA device"}
    assert skipped == {
        f"explore {model} {task}" for model in MODELS for task in ("graph", "compile")
    }
    passed = {stage["name"] for stage in found["stages"] if stage["status"] == "passed"}
    assert passed == {"environment", "backends", *MODELS}


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, scripts, monkeypatch, capsys) -> None:
    """An error, not an empty report."""
    monkeypatch.setattr(scripts.stages, "has_gpu", lambda: False)
    with pytest.raises(SystemExit) as error:
        scripts.program.main(["--out", str(tmp_path)])
    assert error.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


# --- What fails ----------------------------------------------------------------------------------


def measured(scripts, monkeypatch, folder: Path, **broken: Any) -> list[dict[str, Any]]:
    """Findings of the tiny Flux where some caches are replaced."""
    everything = scripts.caches.caches
    monkeypatch.setattr(scripts.tasks, "caches", lambda device: {**everything(device), **broken})
    monkeypatch.setenv("STAGE_RESULTS", str(folder / "results.jsonl"))
    scripts.tasks.Measurement("flux", torch.device("cpu")).run()
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_failing_cache_does_not_lose_the_others(tmp_path, scripts, monkeypatch) -> None:
    """It is an error in the report, and its neighbours have their rows."""

    @contextmanager
    def fails(pipe: Any, mask: str) -> Iterator[Any]:
        raise RuntimeError("out of order")
        yield

    found = measured(scripts, monkeypatch, tmp_path, published=fails)
    rows = {row["implementation"] for row in found if row["kind"] == "row"}
    assert rows >= EVERYWHERE - {"published"} and "published" not in rows
    errors = [row for row in found if row["kind"] == "error"]
    assert [row["case"] for row in errors] == ["flux: launches, published", "flux: published"]
    assert all("out of order" in row["error"] for row in errors)
    assert [row["kind"] for row in found].count("whole") >= 1


def test_a_cache_that_ignores_the_mask_gets_no_efficiency(tmp_path, scripts, monkeypatch) -> None:
    """One that computes every step is reported as such, not as slow."""
    found = measured(scripts, monkeypatch, tmp_path, published=scripts.caches.uncached)
    (row,) = (r for r in found if r["kind"] == "row" and r["implementation"] == "published")
    assert row["deviation"] == "step 3 should be skipped, and ran 5 of 5 blocks"
    outcome = scripts.stages.Outcome("flux", "passed", results=found)
    scripts.report.write([outcome], ["flux"], tmp_path, "a command", True)
    report = json.loads((tmp_path / "efficiency.json").read_text())
    with_efficiency = {r["implementation"] for r in report["short"] if "efficiency" in r}
    assert "published" not in with_efficiency and "FirstBlockCache" in with_efficiency
    assert "published did not follow the mask" in (tmp_path / "efficiency.md").read_text()


def test_a_process_that_dies_is_followed_by_one_for_the_rest(scripts, monkeypatch) -> None:
    """Without what was begun before, and with the dead one's findings kept."""
    program = """
import sys
from stages import emit
left = [name for name in ("a", "b", "c") if name not in sys.argv]
for name in left:
    emit({"kind": "begun", "model": "flux", "implementation": name})
    if name == "b":
        raise SystemExit(3)
    emit({"kind": "row", "model": "flux", "implementation": name})
"""
    monkeypatch.setattr(
        scripts.program, "_command", lambda script, *given: [sys.executable, "-c", program, *given]
    )
    outcomes: list[Any] = []
    environment = {"PYTHONPATH": str(BENCHMARKS)}
    scripts.program.run_model("flux", "cpu", 300.0, environment, outcomes.append)
    names = [(o.name, o.status) for o in outcomes if not o.name.startswith("explore")]
    assert names == [("flux", "failed (exit code 3)"), ("flux without a, b", "passed")]
    findings = scripts.report.Findings(outcomes, ["flux"], True)
    assert [row["implementation"] for row in findings.of_kind("row")] == ["a", "c"]
    assert findings.unfinished() == [("flux", "b")]


# --- Numbers -------------------------------------------------------------------------------------


def test_efficiency_is_ideal_over_measured_time(scripts) -> None:
    """4 full steps of 100 and 6 ideal ones of 10 are 460; in 500 that is 0.92."""
    assert scripts.report.efficiency(4, 6, 100.0, 10.0, 500.0) == pytest.approx(0.92)
    row = {"full_ms": 100.0, "ideal_ms": 10.0, "computed_ms": 105.0, "skipped_ms": 15.0}
    found = scripts.report.estimate(row, "CCCCRRRRRR")  # 4 x 105 + 6 x 15 = 510
    assert found["efficiency"] == pytest.approx(460 / 510)
    assert found["speed_up"] == pytest.approx(1000 / 510)
    whole = {**row, "mask": "CCCCRRRRRR", "loop_ms": 500.0, "uncached_loop_ms": [990.0, 1010.0]}
    assert scripts.report.conclude(whole) == pytest.approx({"efficiency": 0.92, "speed_up": 2.0})


def test_a_goal_that_was_not_measured_is_not_met(scripts) -> None:
    """On either side of the bound, and without a value."""
    goal = scripts.report.Goal
    assert goal("", "flux", None, 0.98, True).status == "not measured"
    assert goal("", "flux", 0.98, 0.98, True).status == "met"
    assert goal("", "flux", 0.97, 0.98, True).status == "missed"
    assert goal("", "flux", 6, 5, False).status == "missed"


@pytest.mark.parametrize(("steps", "skipped"), [(50, 30), (30, 18), (10, 6)])
def test_masks_skip_the_share_they_say(scripts, steps: int, skipped: int) -> None:
    """Three in five; the first tenth, two at least, and the last step are computed."""
    mask = scripts.runs.make_mask(steps)
    assert len(mask) == steps and mask.count("R") == skipped
    assert mask.startswith("C" * max(2, steps // 10)) and mask.endswith("C")


def test_kernels_belong_to_the_step_between_two_markers(scripts) -> None:
    """What is before the first marker and behind the last one belongs to no step."""
    kernels = [
        (0, 1, "a"),
        (2, 3, "mark"),
        (4, 6, "a"),
        (7, 8, "b"),
        (9, 9, "mark"),
        (10, 12, "a"),
        (13, 14, "mark"),
        (15, 16, "c"),
    ]
    assert scripts.runs.split_steps(kernels, {"mark"}, 2) == [[(4, 6), (7, 8)], [(10, 12)]]
    with pytest.raises(RuntimeError, match="saw 3 markers, 4"):
        scripts.runs.split_steps(kernels, {"mark"}, 3)


def test_idle_time_is_what_no_kernel_covers(scripts) -> None:
    """Kernels that overlap or lie inside of others leave no gap: 0-4, 6-7 and 9-10 leave 4."""
    assert scripts.runs.idle([(0, 4), (1, 2), (3, 4), (6, 7), (9, 10)]) == 4
    assert scripts.runs.idle([]) == 0


def test_plans_keep_to_the_time(scripts) -> None:
    """Fewer steps before fewer blocks, and nothing where even the least takes too long."""
    plan = scripts.tasks.plan_whole
    assert plan(50, 1000.0, 1.0, 0.1) == (1.0, 50)  # 50 + 20 full steps and 30 skipped: 73 s
    assert plan(50, 250.0, 15.0, 0.1) == (1.0, 10)  # 14 full steps: 210 s
    assert plan(50, 130.0, 15.0, 0.1)[0] == 0.5
    assert plan(50, 1.0, 15.0, 0.1) is None
    assert scripts.tasks.plan_share(1000.0, 1.0, 0.1, 7) == 1.0
    assert scripts.tasks.plan_share(200.0, 15.0, 0.1, 7) == 0.125


@pytest.mark.parametrize("name", MODELS)
def test_the_full_models_have_the_sizes_of_the_operators(scripts, name: str) -> None:
    """The tokens that enter block 0 are those that the operator benchmarks work on; no memory."""
    model, meta = scripts.models.FULL[name], torch.device("meta")
    transformer = scripts.models.build_transformer(model, meta, torch.bfloat16)
    seen: list[torch.Size] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape)

    block, _ = scripts.caches.family_of(transformer).blocks(transformer)[0]
    block.register_forward_pre_hook(note, with_kwargs=True)
    size = scripts.workloads.SIZES[name]
    assert model.text[0] == size.text_tokens
    with scripts.caches.shortened(transformer, 0), torch.no_grad():
        transformer(**_meta_inputs(model, size.shape[1]))
    assert seen == [torch.Size(size.shape)]


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
    if model.name == "hunyuan-video":
        inputs |= {"encoder_attention_mask": empty(1, model.text[0])}
    return inputs
