"""The report of gpu.py: every table as data, its kind of rows and its columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from findings import Findings
from stages import Finding, Outcome

Column = tuple[str, Callable[[Finding], str]]


def number(key: str, digits: int = 2, unit: str = "", scale: float = 1.0) -> Callable:
    """A cell with a number in a unit; empty where there is none."""

    def cell(row: Finding) -> str:
        return "" if row.get(key) is None else f"{row[key] * scale:.{digits}f}{unit}"

    return cell


def text(key: str) -> Callable:
    """A cell with what is there; empty where nothing is."""
    return lambda row: str(row.get(key, ""))


def _above_ideal(row: Finding) -> str:
    skipped = row["skipped_ms"]
    return "" if skipped is None else f"{skipped - row['ideal_ms']:.2f}"


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: Its heading.
        rows: Finds them.
        columns: Titles and cells; the first one is text.
        group: What is said by a heading for several tables, one for each value.
        describe: Of a group, its heading and what stands below it.
    """

    title: str
    rows: Callable[[Findings], list[Finding]]
    columns: Sequence[Column]
    group: str | None = None
    describe: Callable[[Findings, list[Finding]], str] = lambda findings, rows: ""

    def markdown(self, findings: Findings) -> str:
        """All of it, or nothing where there is no row."""
        rows = self.rows(findings)
        if not rows:
            return ""
        parts = [f"## {self.title}"]
        for value in dict.fromkeys(row.get(self.group) for row in rows):
            chosen = [row for row in rows if row.get(self.group) == value]
            parts += [self.describe(findings, chosen), make_table(self.columns, chosen)]
        return "\n\n".join(part for part in parts if part)


def make_table(columns: Sequence[Column], rows: Sequence[Finding]) -> str:
    """A row a result; the first column is text, the others are aligned as numbers."""
    lines = ["| " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|---|" + "--:|" * (len(columns) - 1))
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines)


def _describe_size(findings: Findings, rows: list[Finding]) -> str:
    row = rows[0]
    shape = " x ".join(map(str, row["shape"]))
    return f"### {row['size']}: {shape} bfloat16; copy {row['copy_gb_per_s']:.1f} GB/s"


def _describe_model(findings: Findings, rows: list[Finding]) -> str:
    name = rows[0]["model"]
    model = next(row for row in reversed(findings.of_kind("model")) if row["model"] == name)
    lines = [
        f"### {model['title']}: {name}",
        "",
        f"{model['blocks']} blocks, {model['contexts']} contexts a step, mask `{model['mask']}`.",
    ]
    if len(model["mask"]) != model["wanted_steps"]:
        lines.append(
            f"**{len(model['mask'])} of {model['wanted_steps']} steps**, to fit into the time."
        )
    fewer = sorted({row["blocks"] for row in rows} - {model["blocks"]})
    if fewer:
        lines.append(
            f"**{fewer[0]} of {model['blocks']} blocks**, to fit into the time; what a cache adds "
            f"weighs more in a shorter model."
        )
    lines += [f"- {r['implementation']}: {r['deviation']}" for r in rows if r["deviation"]]
    return "\n".join(lines)


def _describe_attention(findings: Findings, rows: list[Finding]) -> str:
    tokens = findings.last("tokens")
    _, length, heads, width = tokens["shape"]
    grid = " x ".join(map(str, tokens["video"]))
    lines = [
        f"{length:,} tokens ({grid} of video, {tokens['text']} of text), {heads} heads of {width}.",
        *(f"- {row['row']} ran `{row['operator']}`" for row in rows if "operator" in row),
    ]
    dense = [row for row in rows if row["row"].startswith("dense")]
    fastest = min(dense, key=lambda row: row["median_ms"], default=None)
    if fastest is not None and fastest["row"] != "dense flash":
        lines.append(
            f"- {fastest['row']} was the fastest dense attention here, "
            f"{fastest['over_dense']:.2f}x as fast as flash: divide by that to compare with it"
        )
    return "\n".join(lines)


def _describe_steps(findings: Findings, rows: list[Finding]) -> str:
    plan = findings.last("schedule")
    lines = [
        f"{plan['title']}, density {plan['density']}. Mask `{plan['mask']}`; with sparse attention "
        f"the first {plan['leading']} steps are dense."
    ]
    fewer = sorted({row["blocks"] for row in findings.of_kind("steps")} - {plan["blocks"]})
    if fewer:
        lines.append(
            f"**{fewer[0]} of {plan['blocks']} blocks**, to fit into the time; what every step has "
            f"to do weighs more in a shorter model, so ratios are lower than those of the whole one"
        )
    return "\n\n".join(lines)


def _why(row: Finding) -> str:
    return str(row.get("error") or row["reason"]).partition("\n")[0]


def _counts(results: Sequence[Finding]) -> str:
    return "; ".join(result["counts"] for result in results if result["kind"] == "tests")


