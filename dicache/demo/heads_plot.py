"""The head map: how often each head of each sparse block was taken for a temporal one.

One row a block, one column a head, one panel a transformer; dark is temporal, light spatial.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dicache import SparseVideoGenStats
from dicache.demo.runner import Run

_MOST_LABELS = 24  # rows or columns that are numbered one by one, with the share in every cell


def temporal_shares(runs: Sequence[Run]) -> dict[str, dict[int, list[float]]]:
    """For every transformer, the shares of its blocks' heads over all runs together."""
    names = {name: None for run in runs for name in run.sparse}
    gathered = {}
    for name in names:
        stats = [run.sparse[name] for run in runs if name in run.sparse]
        records = [record for each in stats for record in each.records()]
        gathered[name] = SparseVideoGenStats({"all": records}).temporal_shares()
    return {name: shares for name, shares in gathered.items() if shares}


def save_heads_plot(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Draw the head map of sparse runs and write it to `path`.

    Raises:
        ValueError: No step of these runs was sparse.
    """
    maps = temporal_shares(runs)
    if not maps:
        raise ValueError("there are no heads to plot: no step of these runs was sparse")
    columns = max(len(heads) for shares in maps.values() for heads in shares.values())
    blocks = max(map(len, maps.values()))
    size = (max(7.0, 2.5 + 0.5 * columns) * len(maps), max(3.2, 1.8 + 0.3 * blocks))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for panel, (name, shares) in zip(panels, maps.items(), strict=True):
        image = _draw_map(panel, shares)
        panel.set_title(name if len(maps) > 1 else "", fontsize=10)
    figure.colorbar(image, ax=list(panels), label="0 always spatial, 1 always temporal")
    meaning = "how often the profiling took a head for a temporal one, over all sparse steps"
    figure.suptitle(f"{title}\n{meaning}", fontsize=10)
    figure.savefig(path, dpi=110)


def _draw_map(axes: Any, shares: dict[int, list[float]]) -> Any:
    values = numpy.array(list(shares.values()))  # [blocks, heads]
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    axes.set_xlabel("head")
    axes.set_ylabel("block")
    if max(values.shape) > _MOST_LABELS:
        first, last = min(shares) - 0.5, max(shares) + 0.5
        image.set_extent((-0.5, values.shape[1] - 0.5, last, first))
        return image
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(shares)), [str(block) for block in shares])
    for (row, head), share in numpy.ndenumerate(values):
        color = "white" if share > 0.6 else "black"
        axes.text(head, row, f"{share:.2f}", ha="center", va="center", color=color, fontsize=8)
    return image
