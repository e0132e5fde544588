"""What the Markdown reports of measurements have in common: their first lines, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def facts_of_a_run(
    command: str, facts: Mapping[str, Any], versions: Mapping[str, Any], backends: Mapping[str, Any]
) -> str:
    """How a report was made: the command, the machine, the versions, and what ran there."""
    lines = [f"`{command}`", ""]
    lines += [f"- {name}: {' / '.join(str(fact).splitlines())}" for name, fact in facts.items()]
    lines += ["- versions: " + ", ".join(f"{name} {value}" for name, value in versions.items())]
    lines += [f"- backend {name}: {value}" for name, value in backends.items()]
    return "\n".join(lines)


def make_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A row a result; the first column is text, the others are aligned as numbers."""
    lines = ["| " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|---|" + "--:|" * (len(columns) - 1))
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines)


def number_cell(
    key: str, digits: int = 2, unit: str = "", scale: float = 1.0
) -> Callable[[Row], str]:
    """A cell with a number in a unit; empty where there is none."""

    def cell(row: Row) -> str:
        return "" if row.get(key) is None else f"{row[key] * scale:.{digits}f}{unit}"

    return cell


def text_cell(key: str) -> Callable[[Row], str]:
    """A cell with what is there; empty where nothing is."""
    return lambda row: str(row.get(key, ""))
