"""benchmarks/skipped_step.py attributes every nanosecond of a step, and docs/ shows its numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dicache import ops
from dicache.core import trajectory
from dicache.core.readback import Readback
from dicache.driver.model import CachedModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import skipped_step

        yield skipped_step
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def run(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """What one round measured, and the folder that the program wrote to."""
    folder, measured, measure = tmp_path_factory.mktemp("skipped_step"), [], script.measure

    def kept(rounds: int) -> Any:
        measured.append(measure(rounds))
        return measured[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "measure", kept)
        patch.setattr(script, "TURNS", 1)
        script.main(["--out", str(folder), "--rounds", "1"])
    return measured[0], folder


def test_time_belongs_to_the_part_that_takes_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is slow shows in its own row, and in the sum, and nowhere else."""
    pause = 2_000_000  # ns; no part of a tiny model's step takes as long
    enter, reuse = CachedModel.enter_blocks, CachedModel.reuse

    def slow_enter(*args: Any) -> None:
        enter(*args)
        time.sleep(pause / 1e9)

    def slow_reuse(*args: Any) -> Any:
        time.sleep(pause / 1e9)
        return reuse(*args)

    monkeypatch.setattr(script, "TURNS", 1)
    for name, slow, part in (
        ("enter_blocks", slow_enter, "open the step"),
        ("reuse", slow_reuse, "hand out"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(CachedModel, name, slow)
            found = script.measure(1)
        slowed = [name for name, nanoseconds in found.parts.items() if nanoseconds >= pause]
        assert slowed == [part]
        assert found.totals[script.STAMPED] >= pause > found.totals[script.STAMPED_ALONE]


def test_no_part_is_missed(script: ModuleType, run: tuple[Any, Path]) -> None:
    """A function that is called past its stamp would give its time to the next part."""
    found, _ = run
    assert list(found.parts) == list(script.PARTS)
    assert all(nanoseconds > 0 for nanoseconds in found.parts.values())
    without_cache = {name for name, nanoseconds in found.alone.items() if nanoseconds}
    around_the_call = {"cache_context", "take the call", "close the step"}
    assert without_cache == around_the_call | {"embeddings", "probe block", "head"}


def test_first_block_cache_and_the_probe_alone_stand_beside_it(
    script: ModuleType, run: tuple[Any, Path]
) -> None:
    found, folder = run
    models = {script.DICACHE, script.FIRST_BLOCK, script.PROBE_ALONE}
    assert set(found.totals) == models | {script.STAMPED, script.STAMPED_ALONE}
    assert min(found.totals.values()) > 0
    assert all(f"| {name} |" in script.table(found) for name in (*found.totals, *script.PARTS))
    assert (folder / "skipped_step.png").read_bytes().startswith(b"\x89PNG")


def test_the_package_is_left_without_stamps(run: tuple[Any, Path]) -> None:
    assert vars(trajectory)["resolve_backend"] is ops.resolve_backend
    assert Readback.wait.__qualname__ == "Readback.wait"


def test_the_page_shows_the_parts_and_the_arithmetic(script: ModuleType) -> None:
    page = (ROOT / "docs" / "skipped_step.md").read_text()
    assert script.arithmetic() in page
    assert all(f"| {name} |" in page for name in script.PARTS)
    tensor = 4096 * 3072 * 2  # bytes of FLUX.1's tokens in bf16, of which the default moves 8
    row = f"| FLUX.1, 1024x1024 | {tensor / 1e6:.0f} | {8 * tensor / 4.3e12 * 1e3:.2f} ms |"
    assert row in page
