"""The report of gpu.py: goals, Markdown, JSON and a plot, from what the stages found out.

A goal without a measurement on a GPU is "not measured", never met.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
from report_tables import facts_of_a_run
from rows import Row
from stages import Outcome, results_of, verdict

from dicache import ops

BACKENDS = ("cuda", "triton")
COPY_GOALS = {"flux": 0.75, "wan": 0.90, "hunyuan-video": 0.90}
PUBLISHED_GOAL = 4.5
HOST_GOAL_US = 8.0


@dataclass(frozen=True)
class Goal:
    """A stated goal, what was measured, and whether that meets it."""

    text: str
    backend: str
    where: str
    measured: float | None
    wanted: float
    at_least: bool = True

    @property
    def status(self) -> str:
        """met, missed or not measured."""
        return verdict(self.measured, self.wanted, self.at_least)


class Findings:
    """What all stages emitted, by kind."""

    def __init__(self, outcomes: list[Outcome], dry: bool) -> None:
        self.outcomes, self.dry = outcomes, dry
        self.rows: list[Row] = self.of_kind("row")
        rows.add_ratios(self.rows)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All findings of one kind, without saying the kind again."""
        return results_of(self.outcomes, kind)

    def one(self, kind: str, key: str) -> dict[str, Any]:
        """The last finding of its kind, or nothing."""
        found = self.of_kind(kind)
        return found[-1][key] if found else {}

    def value(self, field: str, operation: str, backend: str, size: str) -> float | None:
        """One field of one row."""
        for row in self.rows:
            key = (row["operation"], row["implementation"], row["size"])
            if key == (operation, backend, size):
                return row[field]
        return None

    def goals(self) -> list[Goal]:
        """Every goal for every GPU backend."""
        found = []
        for backend in BACKENDS:
            found += self._copy_goals(backend)
            found += self._published_goals(backend)
            found += self._cost_goals(backend)
        return found

    def _copy_goals(self, backend: str) -> list[Goal]:
        return [
            Goal(
                f"{operator} reaches {wanted:.0%} of a copy",
                backend,
                size,
                self.value("fraction_of_copy", operator, backend, size),
                wanted,
            )
            for size, wanted in COPY_GOALS.items()
            for operator in ops.MEMORY_PASSES
        ]

    def _published_goals(self, backend: str) -> list[Goal]:
        text = f"a skipped step is {PUBLISHED_GOAL}x as fast as the published sequence"
        return [
            Goal(
                text,
                backend,
                size,
                self.value("over_published", "skipped_step", backend, size),
                PUBLISHED_GOAL,
            )
            for size in ("small", *COPY_GOALS)
        ]

    def _cost_goals(self, backend: str) -> list[Goal]:
        host = {
            row["operation"]: row["microseconds"]
            for row in self.of_kind("host")
            if row["implementation"] == backend
        }
        found = []
        for operator in ops.MEMORY_PASSES:
            launches = self.value("launches", operator, backend, "flux")
            found.append(Goal(f"{operator} is one launch", backend, "flux", launches, 1, False))
            text = f"{operator} takes less than {HOST_GOAL_US:.0f} us of host time"
            found.append(Goal(text, backend, "small", host.get(operator), HOST_GOAL_US, False))
        return found


def write(outcomes: list[Outcome], folder: Path, command: str, dry: bool) -> None:
    """gpu.json, gpu.md and gpu.log; all of them again after every stage."""
    findings = Findings(outcomes, dry)
    (folder / "gpu.json").write_text(json.dumps(_json(findings, command), indent=1) + "\n")
    (folder / "gpu.md").write_text(_markdown(findings, command))
    logs = [f"===== {o.name}: {o.status}, {o.seconds:.0f} s =====\n{o.log}" for o in outcomes]
    (folder / "gpu.log").write_text("\n".join(logs) + "\n")


def _json(findings: Findings, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "dry_run": findings.dry,
        "facts": findings.one("facts", "facts"),
        "versions": findings.one("versions", "versions"),
        "backends": findings.one("backends", "status"),
        "stages": [
            {"name": o.name, "status": o.status, "seconds": round(o.seconds, 1)}
            for o in findings.outcomes
        ],
        "goals": [
            {
                "goal": goal.text,
                "backend": goal.backend,
                "size": goal.where,
                "wanted": goal.wanted,
                "measured": goal.measured,
                "status": goal.status,
            }
            for goal in findings.goals()
        ],
        "copies": findings.of_kind("copy"),
        "rows": findings.rows,
        "host": findings.of_kind("host"),
        "bytes": findings.of_kind("bytes"),
        "tests": findings.of_kind("tests"),
        "checked": findings.of_kind("checked"),
        "exercised": findings.of_kind("exercised"),
        "errors": findings.of_kind("error"),
        "left_out": findings.of_kind("left out"),
    }


# --- Markdown ------------------------------------------------------------------------------------


