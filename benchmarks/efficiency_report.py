"""The report of efficiency.py: goals, Markdown, JSON and a picture, from what the stages found.

Needs neither torch nor dicache. A time on a CPU is no figure of a GPU: its goal is "not measured".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_tables import Column, Row, facts_of_a_run, make_table, number_cell, text_cell
from stages import Outcome, results_of, verdict

EFFICIENCY_GOAL = 0.98
TENSORS_GOAL = 5

METHOD = """\
**Efficiency** = (computed steps x full step + skipped steps x ideal skipped step) / measured time:
1 is a cache that costs nothing, neither on the steps that it skips nor on those that it lets run.

- *measured time*: wall time of the denoising loop, from the first call of the transformer until the
  device has finished the last scheduler step.
- *full step*: median of the un-cached run, step end to step end, the first two steps left out. So
  guidance, the scheduler and the pipeline's own work are in it, as they are in the loop.
- *ideal skipped step*: the same median of the same pipeline while the transformer's lists of blocks
  hold the first block alone: embeddings, probe block, head, guidance and scheduler.
- *of a run of ideal steps*: a run in which the transformer has its first block alone on the skipped
  steps, over measured time. A GPU clocks lower the more it has had to do, so steps of an un-cached
  run may take longer than the same ones between skipped steps, and an ideal step alone shorter;
  these two runs load the device alike.
- *efficiency, estimated*: the formula for the mask of the whole run, the measured time being
  computed steps x *computed step* + skipped steps x *skipped step*, both medians of a short run
  (mask `{short_mask}`). Full step and ideal are then of an un-cached run beside it.

Every run has its mask forced upon it. Blocks that really ran are counted in every call, and a run
that deviates has no efficiency. diffusers' caches decide on every step, cache-dit on those that its
mask leaves open, dicache and `published` on the skipped ones: all do that work, and the outcome is
set. SeaCache runs no block on a skipped step, so it may be faster than the ideal.
`published` is the published scripts' sequence of eager operations, in its favour without the copies
that can be left out, and with one wait for the device a skipped step. Memory is the peak above
that of the un-cached run. Launches and idle time are of one more short run under torch.profiler,
which slows the host down; idle is time between a step's first and last kernel in which none runs.
"""


def efficiency(
    computed: int, skipped: int, full_ms: float, ideal_ms: float, measured_ms: float
) -> float:
    """(computed x full step + skipped x ideal skipped step) / measured time."""
    return (computed * full_ms + skipped * ideal_ms) / measured_ms


def estimate(row: Row, mask: str) -> dict[str, float]:
    """Efficiency and speed-up of a whole run with this mask, from the medians of a short one."""
    computed, skipped = mask.count("C"), mask.count("R")
    measured = computed * row["computed_ms"] + skipped * row["skipped_ms"]
    return {
        "efficiency": efficiency(computed, skipped, row["full_ms"], row["ideal_ms"], measured),
        "speed_up": len(mask) * row["full_ms"] / measured,
    }


def conclude(row: Row) -> dict[str, float]:
    """Efficiency and speed-up of a whole run, and the ideal run's share of its time."""
    mask, loops = row["mask"], row["uncached_loop_ms"]
    computed, skipped = mask.count("C"), mask.count("R")
    found = {
        "efficiency": efficiency(
            computed, skipped, row["full_ms"], row["ideal_ms"], row["loop_ms"]
        ),
        "speed_up": sum(loops) / len(loops) / row["loop_ms"],
    }
    if "ideal_loop_ms" in row:
        found["of_ideal_run"] = row["ideal_loop_ms"] / row["loop_ms"]
    return found


@dataclass(frozen=True)
class Goal:
    """A stated goal, what was measured, and whether that meets it."""

    text: str
    model: str
    measured: float | None
    wanted: float
    at_least: bool

    @property
    def status(self) -> str:
        """met, missed or not measured."""
        return verdict(self.measured, self.wanted, self.at_least)


