"""The table of families says what tests show, and nothing that they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import family_table
import pytest
import table_marks

from dicache.cli import main
from dicache.cli.families import THRESHOLD, cell, columns, rows

SCRIPT = Path(family_table.__file__)
TESTS = """
import pytest

@pytest.mark.backs("offload")
@pytest.mark.parametrize("name", ["wan", "no-family"])
@pytest.mark.parametrize("depth", [1, 2])
def test_one(name, depth): ...

@pytest.mark.parametrize("what", [1, pytest.param(2, marks=pytest.mark.backs("offload"))])
@pytest.mark.parametrize("family", ["flux", pytest.param("ltx", marks=pytest.mark.gpu)])
def test_two(family, what): ...

@pytest.mark.rules_out("offload", rows={"tiny": "mochi"})
@pytest.mark.parametrize("kind", ["tiny", "wan"])
def test_three(kind): ...
"""


def gather(folder: Path, tests: str) -> Any:
    (folder / f"{folder.name}.py").write_text(tests)
    return family_table.gather(folder, ("diffusers",), root=folder)["diffusers"]


def test_the_table_is_what_the_tests_say() -> None:
    command = [sys.executable, str(SCRIPT), "--check", "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_difference_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if a test ran for one family only that ran for all."""
    said, page, data = columns(), tmp_path / "families.md", tmp_path / "families.json"
    said["diffusers"]["offload"]["works"] = {"test_it": ["wan"]}
    monkeypatch.setattr(family_table, "gather", lambda *_: {"diffusers": said["diffusers"]})
    for name, file in (("PAGE", page), ("DATA", data)):
        file.write_text(getattr(family_table, name).read_text())
        monkeypatch.setattr(family_table, name, file)
    assert family_table.main(["--check", "tests"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "families.json and families.md: not what" in lines[0] and "make families" in lines[0]
    assert "diffusers, flux, offload: yes is written, nothing is shown" in lines
    assert not any("wan, offload" in line for line in lines)
    assert family_table.main(["tests"]) == 0 == family_table.main(["--check", "tests"])
    assert "`test_it`" in page.read_text()


def test_a_cell_is_there_for_the_families_that_a_test_runs_for(tmp_path: Path) -> None:
    column, file = gather(tmp_path, TESTS)["offload"], f"{tmp_path.name}.py"
    assert column["works"] == {f"{file}::test_one": ["wan"], f"{file}::test_two": ["flux"]}
    assert column["absent"] == {f"{file}::test_three": ["mochi"]}
    families = ("wan", "flux", "mochi", "ltx")
    assert [cell("offload", column, name) for name in families] == ["yes", "yes", "-", ""]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('backs("offload")', 'backs("ofload")'), "no such column.*sample, compile, control"),
        (('["wan", "no-family"]', '["no-family"]'), "test_one, backs.'offload'.*parametrized by"),
        (('"tiny": "mochi"', '"tiny": "wan"'), "wan, offload: .*::test_one shows"),
        (("def test_one(name", "def test_one(name:"), "SyntaxError"),
    ],
)
def test_marks_that_say_nothing_are_refused(
    tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    with pytest.raises(family_table.TableError, match=f"(?s){words}"):
        gather(tmp_path, TESTS.replace(*change))


@pytest.mark.parametrize("mark", [*table_marks.MARKS, "other"])
@pytest.mark.parametrize("how", ["skip", "xfail", "importorskip"])
def test_a_marked_test_that_skips_itself_fails(tmp_path: Path, mark: str, how: str) -> None:
    file = tmp_path / f"{tmp_path.name}.py"
    marked = f"@pytest.mark.{mark}('offload')\ndef test_one():"
    file.write_text(f"import pytest\n{marked}\n    pytest.{how}('no_such_module')\n")
    arguments = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)]
    code = pytest.main(arguments, plugins=[table_marks])
    assert code == (pytest.ExitCode.OK if mark == "other" else pytest.ExitCode.TESTS_FAILED)


def test_the_command_prints_every_cell_on_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--families"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for title, table in columns().items():
        for row in rows()[title]:
            (line,) = [each for each in printed if each.startswith(f"{row.name} ")]
            assert len(line) <= 80
            cells = [cell(name, column, row.name) for name, column in table.items()]
            assert line.removeprefix(row.name).split() == [each for each in cells if each]
        for column in table.values():
            tests = {*column["works"], *column["absent"]}
            assert all(any(each.endswith(test) for each in printed) for test in tests)


def test_it_is_told_in_ascii_where_the_terminal_knows_nothing_else() -> None:
    command = [sys.executable, "-m", "dicache", "info", "--families"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"qwen-image-2.1" in done.stdout and done.stdout.isascii()


def test_no_threshold_is_called_measured_that_no_test_holds_against_a_measurement() -> None:
    for title, table in columns().items():
        words = {cell(THRESHOLD, table[THRESHOLD], row.name) for row in rows()[title]}
        assert words == ({"converted"} if not table[THRESHOLD]["works"] else {*words})
