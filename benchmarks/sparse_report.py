"""The report of sparse.py: composed runs, goals, Markdown and JSON, from what the stages found.

Needs neither torch nor dicache. A time on a CPU is no figure of a GPU: its goal is "not measured".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_tables import Column, Row, facts_of_a_run, make_table, number_cell, text_cell
from stages import Outcome, results_of, verdict

Kind = tuple[str, str]  # the short run that has such a step, and its letter there

RUNS = ("dense", "sparse", "DiCache", "both")
WHOLE = "sparse: all"
GOAL_DENSITY = 0.25
ATTENTION_GOAL = 2.5
BOTH_GOAL = 3.3
STEP_NAMES: dict[Kind, str] = {
    ("dense", "C"): "dense",
    ("sparse", "C"): "sparse",
    ("DiCache", "C"): "dense, recorded",
    ("both", "C"): "sparse, recorded",
    ("DiCache", "R"): "reused after dense",
    ("both", "R"): "reused after sparse",
}

METHOD = """\
- **Dense** is `scaled_dot_product_attention` restricted to flash attention, with no mask. diffusers
  gives HunyuanVideo a mask of the text's padding, which keeps flash attention away; the prompt here
  has no padding, so it is left out. *dense, masked* is a block as diffusers runs it.
- **Sparse: all** is what a sparse layer does in place of dense attention: profiling of the heads,
  layout there and back, flex_attention in the band. The plan is made once for a prompt and a
  resolution. The parts are timed alone, too; *flex_attention, layout* and the layout's own rows
  have every other head as a temporal one. Queries, keys and values are normal random numbers, so
  how many heads are temporal in *sparse: all* is chance.
- **Ideal** is 1 / the share of elements that the mask keeps, the ratio of FLOPs; *blocks* is the
  share of blocks that the kernel has to visit.
- Times are of single calls between CUDA events (on a CPU by its clock), behind some to warm up.
  Ratios are to the median of the dense row of the same process. Memory is the peak above the
  inputs; that of steps is above the weights.
- **No time without a right result**: some rows of sparse attention are compared with plain
  arithmetic, and the layout operators with the reference, bit by bit. In every step the blocks that
  ran and the layers whose attention was sparse are counted.
- **The four runs of 50 steps are composed, not run**: number of steps of each kind x median of that
  kind in a short run of the pipeline, eager, after steps of a shorter model have warmed it up.
  Steps with a cache are those of the cached runs, so that recording is in them. A reused step runs
  the first block alone, which Sparse VideoGen leaves dense.
- The mask is fixed: DiCache's published retention (20 %), then 30 of 50 steps reused, as in
  efficiency.py. What a threshold would reuse depends on the video.
