"""Tables of the documentation that are made of files: `make families` writes them.

A page has a place for one between `<!-- table NAME -->` and `<!-- end -->`. Figures are those of
benchmarks/results/, families those of `dicache info --families`.

    python docs/tables.py           # write
    python docs/tables.py --check   # say whether they are right
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from dicache.bench.results import Point, Result, Spread, at_cost
from dicache.cli.families import THRESHOLD, cell, columns, rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BENCH = RESULTS / "bench"
MODELS = {"flux": "Flux", "hunyuan-video": "HunyuanVideo", "wan": "Wan"}
SIBLING = 1  # costs are those of the real model's depth
NAMES = {  # how tables call a method: its name in the files, {} being the family's preset
    "calibrated, `target_speedup=...`": "calibrated",
    "calibrated weights, the default's gate": "calibrated weights, default's gate",
    "`DiCacheConfig()`": "DiCacheConfig()",
    "published preset": "preset {}",
    "diffusers SeaCache": "SeaCache",
    "diffusers SeaCache, unlimited": "SeaCache, no limit of consecutive reuse",
    "diffusers TaylorSeer, lite": "TaylorSeer lite, order 1",
    "cache-dit F1B0 with TaylorSeer": "cache-dit F1B0 with TaylorSeer",
    "cache-dit F1B0": "cache-dit F1B0",
    "diffusers FirstBlockCache": "FirstBlockCache",
    "TeaCache's rule, no polynomial": "TeaCache's rule, no polynomial",
    "diffusers MagCache, calibrated": "MagCache, no limit, a tenth retained",
    "fewer steps": "fewer steps",
}
PRESETS = {"flux": "flux", "hunyuan-video": "hunyuan-video", "wan": "wan2.1"}
SETTINGS = {
    "`DiCacheConfig()`": "`threshold`",
    "published preset": "`threshold`",
    "diffusers FirstBlockCache": "`threshold`",
    "diffusers SeaCache, unlimited": "`threshold`",
    "diffusers MagCache, calibrated": "`threshold`",
    "cache-dit F1B0": "`residual_diff_threshold`",
    "cache-dit F1B0 with TaylorSeer": "`residual_diff_threshold`",
    "TeaCache's rule, no polynomial": "`rel_l1_thresh`",
}
LEFT_OUT = ("cache-dit F1B0", "TeaCache's rule, no polynomial", "diffusers MagCache, calibrated")
SIZES = {"flux": "FLUX 1024x1024", "wan": "Wan 2.1-1.3B 480p"}
IMPLEMENTATIONS = {
    "cpp": "dicache, 2 operators, 9 passes",
    "published": "published sequence, eager: 28 operators, 48 passes",
    "reference": "dicache's reference, eager",
    "torch.compile": "the reference under torch.compile",
}
SHORT = tuple(name for name in NAMES if name not in LEFT_OUT)


def results() -> dict[str, Result]:
    """The comparisons that are kept, by model."""
    return {model: Result.load(BENCH / f"{model}.json") for model in MODELS}


def compared(names: tuple[str, ...]) -> str:
    """Likeness at equal cost, a column a model and cost, the best mean of each in bold."""
    found, heads, cells = results(), [], []
    for model, title in MODELS.items():
        for target in (2, 3):
            heads.append(f"{title} {target}x")
            cells.append(_column(found[model], names, target))
    lines = [[name, *each] for name, *each in zip(names, *cells, strict=True)]
    runs = [f"{MODELS[each.model]} {each.steps} and {each.seeds[1]}" for each in found.values()]
    return f"{_table([''] + heads, lines)}\n\nSteps and samples: {', '.join(runs)}."


def on_flux() -> str:
    """All methods on Flux, a column a cost."""
    flux = results()["flux"]
    cells = [_column(flux, tuple(NAMES), target) for target in flux.targets]
    heads = ["", *(f"{target:g}x" for target in flux.targets)]
    return _table(heads, [[name, *each] for name, *each in zip(NAMES, *cells, strict=True)])


def thresholds(model: str) -> str:
    """What every threshold that was tried gives with the default rules, below a heading."""
    result = results()[model]
    title = f"### {MODELS[model]}, {result.steps} steps, {result.seeds[1]} samples"
    heads = ["threshold", f"block work, {result.depths[0]} blocks"]
    heads += [f"{result.depths[SIBLING]} blocks ({result.sibling})", "PSNR, dB", "tenth", "worst"]
    lines = []
    for point in sorted(result.curves["DiCacheConfig()"], key=lambda each: each.setting):
        costs = [f"{cost:.2f}x" for cost in point.cost]
        lines.append([f"{point.setting:g}", *costs, *(f"{v:.1f}" for v in point.spread("psnr"))])
    return f"{title}\n\n{_table(heads, lines)}"


def settings() -> str:
    """The settings by which methods cost the same on Flux, for translating one into another."""
    flux = results()["flux"]
    targets = [target for target in flux.targets if target < 4]
    lines = []
    for name, call in SETTINGS.items():
        points = flux.curves[NAMES[name].format(PRESETS["flux"])]
        found = [_setting_at(points, target) for target in targets]
        lines.append([name, call, *(f"{each:.2g}" if each else "not reached" for each in found)])
    return _table(["", "setting", *(f"{target:g}x" for target in targets)], lines)


def families() -> str:
    """How many families of each framework a test shows a feature for."""
    lines = []
    for title, known in columns().items():
        names = [row.name for row in rows()[title]]
        shown = {
            name: sum(cell(name, column, family) == "yes" for family in names)
            for name, column in known.items()
            if name != THRESHOLD
        }
        features = ", ".join(f"{name} {count}" for name, count in shown.items() if count)
        lines.append([title, str(len(names)), features])
    return _table(["", "families", "of which a test shows"], lines)


def operators() -> str:
    """What a skipped step takes outside of its probe block on a CPU, published rules."""
    rows = json.loads((RESULTS / "operators_cpu.json").read_text())["rows"]
    times = {
        (row["size"], row["implementation"]): row["microseconds"] / 1e3
        for row in rows
        if row["operation"] == "skipped_step"
    }
    lines = []
    for name, title in IMPLEMENTATIONS.items():
        found = [(times.get((size, name)), times[size, "cpp"]) for size in SIZES]
        lines.append(
            [title, *("not measured" if t is None else _times(t, ours) for t, ours in found)]
        )
    return _table(["", *SIZES.values()], lines)


def targets() -> str:
    """What the shipped profiles' plans promise and keep; a plan once, at its first target."""
    heads = ["model", "target", "computed", "block work", "expected", "of the mean error", "mean"]
    lines = []
    for model, title in MODELS.items():
        found = json.loads((RESULTS / f"targets_{model}.json").read_text())
        about, plans = found["about"], set()
        title = f"{title}, {about['steps']} steps"
        for row in found["rows"]:
            if row["computed"] in plans:
                continue
            plans.add(row["computed"])
            ((kind, value),) = row["target"].items()
            named = f"{value} dB" if kind == "target_psnr" else f"{value:g}x"
            keys = ("expected_psnr", "psnr_of_mean_error", "mean_psnr", "worst_psnr")
            line = [title, named, str(row["computed"]), f"{row['speedup'][1]:.2f}x"]
            line += [f"{row[key]:.1f}" for key in keys]
            lines.append([*line, f"{row['reached']} of {about['samples']}"])
            title = ""
    return _table([*heads, "worst", "samples that reached what was expected"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "short": lambda: compared(SHORT),
    "full": lambda: compared(tuple(NAMES)),
    "flux": on_flux,
    "settings": settings,
    "families": families,
    "operators": operators,
    "targets": targets,
    **{f"thresholds {model}": lambda model=model: thresholds(model) for model in MODELS},
}


def written(text: str) -> str:
    """A page with its tables as they have to be."""

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]]()}\n\n<!-- end -->"

    place = r"(<!-- table ([a-z0-9 .-]+?) -->).*?<!-- end -->"
    return re.sub(place, filled, text, flags=re.DOTALL)