def _markdown(findings: Findings, command: str) -> str:
    title = "# The operators on a GPU"
    if findings.dry:
        title = "# Dry run on a CPU: tiny sizes, and no figure of a GPU"
    parts = [
        title,
        _facts(findings, command),
        "## Stages\n\n" + _stages(findings),
        "## Goals\n\n" + _goals(findings),
    ]
    if findings.rows:
        parts += ["## Times\n\n" + rows.NOTES + "\n" + rows.markdown(findings.rows)]
    parts += [_host(findings), _bytes(findings), _troubles(findings)]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _facts(findings: Findings, command: str) -> str:
    versions, facts = findings.one("versions", "versions"), findings.one("facts", "facts")
    status = findings.one("backends", "status")
    return facts_of_a_run(command, facts, versions, status)


def _stages(findings: Findings) -> str:
    lines = ["| stage | outcome | s | found |", "|---|---|--:|---|"]
    for outcome in findings.outcomes:
        found = "; ".join(_summary(result) for result in outcome.results if _summary(result))
        lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} | {found} |")
    return "\n".join(lines)


def _summary(result: dict[str, Any]) -> str:
    if result["kind"] == "tests":
        return f"{result['backend']}: {result['counts']}"
    return f"{result['backend']} ran to its end" if result["kind"] == "exercised" else ""


def _goals(findings: Findings) -> str:
    found = findings.goals()
    missing = [goal for goal in found if goal.measured is None]
    if len(missing) == len(found):
        return f"None of the {len(found)} goals was measured: they are goals for a GPU."
    lines = [
        f"{sum(g.status == 'met' for g in found)} met, "
        f"{sum(g.status == 'missed' for g in found)} missed, {len(missing)} not measured.",
        "",
        "| goal | backend | size | measured | |",
        "|---|---|---|--:|---|",
    ]
    for goal in found:
        measured = "" if goal.measured is None else f"{goal.measured:.3g}"
        status = "**missed**" if goal.status == "missed" else goal.status
        lines.append(f"| {goal.text} | {goal.backend} | {goal.where} | {measured} | {status} |")
    return "\n".join(lines)


def _host(findings: Findings) -> str:
    host = findings.of_kind("host")
    lines = ["## Host time of a launch", "", "| operation | implementation | us |", "|---|---|--:|"]
    lines += [
        f"| {row['operation']} | {row['implementation']} | {row['microseconds']:.1f} |"
        for row in host
    ]
    return "\n".join(lines) if host else ""


def _bytes(findings: Findings) -> str:
    counted = findings.of_kind("bytes")
    lines = [
        "## Passes over memory, stated and counted",
        "",
        "By the hardware's counters of DRAM bytes at the HunyuanVideo size, in tensors of the "
        "hidden states' shape. What is still in the cache at the end is not written yet.",
        "",
        "| operation | implementation | | stated | counted |",
        "|---|---|---|--:|--:|",
    ]
    lines += [
        f"| {row['operation']} | {row['implementation']} | {row['direction']} "
        f"| {row['stated_passes']} | {row['counted_passes']:.2f} |"
        for row in counted
    ]
    return "\n".join(lines) if counted else ""


def _troubles(findings: Findings) -> str:
    lines = [f"- {row['case']}: {row['error']}" for row in findings.of_kind("error")]
    left_out = [row["case"] for row in findings.of_kind("left out")]
    if left_out:
        lines.append(f"- left out, no time left: {', '.join(left_out)}")
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


# --- Plot ----------------------------------------------------------------------------------------


def write_plot(outcomes: list[Outcome], path: Path, dry: bool) -> bool:
    """GB/s of every operator and implementation against the copy; False without matplotlib."""
    findings = Findings(outcomes, dry)
    shown = [row for row in findings.rows if row["passes"]]
    try:
        import matplotlib
    except ImportError:
        return False
    if not shown:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in shown))
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(5 * len(sizes), 5), squeeze=False, layout="constrained"
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        _plot_size(axis, [row for row in shown if row["size"] == size])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    device = shown[0]["device"]
    figure.suptitle(f"{'Dry run: ' if dry else ''}{device}, torch {rows.versions()['torch']}")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def _plot_size(axis: Any, shown: list[Row]) -> None:
    operations = list(dict.fromkeys(row["operation"] for row in shown))
    implementations = ["cuda", "triton", "cpp", "torch.compile", "reference", "published"]
    present = [name for name in implementations if any(r["implementation"] == name for r in shown)]
    width = 0.8 / len(present)
    for index, name in enumerate(present):
        chosen = [row for row in shown if row["implementation"] == name]
        places = [operations.index(row["operation"]) + index * width for row in chosen]
        color = f"C{implementations.index(name)}"
        axis.bar(places, [row["gb_per_s"] for row in chosen], width, label=name, color=color)
    axis.axhline(shown[0]["copy_gb_per_s"], color="black", linestyle=":", label="copy")
    axis.set_xticks([i + 0.4 for i in range(len(operations))], operations, rotation=30, ha="right")
    axis.set_ylabel("GB/s")
    axis.set_title(shown[0]["size"])