"""


def step_kinds(run: str, mask: str, leading: int) -> Counter[Kind]:
    """How many steps of each kind a run has.

    Args:
        run: One of `RUNS`.
        mask: A letter a step: C computes, R reuses where there is a cache.
        leading: Steps at the start that keep full attention.
    """
    kinds: Counter[Kind] = Counter()
    for step, letter in enumerate(mask):
        is_sparse = run in ("sparse", "both") and step >= leading
        if run in ("DiCache", "both"):
            kinds["both" if is_sparse else "DiCache", letter] += 1
        else:
            kinds["sparse" if is_sparse else "dense", "C"] += 1
    return kinds


def compose(run: str, mask: str, leading: int, step_ms: dict[Kind, float]) -> float | None:
    """Milliseconds of a run, or `None` where a kind of step was not measured."""
    kinds = step_kinds(run, mask, leading)
    if not set(kinds) <= set(step_ms):
        return None
    return sum(count * step_ms[kind] for kind, count in kinds.items())


@dataclass(frozen=True)
class Goal:
    """A stated goal, what was measured, and whether that meets it."""

    text: str
    measured: float | None
    wanted: float

    @property
    def status(self) -> str:
        """met, missed or not measured."""
        return verdict(self.measured, self.wanted, at_least=True)


class Findings:
    """What all stages emitted."""

    def __init__(self, outcomes: Sequence[Outcome], tiny: bool) -> None:
        self.outcomes, self.tiny = outcomes, tiny

    def of_kind(self, kind: str) -> list[Row]:
        """All findings of one kind."""
        return results_of(self.outcomes, kind)

    def last(self, kind: str) -> Row:
        """The last finding of its kind, or nothing."""
        found = self.of_kind(kind)
        return found[-1] if found else {}

    def attention(self) -> list[Row]:
        """Rows of attention alone, with `over_dense` and the `ideal` of it."""
        rows = self.of_kind("attention")
        dense = _dense_ms(rows, lambda row: row["case"] == "dense flash")
        for row in rows:
            row["over_dense"] = dense / row["median_ms"] if dense else None
            row["ideal"] = 1 / row["kept"] if "kept" in row else None
        return rows

    def blocks(self) -> list[Row]:
        """Rows of single blocks, with `over_dense` of the same block and mode."""
        rows = self.of_kind("block")
        for row in rows:
            case = (row["block"], row["mode"], "dense")
            dense = _dense_ms(
                rows, lambda r, case=case: (r["block"], r["mode"], r["attention"]) == case
            )
            row["over_dense"] = dense / row["median_ms"] if dense else None
        return rows

    def step_ms(self) -> dict[Kind, float]:
        """Median time of every kind of step that was measured."""
        found = {}
        for row in self.of_kind("steps"):
            for letter, key in (("C", "computed_ms"), ("R", "reused_ms")):
                if row[key] is not None:
                    found[row["run"], letter] = row[key]
        return found

    def composed(self) -> list[Row]:
        """The four runs, with `over_dense`; without a time where a kind of step is missing."""
        schedule, step_ms = self.last("schedule"), self.step_ms()
        if not schedule:
            return []
        mask, leading = schedule["mask"], schedule["leading"]
        dense = compose("dense", mask, leading, step_ms)
        rows = []
        for run in RUNS:
            total = compose(run, mask, leading, step_ms)
            kinds = step_kinds(run, mask, leading)
            rows.append(
                {
                    "run": run,
                    "steps": {STEP_NAMES[kind]: count for kind, count in kinds.items()},
                    "seconds": None if total is None else total / 1e3,
                    "over_dense": dense / total if dense and total else None,
                }
            )
        return rows

    def goals(self) -> list[Goal]:
        """Both goals; nothing that a CPU measures is one of them."""
        ratios = [
            row["over_dense"]
            for row in self.attention()
            if (row["case"], row.get("density")) == (WHOLE, GOAL_DENSITY)
        ]
        both = [row["over_dense"] for row in self.composed() if row["run"] == "both"]
        attention, whole = (None if self.tiny or not each else each[-1] for each in (ratios, both))
        return [
            Goal(
                f"sparse attention at density {GOAL_DENSITY} is {ATTENTION_GOAL}x as fast as dense "
                f"flash attention, with profiling and layout",
                attention,
                ATTENTION_GOAL,
            ),
            Goal(
                f"a run with both is {BOTH_GOAL}x as fast as a dense one (composed)",
                whole,
                BOTH_GOAL,
            ),
        ]


def _dense_ms(rows: Sequence[Row], is_dense: Callable[[Row], bool]) -> float | None:
    return next((row["median_ms"] for row in rows if is_dense(row)), None)


# --- Files ---------------------------------------------------------------------------------------


def write(outcomes: Sequence[Outcome], folder: Path, command: str, tiny: bool) -> None:
    """sparse.log, .json and .md; all of them again after every stage."""
    logs = [f"===== {o.name}: {o.status}, {o.seconds:.0f} s =====\n{o.log}" for o in outcomes]
    # First, because every finding is in it, whatever becomes of the rest.
    (folder / "sparse.log").write_text("\n".join(logs) + "\n")
    findings = Findings(outcomes, tiny)
    (folder / "sparse.json").write_text(json.dumps(_json(findings, command), indent=1) + "\n")
    (folder / "sparse.md").write_text(_markdown(findings, command))


def _json(findings: Findings, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "tiny": findings.tiny,
        "facts": findings.last("facts").get("facts", {}),
        "versions": _versions(findings),
        "backends": findings.last("backends").get("status", {}),
        "stages": [
            {"name": o.name, "status": o.status, "seconds": round(o.seconds, 1)}
            for o in findings.outcomes
        ],
        "goals": [
            {"goal": g.text, "wanted": g.wanted, "measured": g.measured, "status": g.status}
            for g in findings.goals()
        ],
        "tokens": findings.last("tokens"),
        "attention": findings.attention(),
        "kernels": findings.of_kind("kernels"),
        "schedule": findings.last("schedule"),
        "steps": findings.of_kind("steps"),
        "composed": findings.composed(),
        "blocks": findings.blocks(),
        "errors": findings.of_kind("error"),
        "left_out": findings.of_kind("left out"),
    }


def _versions(findings: Findings) -> dict[str, str]:
    """Of the rows, which name diffusers as well; else what the first stage said."""
    found = {**findings.last("versions").get("versions", {})}
    for kind in ("tokens", "schedule", "block"):
        found |= findings.last(kind).get("versions", {})
    return found


# --- Markdown ------------------------------------------------------------------------------------


def _markdown(findings: Findings, command: str) -> str:
    title = "# Sparse VideoGen on HunyuanVideo, alone and with DiCache"
    if findings.tiny:
        title = "# Dry run on a CPU: a tiny size, and no figure of a GPU"
    parts = [
        title,
        _facts(findings, command),
        "## Goals\n\n" + _goals(findings),
        "## Attention alone\n\n" + _attention(findings),
        "## Runs of 50 steps, composed\n\n" + _composed(findings),
        "## One block of each kind\n\n" + _blocks(findings),
        "## What is measured\n\n" + METHOD,
        _troubles(findings),
        "## Stages\n\n" + _stages(findings),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _facts(findings: Findings, command: str) -> str:
    facts = findings.last("facts").get("facts", {})
    status = findings.last("backends").get("status", {})
    return facts_of_a_run(command, facts, _versions(findings), status)


def _goals(findings: Findings) -> str:
    lines = ["| goal | measured | |", "|---|--:|---|"]
    for goal in findings.goals():
        measured = "" if goal.measured is None else f"{goal.measured:.3g}x"
        status = "**missed**" if goal.status == "missed" else goal.status
        lines.append(f"| {goal.text} | {measured} | {status} |")
    return "\n".join(lines)


_TIMES: tuple[Column, ...] = (
    ("fastest, ms", number_cell("fastest_ms")),
    ("median, ms", number_cell("median_ms")),
    ("calls", text_cell("samples")),
    ("over dense", number_cell("over_dense", 2, "x")),
)
_PEAK: Column = ("peak, MiB", number_cell("peak_bytes", 0, "", 2**-20))


def _measured_on(row: Row) -> str:
    return f"{row['device']}, torch {row['versions']['torch']}"


def _attention(findings: Findings) -> str:
    rows = findings.attention()
    if not rows:
        return "Not measured."
    tokens = findings.last("tokens")
    _, length, heads, width = tokens["shape"]
    grid = " x ".join(map(str, tokens["video"]))
    columns: tuple[Column, ...] = (
        ("case", text_cell("case")),
        ("density", number_cell("density")),
        *_TIMES,
        ("ideal", number_cell("ideal", 2, "x")),
        ("blocks", number_cell("kept_blocks", 1, " %", 100)),
        ("temporal heads", text_cell("temporal_heads")),
        _PEAK,
    )
    lines = [
        f"{length:,} tokens ({grid} of video, {tokens['text']} of text), {heads} heads of {width}; "
        f"{_measured_on(rows[0])}.",
        "",
        make_table(columns, rows),
        "",
    ]
    lines += _against_fastest(rows)
    lines += [f"- {row['case']} ran `{row['operator']}`" for row in rows if "operator" in row]
    lines += [f"- {r['case']} ran `{'`, `'.join(r['names'])}`" for r in findings.of_kind("kernels")]
    return "\n".join(lines)


def _against_fastest(rows: Sequence[Row]) -> list[str]:
    """The goal's ratio to another dense kernel, where one was faster than flash attention."""
    dense = min(
        (row for row in rows if row["case"].startswith("dense")),
        key=lambda row: row["median_ms"],
        default=None,
    )
    if dense is None or dense["case"] == "dense flash":
        return []
    return [
        f"- {dense['case']} was the fastest dense attention here: sparse attention at density "
        f"{row['density']} is {dense['median_ms'] / row['median_ms']:.2f}x as fast as that"
        for row in rows
        if row["case"] == WHOLE
    ]


