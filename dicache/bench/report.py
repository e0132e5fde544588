"""A result as Markdown, and as a plot of likeness over cost."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties

from dicache.fonts import lettering
from dicache.likeness import METRICS

from .results import Result, Spread, at_cost

NOTES = """\
Likeness to the un-cached pictures of the same seeds at equal cost: mean over the samples and, in
brackets, the 10th percentile and the worst one. Cost is block work un-cached over cached, probes
included, counted below every cache, one sample at a time. Each method is tuned by its one free
setting; a cell is linear in cost between the two settings around it. "up to" and "from" name the
highest and the lowest cost that was seen of a method where it does not get to the one asked for.
"""


def markdown(result: Result) -> str:
    """Tables of every metric, what failed, and how to make them again."""
    title = f"# {result.model}: {result.steps} steps, {result.seeds[1]} samples"
    parts = [title, NOTES.strip()]
    for metric in result.metrics:
        for depth in _depths(result) if metric == result.metrics[0] else _depths(result)[:1]:
            parts += [f"## {METRICS[metric][0]}, cost at {depth_name(result, depth)}"]
            parts += [_table(result, depth, metric)]
    parts += [_promises(result)] if result.promises else []
    if result.failures:
        lines = [f"- {name}: not run ({why})" for name, why in result.failures.items()]
        parts += ["\n".join(lines)]
    facts = "\n".join(f"- {name}: {value}" for name, value in result.about.items())
    first, count = result.seeds
    seeds = f"- seeds: {first} to {first + count - 1}; un-cached {result.seconds:.2f} s a sample"
    return "\n\n".join([*parts, f"{facts}\n{seeds}"]) + "\n"


def rows(result: Result, depth: int, metric: str) -> list[tuple[str, list[str]]]:
    """A table's methods with their cells; the best mean of a column is bold."""
    sign = 1 if METRICS[metric][2] else -1
    found = {
        name: [at_cost(points, depth, target, metric) for target in result.targets]
        for name, points in result.curves.items()
    }
    columns = zip(*found.values(), strict=True)
    best = [max((sign * each.mean for each in column if each), default=None) for column in columns]
    table = []
    for name, spreads in found.items():
        cells = []
        for spread, top, target in zip(spreads, best, result.targets, strict=True):
            if spread is None:
                cells.append(_out_of_reach([p.cost[depth] for p in result.curves[name]], target))
            else:
                cells.append(_cell(spread, METRICS[metric][1], sign * spread.mean == top))
        table.append((name, cells))
    return table


def depth_name(result: Result, depth: int) -> str:
    """Where a cost is counted."""
    whose = "its own" if depth == 0 or result.sibling is None else f"{result.sibling}'s"
    return f"{whose} depth, {result.depths[depth]} blocks"


def save_plot(result: Result, path: Path) -> None:
    """Mean and worst sample over cost, a line a method; what nothing else beats is marked."""
    matplotlib.use("Agg")
    metric, depth = result.metrics[0], _depths(result)[0]
    figure, axes = plt.subplots(1, 2, figsize=(13, 7), sharey=True, layout="constrained")
    colors = matplotlib.colormaps["tab20"]
    for axis, which in zip(axes, ("mean", "worst"), strict=True):
        curves = {
            name: sorted((p.cost[depth], getattr(p.spread(metric), which)) for p in points)
            for name, points in result.curves.items()
        }
        for index, (name, curve) in enumerate(curves.items()):
            x, y = zip(*curve, strict=True)
            axis.plot(x, y, color=colors(index % 20), marker="o", markersize=3, label=name)
        front = _front([point for curve in curves.values() for point in curve])
        axis.plot(
            *zip(*front, strict=True),
            "k--",
            alpha=0.4,
            linewidth=1,
            drawstyle="steps-pre",
            label="Pareto front",
        )
        axis.set_title(f"{which} of {result.seeds[1]} samples")
        axis.set_xlabel(f"block work un-cached / cached, {depth_name(result, depth)}")
        axis.set_xlim(1.0, 1.15 * max(result.targets))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{METRICS[metric][0]}, against un-cached")
    # A user's folder may be called anything.
    text, font = lettering(f"{result.model}, {result.steps} steps")
    figure.suptitle(text, fontproperties=FontProperties(fname=font, size="large"), parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _depths(result: Result) -> list[int]:
    """The sibling's first, for which settings were searched."""
    return [0] if result.sibling is None else [1, 0]


def _table(result: Result, depth: int, metric: str) -> str:
    lines = [
        "| method | " + " | ".join(f"{target:g}x" for target in result.targets) + " |",
        "|---|" + "--:|" * len(result.targets),
    ]
    for name, cells in rows(result, depth, metric):
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _out_of_reach(costs: list[float], target: float) -> str:
    if max(costs) < target:
        return f"up to {max(costs):.2f}x"
    return f"from {min(costs):.2f}x" if min(costs) > target else "not measured"


def _cell(spread: Spread, digits: int, is_best: bool) -> str:
    mean = f"{spread.mean:.{digits}f}"
    rest = f"{spread.tenth:.{digits}f}, {spread.worst:.{digits}f}"
    return f"**{mean}** ({rest})" if is_best else f"{mean} ({rest})"


def _promises(result: Result) -> str:
    """How far costs at the model's own depth lie from what was asked for."""
    lines = []
    for name in result.promises:
        off = [point.cost[0] / point.setting - 1 for point in result.curves.get(name, ())]
        if off:
            lines.append(
                f"- {name}: at the model's own depth {min(off):+.1%} to {max(off):+.1%} off the "
                f"target_speedup, over {len(off)} settings that mean a whole number of steps."
            )
    return "\n".join(lines)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points for which no other one is both cheaper and better, by cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, reverse=True):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front[::-1]
