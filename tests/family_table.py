"""The table of families is made of tests: `make families` writes it, `--check` says if it is right.

A test that is parametrized by families and shows something of each of them is marked so:

    @pytest.mark.backs("compile")       # a yes in this column, for every family that it runs for
    @pytest.mark.rules_out("control")   # a dash: the family has none of it
    @pytest.mark.parametrize("family", FAMILIES)

Its parameter `family`, `name` or `kind` is a row's name, or becomes one by `rows={value: name}`;
other values say nothing. Tests that `make test` leaves out say nothing either, and a marked test
that skips itself fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from table_marks import MARKS

from dicache.cli.families import DATA, THRESHOLD, Column, Row, cell, columns, rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
PARAMETERS = ("family", "name", "kind")
LEFT_OUT = ("gpu", "large")  # by `make test`

SAMPLE = (
    'with granularity="sample" each sample of a batch has the schedule and result of its own run '
    "(-: so it has, but blocks run for all samples and nothing is saved)"
)
COMPILE = "blocks are compiled to the same results, and the cache adds no graph to them"
SPLIT = "one sequence on several GPUs: ranks decide as one (-: it is refused)"
SPARSE = "Sparse VideoGen, with the cache (-: it refuses the model)"
MEASURED = "whether the threshold was measured on a trained model of the family, or converted"
COLUMNS = {
    "diffusers": {
        "sample": SAMPLE,
        "compile": COMPILE,
        "control": "residuals of a ControlNet count once (-: the model takes none)",
        "offload": "results stay the same, bit by bit, while weights come and go",
        "guidance": "both branches in one batch: one decision, and each half's own result",
        "GPUs": SPLIT,
        "sparse": SPARSE,
        THRESHOLD: MEASURED,
    },
    "original code": {
        "sample": SAMPLE,
        "compile": COMPILE,
        "FSDP": "blocks and models that FSDP wraps",
        "GPUs": SPLIT,
        "sparse": SPARSE,
        THRESHOLD: MEASURED,
    },
    "ComfyUI": {
        "compile": "TorchCompileModel, in either order; a reused step compiles nothing",
        "control": "what a ControlNet adds in place counts once (-: the model takes none)",
        "guidance": "both conditions in one batch decide as one",
        THRESHOLD: MEASURED,
    },
}
# Which tables the tests of a folder fill.
_NOTHING: Column = {"promise": "", "works": {}, "absent": {}}
FOLDERS = {"tests": ("diffusers", "original code"), "tests/comfyui": ("ComfyUI",)}


class TableError(Exception):
    """Tests are marked in a way that says nothing."""


def gather(
    folder: Path, titles: tuple[str, ...], root: Path = ROOT
) -> dict[str, dict[str, Column]]:
    """The tables with these titles, of the tests that pytest collects in a folder below `root`.

    Raises:
        TableError: A mark says nothing, or two contradict each other; or nothing can be collected.
    """
    made: dict[str, dict[str, Column]] = {
        title: {
            name: {"promise": promise, "works": {}, "absent": {}}
            for name, promise in COLUMNS[title].items()
        }
        for title in titles
    }
    unheard = {}
    for item in _collected(folder):
        if any(item.get_closest_marker(name) for name in LEFT_OUT):
            continue
        test = f"{item.path.relative_to(root)}::{item.originalname}"
        for mark in (each for name in MARKS for each in item.iter_markers(name)):
            said = f"{test}, {mark.name}({mark.args[0]!r})"
            row = _row_of(item, mark)
            title = next((each for each in titles if row in _names(each)), None)
            unheard[said] = unheard.get(said, True) and title is None
            if row is None or title is None:
                continue
            if mark.args[0] not in made[title]:
                known = ", ".join(made[title])
                raise TableError(f"{said}: {title} has no such column. Expected one of {known}.")
            families = made[title][mark.args[0]][MARKS[mark.name]].setdefault(test, [])
            if row not in families:
                families.append(row)
    for said in (each for each, is_so in unheard.items() if is_so):
        raise TableError(
            f"{said}: no {' or '.join(PARAMETERS)} of this test is the name of a family. "
            f"Expected a test that is parametrized by families."
        )
    _check_contradictions(made)
    return made


def page(tables: dict[str, dict[str, Column]]) -> str:
    """The page of the documentation."""
    parts = [_INTRODUCTION]
    for title, table in tables.items():
        head = ["family", "class", *table, "published preset"]
        lines = [head, ["---"] * len(head)]
        for row in rows()[title]:
            lines.append([row.name, f"`{row.classes}`", *_cells(row, table), row.preset])
        if title == "ComfyUI":
            lines = [line[:-1] for line in lines]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        parts.append("\n".join(_legend(name, column) for name, column in table.items()))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    """Write the tables of the folders' tests, or with --check compare them; 1 if they differ."""
    folders = [each for each in arguments if each != "--check"]
    before = columns() if DATA.exists() else {}
    tables = dict(before)
    try:
        for folder in folders:
            tables |= gather(ROOT / folder, FOLDERS[folder])
    except TableError as error:
        print(error)
        return 1
    tables = {title: tables[title] for title in COLUMNS if title in tables}
    files = {DATA: json.dumps(tables, indent=1) + "\n", PAGE: page(tables)}
    if "--check" not in arguments:
        for file, content in files.items():
            file.write_text(content)
        return 0
    old = [file.name for file, content in files.items() if file.read_text() != content]
    if old:
        print(f"{' and '.join(old)}: not what the tests say. Write them anew: make families")
        print("\n".join(_differences(before, tables)))
    return int(bool(old))


