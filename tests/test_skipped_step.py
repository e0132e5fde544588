"""benchmarks/skipped_step.py attributes every nanosecond of a step, and docs/ shows its numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import skipped_step
import torch
import workloads

from dicache import ops
from dicache.core import trajectory
from dicache.core.readback import Readback
from dicache.driver.model import CachedModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found() -> skipped_step.Measurement:
    """What one round measured."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(skipped_step, "TURNS", 1)
        return skipped_step.measure(1)


def test_time_belongs_to_the_part_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow shows in its own row, and in the sum, and nowhere else."""
    pause = 2_000_000  # ns; no part of a tiny model's step takes as long
    enter, reuse = CachedModel.enter_blocks, CachedModel.reuse

    def slow_enter(*args: Any) -> None:
        enter(*args)
        time.sleep(pause / 1e9)

    def slow_reuse(*args: Any) -> Any:
        time.sleep(pause / 1e9)
        return reuse(*args)

    monkeypatch.setattr(skipped_step, "TURNS", 1)
    for name, slow, part in (
        ("enter_blocks", slow_enter, "open the step"),
        ("reuse", slow_reuse, "hand out"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(CachedModel, name, slow)
            found = skipped_step.measure(1)
        slowed = [name for name, nanoseconds in found.parts.items() if nanoseconds >= pause]
        assert slowed == [part]
        assert (
            found.totals[skipped_step.STAMPED] >= pause > found.totals[skipped_step.STAMPED_ALONE]
        )


def test_no_part_is_missed(found) -> None:
    """A function that is called past its stamp would give its time to the next part."""
    assert list(found.parts) == list(skipped_step.PARTS)
    assert all(nanoseconds > 0 for nanoseconds in found.parts.values())
    without_cache = {name for name, nanoseconds in found.alone.items() if nanoseconds}
    around_the_call = {"cache_context", "take the call", "close the step"}
    assert without_cache == around_the_call | {"embeddings", "probe block", "head"}


def test_first_block_cache_and_the_probe_alone_stand_beside_it(found) -> None:
    models = {skipped_step.DICACHE, skipped_step.FIRST_BLOCK, skipped_step.PROBE_ALONE}
    assert set(found.totals) == models | {skipped_step.STAMPED, skipped_step.STAMPED_ALONE}
    assert min(found.totals.values()) > 0
    assert all(
        f"| {name} |" in skipped_step.table(found) for name in (*found.totals, *skipped_step.PARTS)
    )


def test_the_package_is_left_without_stamps(found) -> None:
    assert vars(trajectory)["resolve_backend"] is ops.resolve_backend
    assert Readback.wait.__qualname__ == "Readback.wait"


def test_the_page_shows_the_parts_and_the_arithmetic() -> None:
    """bf16 tensors times passes, at 4.3 TB/s; the published sequence copies the text on top."""
    page = (ROOT / "docs" / "skipped_step.md").read_text()
    assert all(f"| {name} |" in page for name in skipped_step.PARTS)
    for size in (workloads.FLUX, workloads.WAN, workloads.HUNYUAN_VIDEO):
        tensor, text = size.tensor_bytes(), 2 * size.text_tokens * size.shape[2] * 2
        moved = [*(passes * tensor for passes in (8, 9, 11)), 48 * tensor + text]
        cells = " | ".join(f"{num_bytes / 4.3e12 * 1e3:.2f} ms" for num_bytes in moved)
        assert f"| {size.description} | {tensor / 1e6:.0f} | {cells} |" in page
