"""benchmarks/skipped_step.py attributes every nanosecond of a step, and docs/ shows its numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dicache import ops, trajectory
from dicache.readback import Readback

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


def test_the_parts_of_a_step_sum_to_the_step(script: ModuleType, run: tuple[Any, Path]) -> None:
    found, _ = run
    assert sum(found.parts.values()) == found.totals[script.STAMPED]
    assert sum(found.alone.values()) == found.totals[script.STAMPED_ALONE]
    added = found.added("pipeline", "cache", "model")
    assert sum(added.values()) == found.above_probe(script.STAMPED)


def test_no_part_is_missed(script: ModuleType, run: tuple[Any, Path]) -> None:
    """A function that is called past its stamp would give its time to the next part."""
    found, _ = run
    assert list(found.parts) == list(script.PARTS)
    assert all(nanoseconds > 0 for nanoseconds in found.parts.values())
    without_cache = {name for name, nanoseconds in found.alone.items() if nanoseconds}
    around_the_call = {"cache_context", "open the step", "close the step"}
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
    # FLUX.1 in bf16: 8 passes of 4096 x 3072 values at 4.3 TB/s.
    assert f"{8 * 4096 * 3072 * 2 / 4.3e12 * 1e3:.2f}" == "0.05"
    assert "| FLUX.1, 1024x1024 | 25 | 0.05 ms |" in page