class _Collector:
    items: list[Any]

    def pytest_collection_finish(self, session: Any) -> None:
        self.items = session.items


def _collected(folder: Path) -> list[Any]:
    """All items in the files of a folder that have a mark."""
    words = [f"mark.{name}(" for name in MARKS]
    files = [str(each) for each in folder.glob("test_*.py") if _has_any(each, words)]
    collector, said = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main(["--collect-only", "-qq", *sorted(files)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise TableError(said.getvalue())
    return collector.items


def _has_any(file: Path, words: list[str]) -> bool:
    text = file.read_text()
    return any(word in text for word in words)


def _row_of(item: Any, mark: Any) -> str | None:
    """The row that a test's parameters name, if they do."""
    given = getattr(item, "callspec", None)
    values = [given.params[each] for each in PARAMETERS if given and each in given.params]
    named = mark.kwargs.get("rows")
    for value in values:
        name = getattr(value, "name", value) if named is None else named.get(value)
        if any(name in _names(title) for title in COLUMNS):
            return str(name)
    return None


def _names(title: str) -> list[str]:
    return [row.name for row in rows()[title]]


def _check_contradictions(tables: dict[str, dict[str, Column]]) -> None:
    for title, table in tables.items():
        for name, column in table.items():
            for family in _names(title):
                said = [
                    [test for test, of in column[key].items() if family in of]
                    for key in MARKS.values()
                ]
                if all(said):
                    raise TableError(
                        f"{title}, {family}, {name}: {said[0][0]} shows it, and {said[1][0]} "
                        f"says that there is none."
                    )


def _differences(before: Any, now: Any) -> list[str]:
    """The cells that are not what they were."""
    return [
        f"{title}, {row.name}, {name}: {was or 'nothing'} is written, {said or 'nothing'} is shown"
        for title, table in now.items()
        for name, column in table.items()
        for row in rows()[title]
        for was in [cell(name, before.get(title, {}).get(name, _NOTHING), row.name)]
        for said in [cell(name, column, row.name)]
        if was != said
    ]


def _cells(row: Row, table: dict[str, Column]) -> list[str]:
    found = []
    for name, column in table.items():
        said = cell(name, column, row.name)
        found.append(f"{row.threshold:g}, {said}" if name == THRESHOLD else said)
    return found


def _legend(name: str, column: Column) -> str:
    """What a column says, and each test behind it, with its families where others have another."""
    lines = [f"- **{name}**: {column['promise']}"]
    for mark, tests in (("yes", column["works"]), ("-", column["absent"])):
        for test, families in tests.items():
            of = f" ({', '.join(families)})" if len(tests) > 1 else ""
            said = "" if name == THRESHOLD else f"{mark}: "
            lines.append(f"    - {said}`{test}`{of}")
    if len(lines) == 1:
        lines.append("    - no test yet")
    return "\n".join(lines)


_INTRODUCTION = """\
# Families

What tests show of every family. `make families` writes this page from the tests, and `make test`
fails where it is not what they say; `dicache info --families` prints the same.

- **yes**: a test shows it for this very family; its name is below the table.
- **-**: a test shows that the family has none of it.
- Nothing: no test yet. It may work.

The tests run on a CPU, on tiny models with random weights of the real classes of diffusers and
ComfyUI, and on stand-ins for those of original code.

**None of the thresholds was measured on a real model.** What was converted are the published
thresholds of FLUX.1, HunyuanVideo and Wan 2.1, by the ratio of the two rules' thresholds at equal
cost on our trained demo model of the family; other families have the value of the one whose
architecture and task are closest. Start there, look at the pictures (`dicache generate --compare`
does it for you), and turn the one knob.

FLUX.1 counts with img2img, Fill, Kontext and Control, Wan with 2.1 and both experts of 2.2. What is
special:

- Some of diffusers' classes (SD3, AuraFlow, Sana, Lumina 2, Z-Image, HiDream, HunyuanDiT, FLUX.3,
  Cosmos) have no `enable_cache`; `apply_dicache` does the same for them.
- Blocks of VACE that make its hints, and FLUX.3's blocks for text or picture alone, run in every
  step.
- HunyuanDiT's own scheduler adds noise in every step, so that the default rules compute all of
  them.
- With `granularity="sample"` blocks of Qwen-Image 2.1, and of GLM-Image with its key-value cache,
  run for all samples, with a warning.
- Latte is refused, because no row can describe its blocks. [Others](extending.md#a-model-family)
  need a row."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