class Findings:
    """What all stages emitted."""

    def __init__(self, outcomes: Sequence[Outcome], names: Sequence[str], tiny: bool) -> None:
        self.outcomes, self.names, self.tiny = outcomes, names, tiny

    def of_kind(self, kind: str, model: str | None = None) -> list[Row]:
        """All findings of one kind, of one model or of all."""
        results = results_of(self.outcomes, kind)
        return [result for result in results if model in (None, result.get("model"))]

    def last(self, kind: str, model: str | None = None) -> Row:
        """The last finding of its kind, or nothing."""
        found = self.of_kind(kind, model)
        return found[-1] if found else {}

    def whole(self, model: str) -> list[Row]:
        """Whole runs; those that followed their mask have an efficiency."""
        # A run is reported again when more is known.
        rows = {row["wanted_steps"]: row for row in self.of_kind("whole", model)}.values()
        return [row if row["deviation"] else {**row, **conclude(row)} for row in rows]

    def short(self, model: str) -> list[Row]:
        """Short runs, judged for the mask that was wanted for the whole run."""
        mask = self.last("model", model).get("mask")
        return [
            row if row["deviation"] else {**row, **estimate(row, mask)}
            for row in self.of_kind("row", model)
        ]

    def goals(self) -> list[Goal]:
        """Both goals for every model."""
        found = []
        for name in self.names:
            whole = [row for row in self.whole(name) if "efficiency" in row]
            of_default = [row for row in self.short(name) if row["implementation"] == self.main]
            tensors = [row["cache_tensors"] for row in [*whole, *of_default]]
            worst = min((row["efficiency"] for row in whole), default=None)
            found += [
                Goal(
                    f"efficiency of a whole run is {EFFICIENCY_GOAL} or more",
                    name,
                    None if self.tiny else worst,
                    EFFICIENCY_GOAL,
                    True,
                ),
                Goal(
                    f"at most {TENSORS_GOAL} cache tensors a context",
                    name,
                    max(tensors, default=None),
                    TENSORS_GOAL,
                    False,
                ),
            ]
        return found

    @property
    def main(self) -> str:
        """The implementation that DiCacheConfig() uses here."""
        return self.last("model").get("default", "")

    def unfinished(self) -> list[tuple[str, str]]:
        """Model and implementation of what was begun, and ended with its process."""
        found = []
        for row in self.of_kind("begun"):
            model, key = row["model"], row["implementation"]
            rows = [other["implementation"] for other in self.of_kind("row", model)]
            errors = [other["case"] for other in self.of_kind("error")]
            if key not in rows and f"{model}: {key}" not in errors:
                found.append((model, key))
        return found


# --- Files ---------------------------------------------------------------------------------------


def write(
    outcomes: Sequence[Outcome], names: Sequence[str], folder: Path, command: str, tiny: bool
) -> None:
    """efficiency.log, .json, .md and .png; all of them again after every stage."""
    logs = [f"===== {o.name}: {o.status}, {o.seconds:.0f} s =====\n{o.log}" for o in outcomes]
    # First, because every finding is in it, whatever becomes of the rest.
    (folder / "efficiency.log").write_text("\n".join(logs) + "\n")
    findings = Findings(outcomes, names, tiny)
    (folder / "efficiency.json").write_text(json.dumps(_json(findings, command), indent=1) + "\n")
    (folder / "efficiency.md").write_text(_markdown(findings, command))
    _plot(findings, folder / "efficiency.png")


def _json(findings: Findings, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "tiny": findings.tiny,
        "facts": findings.last("facts").get("facts", {}),
        "versions": findings.last("versions").get("versions", {}),
        "backends": findings.last("backends").get("status", {}),
        "stages": [
            {"name": o.name, "status": o.status, "seconds": round(o.seconds, 1)}
            for o in findings.outcomes
        ],
        "goals": [
            {
                "goal": goal.text,
                "model": goal.model,
                "wanted": goal.wanted,
                "measured": goal.measured,
                "status": goal.status,
            }
            for goal in findings.goals()
        ],
        "models": findings.of_kind("model"),
        "ideal": findings.of_kind("ideal"),
        "whole": [row for name in findings.names for row in findings.whole(name)],
        "short": [row for name in findings.names for row in findings.short(name)],
        "absent": findings.of_kind("absent"),
        "graphs": findings.of_kind("graph"),
        "compiled": findings.of_kind("compiled"),
        "errors": findings.of_kind("error"),
        "unfinished": findings.unfinished(),
        "left_out": findings.of_kind("left out"),
    }


# --- Markdown ------------------------------------------------------------------------------------