def _composed(findings: Findings) -> str:
    rows, schedule = findings.composed(), findings.last("schedule")
    if not rows:
        return "Not measured."
    short, blocks = findings.of_kind("steps"), schedule["blocks"]
    columns: tuple[Column, ...] = (
        ("run", text_cell("run")),
        ("steps", lambda row: " + ".join(f"{n} x {name}" for name, n in row["steps"].items())),
        ("composed, s", number_cell("seconds")),
        ("over dense", number_cell("over_dense", 2, "x")),
    )
    of_steps: tuple[Column, ...] = (
        ("short run", text_cell("run")),
        ("mask", text_cell("mask")),
        ("computed step, ms", number_cell("computed_ms")),
        ("reused step, ms", number_cell("reused_ms")),
        ("all steps, ms", lambda row: ", ".join(f"{ms:.0f}" for ms in row["step_ms"])),
        ("blocks", text_cell("blocks")),
        _PEAK,
    )
    lines = [
        f"{schedule['title']}, density {schedule['density']}, {_measured_on(schedule)}. Mask "
        f"`{schedule['mask']}`; with sparse attention the first {schedule['leading']} steps are "
        f"dense.",
        "",
        make_table(columns, rows),
        "",
        make_table(of_steps, short) if short else "No step was measured.",
    ]
    fewer = sorted({row["blocks"] for row in short} - {blocks})
    if fewer:
        lines += [
            "",
            f"- **{fewer[0]} of {blocks} blocks**, to fit into the time; what every step has to do "
            f"weighs more in a shorter model, so ratios are lower than those of the whole one",
        ]
    return "\n".join(lines)


def _blocks(findings: Findings) -> str:
    rows = findings.blocks()
    if not rows:
        return "Not measured."
    columns: tuple[Column, ...] = (
        ("block", text_cell("block")),
        ("mode", text_cell("mode")),
        ("attention", text_cell("attention")),
        ("density", number_cell("density")),
        *_TIMES,
        _PEAK,
    )
    return f"{_measured_on(rows[0])}.\n\n{make_table(columns, rows)}"


def _troubles(findings: Findings) -> str:
    lines = [f"- {row['case']}: {row['error']}" for row in findings.of_kind("error")]
    lines += [f"- {row['case']}: {row['reason']}" for row in findings.of_kind("left out")]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _stages(findings: Findings) -> str:
    lines = ["| stage | outcome | s |", "|---|---|--:|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} |" for o in findings.outcomes]
    return "\n".join(lines)