_PEAK = number("peak_bytes", 0, "", 2**-20)
TABLES = (
    Table(
        "Operators",
        Findings.times,
        (
            ("operation", text("operation")),
            ("implementation", text("implementation")),
            ("time, us", number("microseconds", 1)),
            ("passes", text("passes")),
            ("GB/s", number("gb_per_s", 1)),
            ("of copy", number("fraction_of_copy", 0, "%", 100)),
            ("launches", number("launches", 0)),
            ("over reference", number("over_reference", 2, "x")),
            ("over published", number("over_published", 2, "x")),
        ),
        group="size",
        describe=_describe_size,
    ),
    Table(
        "Host time of a launch",
        lambda findings: findings.of_kind("host"),
        (
            ("operation", text("operation")),
            ("implementation", text("implementation")),
            ("us", number("microseconds", 1)),
        ),
    ),
    Table(
        "How close a cached run is to the ideal",
        Findings.pipelines,
        (
            ("implementation", text("implementation")),
            ("followed the mask", lambda row: "**no**" if row["deviation"] else "yes"),
            ("steps", lambda row: str(len(row["mask"]))),
            ("blocks", text("blocks")),
            ("blocks in a skipped call", text("blocks_in_a_skipped_call")),
            ("un-cached, s", number("uncached_loop_ms", 2, "", 1e-3)),
            ("cached, s", number("loop_ms", 2, "", 1e-3)),
            ("speed-up", number("speed_up", 3)),
            ("**efficiency**", number("efficiency", 4)),
            ("of a run of ideal steps", number("of_ideal_run", 4)),
            ("full step, ms", number("full_ms")),
            ("computed step, ms", number("computed_ms")),
            ("ideal skipped, ms", number("ideal_ms")),
            ("skipped step, ms", number("skipped_ms")),
            ("skipped - ideal, ms", _above_ideal),
            ("launches in a skipped step", number("launches", 0)),
            ("extra peak, MiB", number("extra_peak_bytes", 0, "", 2**-20)),
            ("cache tensors a context", number("cache_tensors", 0)),
            ("cache a context, MiB", number("cache_bytes", 2, "", 2**-20)),
        ),
        group="model",
        describe=_describe_model,
    ),
    Table(
        "Sparse attention alone",
        Findings.attention,
        (
            ("case", text("row")),
            ("density", number("density")),
            ("fastest, ms", number("fastest_ms")),
            ("median, ms", number("median_ms")),
            ("calls", text("samples")),
            ("over dense", number("over_dense", 2, "x")),
            ("ideal", number("ideal", 2, "x")),
            ("blocks", number("kept_blocks", 1, " %", 100)),
            ("temporal heads", text("temporal_heads")),
            ("peak, MiB", _PEAK),
        ),
        describe=_describe_attention,
    ),
    Table(
        "Runs of 50 steps, dense and sparse, composed",
        Findings.composed,
        (
            ("run", text("run")),
            ("steps", text("steps")),
            ("composed, s", number("total_ms", 2, "", 1e-3)),
            ("over dense", number("over_dense", 2, "x")),
        ),
        describe=_describe_steps,
    ),
    Table(
        "The steps that they are composed of",
        lambda findings: findings.of_kind("steps"),
        (
            ("short run", text("run")),
            ("mask", text("mask")),
            ("computed step, ms", number("computed_ms")),
            ("reused step, ms", number("reused_ms")),
            ("all steps, ms", lambda row: ", ".join(f"{ms:.0f}" for ms in row["step_ms"])),
            ("blocks", text("blocks")),
            ("peak, MiB", _PEAK),
        ),
    ),
    Table(
        "Not measured",
        lambda findings: (
            findings.of_kind("error")
            + findings.of_kind("absent")
            + [{**row, "reason": "no time left"} for row in findings.of_kind("left out")]
        ),
        (("case", text("case")), ("why", _why)),
    ),
    Table(
        "Stages",
        lambda findings: [vars(outcome) for outcome in findings.outcomes],
        (
            ("stage", text("name")),
            ("outcome", text("status")),
            ("s", number("seconds", 0)),
            ("tests", lambda row: _counts(row["results"])),
        ),
    ),
)


def write(outcomes: Sequence[Outcome], folder: Path, command: str, dry: bool) -> None:
    """gpu.json and gpu.md, again after every stage."""
    stages = [{key: value for key, value in vars(o).items() if key != "log"} for o in outcomes]
    stored = {"command": command, "dry_run": dry, "stages": stages}
    # First, because every finding is in it, whatever becomes of the rest.
    (folder / "gpu.json").write_text(json.dumps(stored, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(Findings(outcomes, dry), command))


def read(folder: Path, dry: bool) -> list[Outcome]:
    """The outcomes of an earlier run, if it was of the same kind; their logs are not kept."""
    path = folder / "gpu.json"
    if not path.exists():
        return []
    stored = json.loads(path.read_text())
    return [Outcome(**stage) for stage in stored["stages"]] if stored["dry_run"] == dry else []


def markdown(findings: Findings, command: str) -> str:
    """The whole report."""
    title = "# dicache, measured"
    if findings.dry:
        title = "# Dry run on a CPU: tiny sizes, and no figure of a GPU"
    facts: Finding = {}
    for kind in ("facts", "backends"):
        facts |= findings.last(kind).get("facts", {})
    lines = [f"- {name}: {' / '.join(str(fact).splitlines())}" for name, fact in facts.items()]
    told = f"`{command}`; benchmarks/README.md says what is measured. What is empty was not."
    parts = [title, told, "\n".join(lines), _goals(findings)]
    parts += [table.markdown(findings) for table in TABLES]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _goals(findings: Findings) -> str:
    rows = [{**vars(goal), "status": goal.status} for goal in findings.goals()]
    counts = [f"{sum(row['status'] == s for row in rows)} {s}" for s in ("met", "missed")]
    shown = [row for row in rows if row["measured"] is not None]
    columns = (
        ("goal", text("text")),
        ("where", text("where")),
        ("measured", number("measured", 3)),
        ("wanted", number("wanted", 2)),
        ("", lambda row: f"**{row['status']}**" if row["status"] == "missed" else row["status"]),
    )
    told = f"{', '.join(counts)}, {len(rows) - len(shown)} not measured."
    table = make_table(columns, shown) if shown else "They are goals for a GPU."
    return f"## Goals\n\n{told}\n\n{table}"
