"""`dicache info --families`: what tests show of every family, as a table.

`families.json` holds which tests; `make families` writes it, and tests compare it with themselves.
So a cell says what a test that runs for this very family shows, and nothing else.
`tests/family_table.py` makes the page in the documentation of the same data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, TypedDict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dicache.adapters.comfyui.table import MODELS
from dicache.adapters.original.table import HUNYUAN_VIDEO, WAN
from dicache.config import DiCacheConfig
from dicache.driver.families import ModelFamily, supported_families
from dicache.error_rules import ERROR_RULES

DATA = Path(__file__).with_name("families.json")
THRESHOLD = "threshold"  # the column that has words of its own


class Column(TypedDict):
    """What is known of a column.

    Attributes:
        promise: What a yes says.
        works: Names of families that a test shows it for, by the test's name.
        absent: The same of tests that show that a family has none of it.
    """

    promise: str
    works: dict[str, list[str]]
    absent: dict[str, list[str]]


class Row(NamedTuple):
    """A family, or a model of ComfyUI.

    Attributes:
        name: What tests call it, too.
        classes: Names of its classes.
        threshold: That of `DiCacheConfig()`.
        preset: Its published rules and their threshold, or nothing.
    """

    name: str
    classes: str
    threshold: float
    preset: str = ""


def rows() -> dict[str, list[Row]]:
    """The rows of all tables that this package brings, by the table's name."""
    families = supported_families()
    rule = ERROR_RULES[DiCacheConfig().error]
    return {
        "diffusers": [_row(each) for each in families if each.module == "diffusers"],
        "original code": [_row(each) for each in (HUNYUAN_VIDEO, WAN)],
        "ComfyUI": [
            Row(each.name, ", ".join(each.classes), each.threshold_for(rule)) for each in MODELS
        ],
    }


def columns() -> dict[str, dict[str, Column]]:
    """The columns of all tables, in their order."""
    found: dict[str, dict[str, Column]] = json.loads(DATA.read_text())
    return found


def cell(name: str, column: Column, family: str) -> str:
    """What a column says of a family: "yes", "-" or nothing; of a threshold where it is from."""
    works = any(family in each for each in column["works"].values())
    if name == THRESHOLD:
        return "measured" if works else "converted"
    if works:
        return "yes"
    return "-" if any(family in each for each in column["absent"].values()) else ""


def print_families() -> None:
    """Print all tables, and below each the tests behind it."""
    # Fewer columns have no room for the table; lines that the terminal breaks lose nothing.
    console = Console(width=max(Console().width, 80))
    for title, known in columns().items():
        # One character between columns: on 80 there is no room for more.
        table = Table(title=f"\n{title}", box=SIMPLE_HEAD, show_edge=False, padding=0)
        table.title_justify, table.title_style, table.header_style = "left", "bold", "dim"
        table.add_column("family", no_wrap=True)
        for name in known:
            table.add_column(name, no_wrap=True)
        for row in rows()[title]:
            table.add_row(row.name, *(cell(name, each, row.name) for name, each in known.items()))
        console.print(table)
        console.print()
        for name, column in known.items():
            console.print(f"{name}: {column['promise']}", highlight=False, markup=False)
            for mark, tests in (("yes", column["works"]), ("-", column["absent"])):
                for test in tests:
                    line = f"  {'' if name == THRESHOLD else mark:<3} {test}"
                    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print(
        "\nyes: the test below shows it for this family. -: a test shows that it has none. "
        "Nothing: no test yet.\nTests run on tiny models with random weights.",
        highlight=False,
    )


def _row(family: ModelFamily) -> Row:
    preset = f"{family.preset}, {family.threshold:g}" if family.preset else ""
    return Row(family.name, family.model_class, family.default_threshold, preset)
