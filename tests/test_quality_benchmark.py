"""benchmarks/quality.py stays runnable, and counts and compares what it says it does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache
from dicache.demo import pipelines

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(quality: ModuleType):
    """One Flux sample of eight steps, in this process."""
    return quality.Bench("flux", steps=8, seeds=[7], run=map, num_points=2)


def test_counter_agrees_with_the_stats_of_the_run(quality: ModuleType) -> None:
    """Calls counted below the hooks are those that RunStats reports."""
    pipe, counter = quality.load("flux")
    counter.per_call.clear()
    apply_dicache(pipe, DiCacheConfig(schedule="CCRRCRC"))
    pipe(**pipelines.pipeline_inputs("flux", quality.prompt_of("flux", 7), 7, 7))
    assert counter.per_call == [9, 9, 1, 1, 9, 1, 9]
    assert get_stats(pipe)["transformer"].block_calls == sum(counter.per_call)
    remove_dicache(pipe)


def test_cost_scales_computed_steps_to_the_siblings_depth(quality: ModuleType) -> None:
    """Three steps computed and one reused: 4 L / (3 L + 1) at every depth L."""
    assert quality.cost_of([9, 9, 1, 9], 9, 9) == 36 / 28
    assert quality.cost_of([9, 9, 1, 9], 9, 57) == 228 / 172
    assert quality.cost_of([9, 0, 0], 9, 57) == 3


def test_cells_are_linear_in_cost(quality: ModuleType) -> None:
    """Half-way between 50 dB at 1.5x and 40 dB at 2.5x lie 45 dB, the worst sample likewise."""
    points = [
        quality.Point(0.2, [38.0, 42.0], (2.5, 3.5)),
        quality.Point(0.1, [44.0, 56.0], (1.5, 1.8)),
    ]
    assert quality.at_cost(points, 0, 2.0) == (45.0, 41.0)
    assert quality.at_cost(points, 0, 3.0) is None
    assert quality.cell(points, (0, 3.0), (60.0, 50.0)) == "not reachable (2.50x)"


def test_psnr_is_capped(quality: ModuleType) -> None:
    """An error of 0.1 everywhere is 20 dB; equal pictures are 100 dB, not infinity."""
    pictures = np.full((2, 3), 0.5)
    assert quality.psnr(pictures, pictures + 0.1) == pytest.approx(20.0)
    assert quality.psnr(pictures, pictures) == 100.0


def test_every_cache_skips_blocks_and_computes_where_it_is_strict(
    quality: ModuleType, bench
) -> None:
    """No method runs in a mode that never caches, and a threshold of 0 means un-cached."""
    for method in quality.caches("flux"):
        loose = bench.measure(9.0, method.configure(9))
        assert loose.cost[0] > 1.2, method.name
        if not method.settings:
            strict = bench.measure(0.0, method.configure(0))
            assert strict.cost == (1.0, 1.0), method.name
            assert strict.psnr == [100.0], method.name


def test_writes_table_plot_and_raw_numbers(quality: ModuleType, tmp_path: Path) -> None:
    """A run leaves all three files, and a second one for less keeps to the same form."""
    small = ["--model", "flux", "--seeds", "1", "--steps", "8", "--points", "1", "--jobs", "1"]
    quality.main([*small, "--only", "FirstBlock", "Taylor", "--out", str(tmp_path)])
    table = (tmp_path / "quality.md").read_text()
    assert "| FirstBlockCache |" in table and "| TaylorSeer lite, order 1 |" in table
    assert (tmp_path / "quality.png").stat().st_size > 0
    stored = json.loads((tmp_path / "quality.json").read_text())
    assert list(stored["flux"]["curves"]) == ["FirstBlockCache", "TaylorSeer lite, order 1"]
