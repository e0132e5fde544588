"""The figures of docs/how_it_works.md: `python docs/figures/draw.py [FOLDER]`.

Two are sketches, three show a run and the profile of the demo Flux. Texts stay texts in the files,
so that tests/test_documentation.py can compare what figures say with what a run gives.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from dicache import DiCacheConfig, Profile, RunStats, apply_dicache, get_stats
from dicache.demo.pipelines import default_prompts, load_pipeline, pipeline_inputs
from dicache.error_rules import ERROR_RULES
from dicache.profiling import expect
from dicache.schedule_plot import ACTION_COLORS, PlotRow, save_schedule_plot

HERE = Path(__file__).parent
PROFILE = HERE.parents[1] / "dicache" / "demo" / "profiles" / "flux.json"
THRESHOLD, STEPS = 0.05, 30
COMPUTED, RESUMED, REUSED = ACTION_COLORS.values()


def main(folder: Path) -> None:
    """Draw all figures into a folder."""
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "dicache"  # the same names in every file
    matplotlib.rcParams["font.family"] = "sans-serif"
    _probe(folder / "probe.svg")
    _trajectory(folder / "trajectory.svg")
    stats = _run()
    _gate(folder / "gate.svg", stats)
    rule = ERROR_RULES[DiCacheConfig().error]
    row = PlotRow("cond", stats.contexts["cond"], THRESHOLD, rule.text)
    save_schedule_plot(folder / "schedule.png", f"demo Flux, {STEPS} steps", [row])
    _plan(folder / "plan.svg")


def _run() -> RunStats:
    torch.set_num_threads(1)
    pipe = load_pipeline("flux")
    apply_dicache(pipe, DiCacheConfig(threshold=THRESHOLD))
    pipe(**pipeline_inputs("flux", default_prompts("flux")[0], 0, STEPS))
    return get_stats(pipe)["transformer"]


def _probe(path: Path) -> None:
    """The blocks of a computed and of a reused step."""
    figure, axis = _canvas(8.6, 2.9)
    for y, title, runs in (
        (1.6, "computed, or resumed behind the probe", True),
        (0.0, "reused", False),
    ):
        axis.text(0, y + 0.92, title, fontsize=10, weight="bold")
        for k in range(9):
            color = RESUMED if k == 0 else (COMPUTED if runs else "white")
            box = FancyBboxPatch((1.0 + k, y), 0.62, 0.62, boxstyle="round,pad=0.04", fc=color)
            box.set(ec="#555555", ls="-" if runs or k == 0 else ":", alpha=0.85)
            axis.add_patch(box)
            name = ("probe", "block 1", "block 2", "...")[min(k, 3)]
            axis.text(1.31 + k, y + 0.31, name, fontsize=7, ha="center", va="center")
        for x, text in ((0.5, "x"), (1.82, "p"), (10.0, "y")):
            axis.text(x, y + 0.31, text, fontsize=12, style="italic", va="center", ha="center")
    axis.annotate(
        "y = x + r_old + gamma (r_new - r_old)",
        (10.0, 0.1),
        (4.6, -0.45),
        fontsize=9,
        color=REUSED,
        ha="center",
        arrowprops={
            "arrowstyle": "->",
            "color": REUSED,
            "connectionstyle": "angle,angleA=0,angleB=90",  # below the blocks
        },
    )
    axis.set(xlim=(-0.2, 10.4), ylim=(-0.7, 2.8))
    _save(figure, path)


def _trajectory(path: Path) -> None:
    """What the last two computed steps predict of this one's probe."""
    figure, axis = _canvas(7.4, 3.3)
    old, new, now = (0.6, 0.5), (2.6, 1.1), (4.5, 2.05)
    d = (new[0] - old[0], new[1] - old[1])
    a = (now[0] - old[0], now[1] - old[1])
    gamma = (a[0] * d[0] + a[1] * d[1]) / (d[0] ** 2 + d[1] ** 2)
    foot = (old[0] + gamma * d[0], old[1] + gamma * d[1])
    for end, text, color, place in (
        (new, "d = q_new - q_old", COMPUTED, (1.2, 0.38)),
        (now, "a = q - q_old", RESUMED, (1.7, 1.5)),
    ):
        axis.annotate("", end, old, arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
        axis.text(*place, text, fontsize=10, color=color)
    axis.plot(*zip(new, foot, strict=True), color=COMPUTED, ls="--")
    axis.plot(*zip(foot, now, strict=True), color="#c02020", lw=2)
    axis.text(4.8, 1.8, "a - gamma d\nthe misfit", fontsize=10, color="#c02020")
    axis.text(foot[0] + 0.1, foot[1] - 0.3, f"gamma d, here gamma = {gamma:.2f}", fontsize=10)
    for point, text, dy in ((old, "q_old", -0.3), (new, "q_new", -0.3), (now, "q", 0.15)):
        axis.plot(*point, "o", color="#333333", ms=5)
        axis.text(point[0], point[1] + dy, text, fontsize=11, ha="center", style="italic")
    axis.set(xlim=(0, 8.6), ylim=(0, 2.6))
    _save(figure, path)


def _gate(path: Path, stats: RunStats) -> None:
    """Errors of a run add up until they reach the threshold."""
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    axis = figure.subplots()
    for record in stats.contexts["cond"]:
        color, total = ACTION_COLORS[record.action], record.accumulated_error
        if total is None:
            axis.axvspan(record.step - 0.45, record.step + 0.45, color=color, alpha=0.35, lw=0)
            continue
        axis.bar(record.step, total, 0.8, color=color, alpha=0.55)
        axis.bar(record.step, record.error, 0.8, bottom=total - record.error, color=color)
    axis.axhline(THRESHOLD, color="#c02020", ls="--")
    axis.text(STEPS, THRESHOLD, "threshold", color="#c02020", va="center")  # beside the bars
    axis.set(xlabel="denoising step", ylabel="accumulated error", xlim=(-0.7, STEPS - 0.3))
    axis.set_ylim(0, 3 * THRESHOLD)
    counts = (stats.num_computed, stats.num_resumed, stats.num_reused)
    axis.set_title("{} computed, {} resumed, {} reused".format(*counts), fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _plan(path: Path) -> None:
    """Which steps the demo Flux's profile computes for a speed-up, and what it expects."""
    profile = Profile.load(PROFILE)
    figure, axis = _canvas(8.6, 2.6)
    for row, target in enumerate((1.5, 2.0, 2.5, 3.0, 4.0)):
        plan = expect(profile, DiCacheConfig(profile=profile, target_speedup=target))
        (mask,) = plan.masks.values()
        for step, letter in enumerate(mask):
            color = COMPUTED if letter == "C" else REUSED
            axis.add_patch(Rectangle((step, -row), 0.8, 0.65, fc=color, lw=0))
        axis.text(-0.6, 0.3 - row, f"{target:g}x", ha="right", va="center", fontsize=10)
        text = f"{plan.computed} computed, {plan.psnr:.1f} dB expected"
        axis.text(len(mask) + 0.4, 0.3 - row, text, va="center", fontsize=9)
    axis.text(0, 1.0, "step 0", fontsize=9)
    axis.set(xlim=(-2.5, len(mask) + 13), ylim=(-4.3, 1.6))
    _save(figure, path)


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    return figure, axis


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasSVG(figure)
    figure.savefig(path, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
