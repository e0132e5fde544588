"""The schedule plot: what the cache decided in every step of a run, and on which evidence.

One row of panels a context (branch) of the run, and a sample where each has its own decisions: the
step's error, the accumulated error that is compared with the threshold, and the weights of the
trajectory. Colour is the step's action.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .fonts import lettering
from .stats import StepRecord

ACTION_COLORS = {"compute": "#9aa0a6", "resume": "#e8820c", "reuse": "#1f77b4"}
_ACTION_TEXTS = {
    "compute": "computed: all blocks, gate not asked",
    "resume": "resumed: probe, then the remaining blocks",
    "reuse": "reused: probe only",
}
_WEIGHT_COLORS = ("#1f77b4", "#2a9d5c", "#7b3fa0")  # of w1, w2, w3
_MOST_ROWS = 16  # of panels: a picture of a large batch would be too tall to be drawn, or read
_TITLE_LINES = 2
_STRIP = 0.07  # height of the colour strip, as a share of its panel


@dataclass(frozen=True)
class PlotRow:
    """One context of a run.

    Attributes:
        name: The context's.
        records: Its steps.
        threshold: What the accumulated error is compared with, if anything.
        error_text: What the error is.
    """

    name: str
    records: Sequence[StepRecord]
    threshold: float | None = None
    error_text: str = ""


def save_schedule_plot(path: str | os.PathLike[str], title: str, rows: Sequence[PlotRow]) -> None:
    """Draw the schedule of a cached run and write it to `path`.

    Beyond 16 branches and samples the first 16 are drawn, and the title says so.

    Raises:
        ValueError: The run has no records.
    """
    rows = [each for row in rows if row.records for each in _by_sample(row)]
    if not rows:
        raise ValueError("there is no step to plot: the run has no cache statistics")
    # Characters of Chinese are about twice as wide.
    lines = textwrap.wrap(title, 100 if title.isascii() else 55)
    title = "\n".join(lines[:_TITLE_LINES]) + (" ..." if lines[_TITLE_LINES:] else "")
    if len(rows) > _MOST_ROWS:
        title += f"\nthe first {_MOST_ROWS} of {len(rows)} branches and samples"
        rows = rows[:_MOST_ROWS]
    figure = Figure(figsize=(13.0, 1.5 + 2.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for axes, row in zip(panels, rows, strict=True):
        _draw_row(axes, row)
    _label_columns(panels, rows[0])
    _draw_head(figure, title)
    figure.savefig(path, dpi=110)


def _by_sample(row: PlotRow) -> list[PlotRow]:
    """A row a sample of the batch, where each has its own decisions."""
    samples = sorted({record.sample for record in row.records if record.sample is not None})
    if not samples:
        return [row]
    of = {each: [r for r in row.records if r.sample in (None, each)] for each in samples}
    return [
        replace(row, name=f"{row.name}, sample {each}", records=mine) for each, mine in of.items()
    ]


def _draw_row(axes: Any, row: PlotRow) -> None:
    records = row.records
    counts = {action: sum(r.action == action for r in records) for action in ACTION_COLORS}
    _draw_bars(axes[0], records, [record.error for record in records])
    _draw_bars(axes[1], records, [record.accumulated_error for record in records])
    _draw_threshold(axes[1], row.threshold)
    _draw_weights(axes[2], records)
    for panel in axes:
        _draw_actions(panel, records)
    texts = (f"{counts['compute']} computed", f"{counts['resume']} resumed")
    summary = ", ".join((*texts, f"{counts['reuse']} reused"))
    text, font = lettering(f"branch {row.name!r}\n{summary}")
    axes[0].set_ylabel(text, fontproperties=FontProperties(fname=font, size=9), parse_math=False)


def _draw_bars(panel: Any, records: Sequence[StepRecord], values: list[float | None]) -> None:
    """One bar a probed step; a value that is not finite has no bar."""
    known = [(r, v) for r, v in zip(records, values, strict=True) if v is not None]
    shown = [(record, value) for record, value in known if math.isfinite(value)]
    panel.bar(
        [record.step for record, _ in shown],
        [value for _, value in shown],
        width=0.85,
        color=[ACTION_COLORS[record.action] for record, _ in shown],
    )
    if not shown:
        _say(panel, "no error is finite" if known else "no step was probed")


def _draw_threshold(panel: Any, threshold: float | None) -> None:
    if threshold is None or not math.isfinite(threshold):
        return
    color, style = "#c02020", "--"
    line = panel.axhline(threshold, color=color, linestyle=style, linewidth=1.3)
    panel.legend(
        [line],
        [f"threshold {threshold:g}"],
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - _STRIP),
        frameon=False,
        labelcolor=color,
        fontsize=9,
    )


def _draw_weights(panel: Any, records: Sequence[StepRecord]) -> None:
    """gamma of reused steps, or the calibrated weights of those that a profile filled in."""
    gammas = [(record.step, record.gamma) for record in records if record.gamma is not None]
    calibrated = [(record.step, record.weights) for record in records if record.weights is not None]
    if not gammas and not calibrated:
        _say(panel, "no step was reused")
        return
    panel.axhline(1.0, color="#bbbbbb", linewidth=1.0, zorder=0)
    _draw_dots(panel, gammas, ACTION_COLORS["reuse"])
    if not calibrated:
        return
    for place, color in enumerate(_WEIGHT_COLORS):
        dots = [(step, weights[place]) for step, weights in calibrated]
        _draw_dots(panel, dots, color, f"w{place + 1}")
    panel.legend(
        loc="upper left", bbox_to_anchor=(0.0, 1 - _STRIP), ncols=3, frameon=False, fontsize=9
    )


def _say(panel: Any, text: str) -> None:
    """In a panel that has nothing to show; the axis of such a one means nothing."""
    panel.set_yticks([])
    panel.text(0.5, 0.45, text, transform=panel.transAxes, ha="center", color="#555555")


def _draw_dots(
    panel: Any, dots: Sequence[tuple[int, float]], color: str, label: str | None = None
) -> None:
    steps, values = [step for step, _ in dots], [value for _, value in dots]
    panel.scatter(steps, values, s=22, color=color, label=label)


def _draw_actions(panel: Any, records: Sequence[StepRecord]) -> None:
    """A strip along the panel's top with the action of every step, above the data."""
    last = max(record.step for record in records)
    low, high = panel.get_ylim()
    panel.set_ylim(low, low + (high - low) * 1.15 / (1 - _STRIP))
    panel.set_xlim(-0.9, last + 0.9)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    for record in records:
        color = ACTION_COLORS[record.action]
        left, right = record.step - 0.45, record.step + 0.45
        panel.axvspan(left, right, 1 - _STRIP, 1.0, color=color, linewidth=0)
    panel.spines[["top", "right"]].set_visible(False)


def _label_columns(panels: Any, row: PlotRow) -> None:
    titles = (
        f"error of the step\n{row.error_text}",
        "accumulated error since the last computed step\nreused while below the threshold",
        "gamma of reused steps, or w1, w2, w3 of a profile\n"
        "1 repeats the newest residual, more extrapolates",
    )
    for panel, text in zip(panels[0], titles, strict=True):
        panel.set_title(text, fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("denoising step")


def _draw_head(figure: Figure, title: str) -> None:
    text, font = lettering(title, bold=True)
    properties = FontProperties(fname=font, size=13)
    figure.suptitle(text, fontproperties=properties, parse_math=False)  # "$" of a prompt
    patches = [Patch(color=ACTION_COLORS[a], label=text) for a, text in _ACTION_TEXTS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
