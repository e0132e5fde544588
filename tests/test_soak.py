"""benchmarks/soak.py stays runnable, finds nothing wrong, and finds what is planted."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("psutil")

from dicache.core.step import Step

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"
ARGUMENTS = ["--tiny", "--seed", "1", "--runs"]


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sixteen_runs_pass(soak: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Among them every model, every end and every kind of rules, or they would say little."""
    assert soak.main([*ARGUMENTS, "16"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    told = "\n".join(lines)
    for word in ("flux,", "hunyuan-video,", "wan,", *soak.ENDS, "raised after", "batch 2"):
        assert word in told
    for word in ("default", "same rules", "reused in a row", "a sample", "in fp8", "in bf16"):
        assert word in told
    assert re.search(r"tensors \d+", told)
    computed, resumed, reused = map(int, re.findall(r"(\d+) (?:computed|resumed|reused)", summary))
    assert min(computed, resumed, reused) > 10


def test_runs_depend_on_their_seed_and_number_alone(soak: ModuleType) -> None:
    models = soak.tiny_models()
    plans = [soak.draw(models, seed, number).title for seed in (0, 1) for number in (2, 3)]
    assert len(set(plans)) == 4
    assert soak.draw(models, 0, 3).title == plans[1]


def failure(soak: ModuleType, output: str) -> str:
    """What the last run failed of, after checking that it says how to repeat it."""
    *passed, reason, _, repeat = output.splitlines()
    number = len(passed)
    assert reason.startswith(f"run {number}: ")
    assert repeat.endswith(f"soak.py --seed 1 --runs {number + 1} --tiny")
    return reason


def test_a_leak_is_found(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, record = [], Step.record

    def keep(self: Step, y: Tensor) -> Tensor:
        kept.append(y.mean())  # small: it is the number of tensors that counts
        return record(self, y)

    monkeypatch.setattr(Step, "record", keep)
    assert soak.main([*ARGUMENTS, "16"]) == 1
    assert "tensors are alive" in failure(soak, capsys.readouterr().out)


def test_a_wrong_result_is_found(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some reused steps, not the same ones in a run and its reference, mix their tokens up."""
    count, reuse = itertools.count(), Step.reuse

    def spoil(self: Step, *args: Any) -> Tensor:
        y = reuse(self, *args)
        return y.flip(1) if next(count) % 7 == 0 else y

    monkeypatch.setattr(Step, "reuse", spoil)
    assert soak.main([*ARGUMENTS, "16"]) == 1
    assert "deviates" in failure(soak, capsys.readouterr().out)


def test_steps_that_are_not_in_the_statistics_are_found(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, record = itertools.count(), Step.record

    def forget(self: Step, y: Tensor) -> Tensor:
        return y if next(count) == 100 else record(self, y)

    monkeypatch.setattr(Step, "record", forget)
    assert soak.main([*ARGUMENTS, "16"]) == 1
    reason = failure(soak, capsys.readouterr().out)
    # A run's own lack is seen where it ended as it should, otherwise that of its reference is.
    assert "of them in the statistics" in reason or "did not follow the schedule" in reason


def test_a_growing_process_is_found(soak: ModuleType) -> None:
    mebibyte = 2**20
    flat = [500 * mebibyte + (number % 7) * mebibyte for number in range(80)]
    assert "MiB in the last" in soak.judge_memory(flat)
    with pytest.raises(soak.ViolationError, match="grew"):
        soak.judge_memory([500 * mebibyte + 2 * number * mebibyte for number in range(80)])
    assert "too few" in soak.judge_memory(flat[:20])
