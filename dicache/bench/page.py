"""A result as one HTML page that needs nothing else: tables, plot, and pictures side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL.Image import Image

from dicache.likeness import METRICS

from .report import NOTES, depth_name, rows
from .results import Result
from .strip import GAIN

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; text-align: right;
  border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left }
img.small { image-rendering: pixelated; height: 96px; margin: 1px } img.plot { max-width: 100% }
summary { cursor: pointer; font-weight: 600; margin: .6em 0 } .scroll { overflow-x: auto }
"""

Shown = Mapping[tuple[str, float], Sequence[Sequence[Image]]]


def html(result: Result, plot: Path, shown: Shown) -> str:
    """The page.

    Args:
        result: Its numbers.
        plot: File of the plot, which the page takes in.
        shown: By method and setting, of the first samples: a picture and its difference. The
            un-cached ones are those of ("no cache", 0).
    """
    title = escape(f"{result.model}: caches at equal cost")
    metric, depth = result.metrics[0], 0 if result.sibling is None else 1
    facts = {**result.about, "failures": "; ".join(f"{k}: {v}" for k, v in result.failures.items())}
    picture = base64.b64encode(plot.read_bytes()).decode()
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
            f"<style>{_STYLE}</style><h1>{title}</h1><p>{escape(NOTES)}</p>",
            f"<h2>{METRICS[metric][0]}, cost at {escape(depth_name(result, depth))}</h2>",
            f"<div class=scroll>{_table(result, depth, metric)}</div>",
            f'<img class=plot alt="likeness over cost" src="data:image/png;base64,{picture}">',
            f"<h2>Pictures</h2><p>Of every method at the setting whose cost is nearest; each beside"
            f" {GAIN} times its difference from the un-cached one.</p>",
            *(_pictures(result, depth, target, shown) for target in result.targets),
            "<h2>How it was made</h2><ul>",
            *(f"<li>{escape(k)}: {escape(v)}</li>" for k, v in facts.items() if v),
            "</ul></html>",
        ]
    )


def _table(result: Result, depth: int, metric: str) -> str:
    head = "".join(f"<th>{target:g}x</th>" for target in result.targets)
    lines = [f"<table><tr><th>method</th>{head}</tr>"]
    for name, cells in rows(result, depth, metric):
        plain = (escape(cell).replace("**", "<b>", 1).replace("**", "</b>", 1) for cell in cells)
        columns = "".join(f"<td>{cell}</td>" for cell in plain)
        lines.append(f"<tr><td>{escape(name)}</td>{columns}</tr>")
    return "\n".join([*lines, "</table>"])


def _pictures(result: Result, depth: int, target: float, shown: Shown) -> str:
    metric = result.metrics[0]
    lines = [_row("no cache", "", shown["no cache", 0.0], [])]
    for name, points in result.curves.items():
        point = min(points, key=lambda each: abs(each.cost[depth] - target))
        pictures = shown.get((name, point.setting))
        if pictures is not None and abs(point.cost[depth] / target - 1) < 0.1:
            values = point.likeness[metric]
            lines.append(_row(name, f"{point.cost[depth]:.2f}x", pictures, values))
    opened = " open" if target == result.targets[len(result.targets) // 2] else ""
    body = "\n".join(lines)
    return (
        f"<details{opened}><summary>{target:g}x</summary><div class=scroll><table>{body}</table>"
        f"</div></details>"
    )


def _row(name: str, cost: str, pictures: Sequence[Sequence[Image]], values: Sequence[float]) -> str:
    cells = []
    for index, pair in enumerate(pictures):
        value = f"<br>{values[index]:.1f}" if values else ""
        images = "".join(f'<img class=small alt="" src="{_data(image)}">' for image in pair)
        cells.append(f"<td>{images}{value}</td>")
    return f"<tr><td>{escape(name)} {cost}</td>{''.join(cells)}</tr>"


def _data(image: Image) -> str:
    """A picture as part of the page: exactly where it is tiny, else as JPEG."""
    kind = "PNG" if image.height <= 64 else "JPEG"
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
