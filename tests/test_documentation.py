"""Documentation: its code runs, its commands parse, its tables and figures are what files say."""

from __future__ import annotations

import importlib.util
import re
import shlex
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import page_code
import pytest
import torch
import typer
from page_code import ROOT, blocks, pages
from page_stages import STAGES, set_the_stage

import dicache
from dicache import DiCacheWarning
from dicache.cli.app import app

# They have a test file of their own: it runs the code of one, and that of the other takes GPUs.
ELSEWHERE = ("docs/engines.md", "docs/several_gpus.md")
WITH_PYTHON = [
    page.relative_to(ROOT).as_posix()
    for page in pages()
    if blocks(page, "python") and page.relative_to(ROOT).as_posix() not in ELSEWHERE
]


def script(path: str) -> ModuleType:
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_code_of_a_page_runs(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In its order, without a warning of the cache's."""
    monkeypatch.chdir(tmp_path)
    set_the_stage(monkeypatch)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiCacheWarning)
        page_code.run(ROOT / page, STAGES.get(page, dict))
    torch._dynamo.reset()


def test_all_code_runs_but_what_says_why_not() -> None:
    """A page's blocks that cannot run are few, and counted here."""
    all_blocks = [(page.name, block) for page in pages() for block in blocks(page, "python")]
    left_out = Counter(name for name, block in all_blocks if not block.runs)
    assert left_out == {"several_gpus.md": 3}
    assert {block.mark for _, block in all_blocks if block.runs} <= {"", "anew"}
    assert {"README.md", "docs/index.md", *STAGES} == set(WITH_PYTHON)


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks, in words."""
    code = "".join(block.code for block in blocks(page, "bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in code.splitlines() if line.strip()]


def test_dicaches_commands_have_the_options_that_pages_give_them() -> None:
    group: Any = typer.main.get_command(app)
    seen = set()
    for page in pages():
        for words in commands(page):
            if words[:1] != ["dicache"]:
                continue
            name, *options = words[1:]
            group.commands[name].make_context(name, options)  # a usage error, if not
            seen.add(name)
    assert seen == set(group.commands)


def test_what_else_the_shell_blocks_call_is_there() -> None:
    """Targets of the Makefile; scripts, and the options that they or their neighbours read."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    scripts = 0
    for page in pages():
        for words in commands(page):
            words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
            if words[:1] == ["make"]:
                assert set(words[1:]) <= targets, f"{page.name}: {words}"
            if words[:1] == ["python"] and words[1].endswith(".py"):
                folder = (ROOT / words[1]).parent
                source = "".join(each.read_text() for each in folder.glob("*.py"))
                assert (ROOT / words[1]).exists(), f"{page.name}: {words}"
                for option in (word for word in words if word.startswith("--")):
                    assert f'"{option}"' in source, f"{page.name}: {option}"
                scripts += 1
    assert scripts >= 4


def test_tables_are_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    tables = script("docs/tables.py")
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    placed = re.findall(r"<!-- table (.+?) -->", "".join(page.read_text() for page in pages()))
    assert sorted(placed) == sorted(tables.TABLES)


def test_a_cell_is_what_the_benchmark_wrote() -> None:
    """The same numbers as in the benchmark's own table, which another function made."""
    tables = script("docs/tables.py")
    (line,) = re.findall(r"^\| `DiCacheConfig\(\)` \|.*$", tables.on_flux(), flags=re.M)
    page = (ROOT / "benchmarks/results/bench/flux.md").read_text()
    theirs = re.search(r"^\| DiCacheConfig\(\) (\|.*)$", page, flags=re.M)
    assert theirs is not None and line.endswith(theirs[1])


def test_figures_are_what_the_script_draws(tmp_path: Path) -> None:
    """All of their texts: numbers of steps, masks' lengths, expected PSNR, the formulas."""
    folder = ROOT / "docs" / "figures"
    script("docs/figures/draw.py").main(tmp_path)
    drawn, kept = (
        {path.name for path in where.glob("*.[ps][nv]g")} for where in (tmp_path, folder)
    )
    assert drawn == kept and len(kept) == 5
    for name in kept - {"schedule.png"}:
        ours, theirs = (texts(where / name) for where in (folder, tmp_path))
        assert ours == theirs and len(ours) > 5


def test_the_reference_has_every_name_of_the_package() -> None:
    told = re.findall(r"^::: dicache\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.M)
    assert sorted(told) == sorted(dicache.__all__)


def texts(path: Path) -> list[str]:
    """Of a figure, and the colours of its shapes."""
    return re.findall(r">([^<>\n]+)</text>|fill: (#[0-9a-f]{6})", path.read_text())