def pages() -> list[Path]:
    """Those that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: list[str]) -> int:
    """Write, or with --check say what is not right."""
    stale = []
    for path in pages():
        before = path.read_text()
        after = written(before)
        if after != before:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                path.write_text(after)
    if stale and "--check" in arguments:
        print(f"{', '.join(stale)}: tables are not what the files say. Run `make families`.")
        return 1
    return 0


def _column(result: Result, names: tuple[str, ...], target: float) -> list[str]:
    found: dict[str, Spread | None | str] = {}
    for name, method in NAMES.items():
        points = result.curves.get(method.format(PRESETS[result.model]))
        found[name] = at_cost(points, SIBLING, target, "psnr") if points else "not run"
    best = max(each.mean for each in found.values() if isinstance(each, Spread))
    return [_cell(found[name], best) for name in names]


def _setting_at(points: Sequence[Point], target: float) -> float | None:
    """Geometric between the two settings whose costs are around a target."""
    curve = sorted((point.cost[SIBLING], point.setting) for point in points)
    for (left, before), (right, after) in pairwise(curve):
        if left <= target <= right:
            share = (target - left) / max(right - left, 1e-9)
            return float(before * (after / before) ** share)
    return None


def _cell(spread: Spread | None | str, best: float) -> str:
    if not isinstance(spread, Spread):
        return spread or "not reached"
    mean = f"{spread.mean:.1f}"
    mean = f"**{mean}**" if mean == f"{best:.1f}" else mean
    return f"{mean} ({spread.tenth:.1f}, {spread.worst:.1f})"


def _times(milliseconds: float, ours: float) -> str:
    ratio = "" if milliseconds == ours else f", {milliseconds / ours:.1f}x"
    return f"{milliseconds:.{1 if milliseconds < 10 else 0}f} ms{ratio}"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