def _markdown(findings: Findings, command: str) -> str:
    title = "# How close a cached run is to the ideal"
    if findings.tiny:
        title = "# Dry run on a CPU: tiny models, and no figure of a GPU"
    short_mask = findings.last("model").get("short_mask", "none was run")
    parts = [
        title,
        _facts(findings, command),
        "## Goals\n\n" + _goals(findings),
        *(_model(findings, name) for name in findings.names),
        _explored(findings),
        "## What is measured\n\n" + METHOD.format(short_mask=short_mask),
        _troubles(findings),
        "## Stages\n\n" + _stages(findings),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _facts(findings: Findings, command: str) -> str:
    facts = findings.last("facts").get("facts", {})
    model = findings.last("model")
    versions = findings.last("versions").get("versions", {})
    versions |= {key: model[key] for key in ("diffusers", "cache_dit") if key in model}
    status = findings.last("backends").get("status", {})
    return facts_of_a_run(command, facts, versions, status)


def _goals(findings: Findings) -> str:
    lines = ["| goal | model | measured | |", "|---|---|--:|---|"]
    for goal in findings.goals():
        measured = "" if goal.measured is None else f"{goal.measured:.4g}"
        status = "**missed**" if goal.status == "missed" else goal.status
        lines.append(f"| {goal.text} | {goal.model} | {measured} | {status} |")
    return "\n".join(lines)


def _peak(row: Row) -> str:
    extra = row.get("extra_peak_bytes")
    return "not measured" if extra is None else f"{extra / 2**20:.0f}"


_STEPS: tuple[Column, ...] = (
    ("full step, ms", number_cell("full_ms", 2)),
    ("computed step, ms", number_cell("computed_ms", 2)),
    ("ideal skipped, ms", number_cell("ideal_ms", 2)),
    ("skipped step, ms", number_cell("skipped_ms", 2)),
    ("skipped - ideal, ms", lambda row: f"{row['skipped_ms'] - row['ideal_ms']:.2f}"),
)
_MEMORY: tuple[Column, ...] = (
    ("extra peak, MiB", _peak),
    ("cache tensors a context", number_cell("cache_tensors", 0)),
    ("cache a context, MiB", number_cell("cache_bytes", 2, scale=2**-20)),
)


def _whole_columns() -> tuple[Column, ...]:
    return (
        ("implementation", text_cell("implementation")),
        ("steps", lambda row: str(len(row["mask"]))),
        ("skipped", lambda row: str(row["mask"].count("R"))),
        ("blocks", text_cell("blocks")),
        (
            "un-cached, s",
            lambda row: ", ".join(f"{ms / 1e3:.2f}" for ms in row["uncached_loop_ms"]),
        ),
        ("cached, s", number_cell("loop_ms", 2, scale=1e-3)),
        ("speed-up", number_cell("speed_up", 3)),
        ("**efficiency, measured**", number_cell("efficiency", 4)),
        ("of a run of ideal steps", number_cell("of_ideal_run", 4)),
        *_STEPS,
        *_MEMORY,
    )


def _short_columns(tiny: bool) -> tuple[Column, ...]:
    costs: tuple[Column, ...] = (
        ("launches in a skipped step", number_cell("launches", 0)),
        ("idle in a skipped step, ms", number_cell("idle_ms", 3)),
    )
    if tiny:
        costs = (("operators in a skipped step", number_cell("operators", 0)),)
    return (
        ("implementation", text_cell("implementation")),
        ("followed the mask", lambda row: "**no**" if row["deviation"] else "yes"),
        ("blocks", text_cell("blocks")),
        ("blocks in a skipped call", text_cell("blocks_in_a_skipped_call")),
        *_STEPS,
        ("efficiency, estimated", number_cell("efficiency", 4)),
        ("speed-up, estimated", number_cell("speed_up", 3)),
        *costs,
        *_MEMORY,
    )


def _model(findings: Findings, name: str) -> str:
    model = findings.last("model", name)
    if not model:
        return f"## {name}\n\nNothing was measured."
    contexts = "one context" if model["contexts"] == 1 else f"{model['contexts']} contexts"
    parts = [
        f"## {model['title']}",
        f"{model['blocks']} blocks, {contexts} a step, {model['dtype']}, random weights; "
        f"{model['device']}.",
        _whole(findings, name, model),
        "### Every implementation, from short runs",
        _short(findings, name, model),
    ]
    return "\n\n".join(part for part in parts if part)


def _whole(findings: Findings, name: str, model: Row) -> str:
    rows = findings.whole(name)
    if not rows:
        return "### Whole runs\n\nNot measured."
    lines = [f"- {len(row['mask'])} steps: `{row['mask']}`" for row in rows]
    for row in rows:
        if len(row["mask"]) != row["wanted_steps"]:
            lines.append(
                f"- **{len(row['mask'])} of {row['wanted_steps']} steps**, to fit into the time"
            )
        if row["blocks"] != model["blocks"]:
            lines.append(
                f"- **{row['blocks']} of {model['blocks']} blocks**, to fit into the time; what a "
                f"cache adds weighs more in a shorter model"
            )
        if row["deviation"]:
            lines.append(f"- **did not follow the mask**: {row['deviation']}")
    return "### Whole runs\n\n" + make_table(_whole_columns(), rows) + "\n\n" + "\n".join(lines)


def _short(findings: Findings, name: str, model: Row) -> str:
    rows, ideal = findings.short(name), findings.last("ideal", name)
    missing = [*findings.of_kind("absent", name), *findings.of_kind("left out", name)]
    lines = [f"- not run: {row['implementation']} ({row['reason']})" for row in missing]
    lines += [
        f"- {row['implementation']} did not follow the mask: {row['deviation']}"
        for row in rows
        if row["deviation"]
    ]
    costs = [
        text.format(ideal[key])
        for key, text in (
            ("operators", "{:.0f} operators"),
            ("launches", "{:.0f} launches"),
            ("idle_ms", "{:.3f} ms idle"),
        )
        if key in ideal
    ]
    if costs:
        lines.append(f"- the ideal skipped step has {', '.join(costs)}")
    if any(row["blocks"] != model["blocks"] for row in rows):
        lines.append(
            f"- short runs with {rows[0]['blocks']} of {model['blocks']} blocks, to fit into the "
            f"time: their efficiencies are lower than those of the whole model"
        )
    table = make_table(_short_columns(findings.tiny), rows) if rows else "Not measured."
    return table + ("\n\n" + "\n".join(lines) if lines else "")


def _explored(findings: Findings) -> str:
    graphs = {row["model"]: row for row in findings.of_kind("graph")}.values()
    compiled = {row["model"]: row for row in findings.of_kind("compiled")}.values()
    parts = []
    if graphs:
        columns: tuple[Column, ...] = (
            ("model", text_cell("model")),
            ("eager, GPU ms", number_cell("eager_ms", 3)),
            ("eager, host ms", number_cell("eager_host_ms", 3)),
            ("launches", number_cell("launches", 0)),
            ("graph, GPU ms", number_cell("graph_ms", 3)),
            ("graph, host ms", number_cell("graph_host_ms", 3)),
        )
        parts.append("### The probe block as a CUDA graph\n\n" + make_table(columns, list(graphs)))
    if compiled:
        columns = (
            ("model", text_cell("model")),
            ("blocks", text_cell("blocks")),
            ("full step, eager, ms", number_cell("eager_full_ms", 2)),
            ("full step, compiled, ms", number_cell("full_ms", 2)),
            ("computed step, ms", number_cell("computed_ms", 2)),
            ("ideal skipped, ms", number_cell("ideal_ms", 2)),
            ("skipped step, ms", number_cell("skipped_ms", 2)),
            ("efficiency, estimated", number_cell("efficiency", 4)),
            ("compiling, s", number_cell("compile_seconds", 0)),
        )
        rows = [_judged(findings, row) for row in compiled]
        names = sorted({row["implementation"] for row in rows if "implementation" in row})
        text = "Blocks under `compile_repeated_blocks(fullgraph=True)`"
        text += f", and {', '.join(names)} on them." if names else "."
        parts.append("### Compiled blocks\n\n" + text + "\n\n" + make_table(columns, rows))
    return "## Explored\n\n" + "\n\n".join(parts) if parts else ""


def _judged(findings: Findings, row: Row) -> Row:
    mask = findings.last("model", row["model"]).get("mask")
    return {**row, **estimate(row, mask)} if mask and "skipped_ms" in row else row


def _troubles(findings: Findings) -> str:
    lines = [f"- {row['case']}: {row['error']}" for row in findings.of_kind("error")]
    lines += [f"- {model}: {key}: its process ended" for model, key in findings.unfinished()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _stages(findings: Findings) -> str:
    lines = ["| stage | outcome | s |", "|---|---|--:|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} |" for o in findings.outcomes]
    return "\n".join(lines)


# --- Picture -------------------------------------------------------------------------------------


def _plot(findings: Findings, path: Path) -> None:
    """A skipped step of every implementation: the ideal, and what comes on top of it."""
    models = [name for name in findings.names if findings.of_kind("row", name)]
    try:
        import matplotlib
    except ImportError:
        return
    if not models:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(models), figsize=(5.5 * len(models), 4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], models, strict=True):
        _plot_model(axis, findings.last("model", name)["title"], findings.of_kind("row", name))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    device = findings.last("model", models[0])["device"]
    figure.suptitle(f"{'Dry run: ' if findings.tiny else ''}a skipped step, {device}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _plot_model(axis: Any, title: str, rows: Sequence[Row]) -> None:
    names = [row["implementation"] for row in rows]
    ideal, skipped = ([row[key] for row in rows] for key in ("ideal_ms", "skipped_ms"))
    within = [min(pair) for pair in zip(ideal, skipped, strict=True)]
    above = [time - part for time, part in zip(skipped, within, strict=True)]
    axis.barh(names, within, color="C0", label="embeddings, probe block, head, scheduler")
    axis.barh(names, above, left=within, color="C1", label="what the cache adds")
    axis.axvline(ideal[0], color="black", linestyle=":", label="ideal")
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    axis.set_title(title, fontsize=10)
