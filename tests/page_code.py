"""Code of the documentation's pages, so that tests can run it.

A comment in the line above a block of Python says what is not obvious:

    <!-- anew -->               what the page takes for granted is made anew: a pipe has no cache
    <!-- not run: REASON -->    it cannot run in a test
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>[a-z]+)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: Of its first line of code, from 0.
        language: Such as `"python"`.
        code: What it says.
        mark: The comment above it, or nothing.
    """

    line: int
    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        """Whether a test can run it."""
        return not self.mark.startswith("not run: ")


def pages() -> list[Path]:
    """All pages that people read."""
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language."""
    text = page.read_text()
    found = [
        Block(text.count("\n", 0, each.start("code")), each["language"], each["code"], each["mark"])
        for each in _BLOCK.finditer(text)
    ]
    assert len(found) == len(re.findall(r"^```[a-z]+$", text, flags=re.M)), f"a fence of {page}"
    return [
        Block(each.line, each.language, each.code, each.mark or "")
        for each in found
        if each.language == language
    ]


def run(page: Path, beginning: Callable[[], dict[str, Any]] = dict) -> dict[str, Any]:
    """Run a page's Python, a block after the other, and give the names that it leaves.

    Args:
        page: Its file.
        beginning: Makes the names that a page takes for granted, once and for every block that is
            marked so.
    """
    names: dict[str, Any] = {"__name__": f"pages.{page.stem}", **beginning()}
    for block in blocks(page, "python"):
        if not block.runs:
            continue
        if block.mark == "anew":
            names |= beginning()
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
    return names
