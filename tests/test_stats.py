"""Statistics for people say what was done: masks, work, plans and vetoes, and why nothing was."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_models import build, calls
from tiny_pipelines import pipeline, run

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    Profile,
    RunStats,
    StepRecord,
    apply_dicache,
    calibrate,
    get_stats,
)

RECORDS = [
    StepRecord(0, "compute"),
    StepRecord(1, "resume", 0.09, 0.12),
    StepRecord(2, "reuse", 0.03, 0.03, 1.2),
    StepRecord(3, "compute"),
]


def ran(kind: str, config: DiCacheConfig, num_steps: int = 6) -> RunStats:
    """Statistics of a pipeline's run."""
    pipe = pipeline(kind)
    apply_dicache(pipe, config)
    run(kind, pipe, num_steps)
    return get_stats(pipe)["transformer"]


def test_a_mask_is_the_schedule_that_repeats_the_run() -> None:
    assert RunStats({"cond": RECORDS}).mask("cond") == "CCRC"
    stats = ran("wan", DiCacheConfig(schedule="CCRRCRC"), num_steps=7)
    assert stats.mask("cond") == stats.mask("uncond") == "CCRRCRC"
    with pytest.raises(ValueError, match=r"no context 'main'.*'cond', 'uncond'"):
        stats.mask("main")


def test_samples_that_decide_for_themselves_have_a_mask_each() -> None:
    actions = {0: ("compute", "reuse", "resume"), 1: ("compute", "resume", "reuse")}
    records = [
        StepRecord(step, actions[sample][step], sample=sample)
        for step in range(3)
        for sample in (0, 1)
    ]
    stats = RunStats({"cond": records})
    assert [stats.mask("cond", sample=sample) for sample in (0, 1)] == ["CRC", "CCR"]
    for sample in (None, 2):
        with pytest.raises(ValueError, match=rf"sample is {sample}.*0, 1"):
            stats.mask("cond", sample)


def test_the_summary_counts_every_context_and_the_work_of_blocks() -> None:
    stats = ran("wan", DiCacheConfig(schedule="CCRRCR"))
    depth = stats.num_blocks
    text = stats.summary()
    rows = [line.split() for line in text.splitlines()]
    assert ["cond", "6", "3", "0", "3", "-"] in rows
    assert ["uncond", "6", "3", "0", "3", "-"] in rows
    assert depth > 1 and stats.block_speedup == pytest.approx(6 * depth / (3 * depth + 3))
    assert f"{stats.block_speedup:.2f}x less work" in text
    assert f"{stats.cache_bytes / 1e6:.1f} MB in {stats.cache_tensors} tensors" in text
    assert text.isascii() and "Nothing was reused" not in text


def test_work_is_counted_by_samples_where_they_decide_for_themselves() -> None:
    model = build("flux")
    rules = {"schedule": "CCRC", "num_inference_steps": 4, "granularity": "sample"}
    apply_dicache(model, DiCacheConfig(**rules))
    for inputs in calls("flux", 4, batch=3):
        with model.cache_context("cond"):
            model(**inputs)
    stats = get_stats(model)
    depth = stats.num_blocks
    assert stats.block_speedup == pytest.approx(4 * depth / (3 * depth + 1))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DiCacheConfig(threshold=0.0), "asked for all 4 steps that were probed"),
        (DiCacheConfig(threshold=1.0, retention_ratio=1.0), "no step was probed"),
        (DiCacheConfig(schedule="CC"), "schedule has 2 letters"),
    ],
)
@pytest.mark.filterwarnings("ignore::dicache.DiCacheWarning")
def test_the_summary_says_why_nothing_was_reused(config, words) -> None:
    text = ran("flux", config).summary()
    assert text.splitlines()[-1].startswith("Nothing was reused: ") and words in text


def test_the_warning_that_a_run_gave_is_what_its_summary_says() -> None:
    model = build("flux")
    apply_dicache(model)
    with pytest.warns(DiCacheWarning) as told:
        model(**calls("flux", 1)[0])
    stats = get_stats(model)
    assert stats.notes == [str(told[0].message)]
    assert stats.notes[0] in stats.summary()


def test_names_of_contexts_cannot_break_a_terminal() -> None:
    text = RunStats({"\x1b[31mé": RECORDS}).summary()
    assert text.isascii() and "\x1b" not in text


@pytest.fixture(scope="module")
def profile() -> Profile:
    pipe = pipeline("wan")
    with torch.no_grad():
        return calibrate(pipe, lambda i: run("wan", pipe, 8, seed=i), samples=1, gains=2)


def test_a_plan_that_is_followed_has_no_vetoes(profile) -> None:
    stats = ran("wan", DiCacheConfig(profile=profile, target_speedup=1.7, veto=None), num_steps=8)
    computed = {name: stats.mask(name).count("C") for name in ("cond", "uncond")}
    assert stats.planned == computed and 1 < computed["cond"] < 8
    assert stats.num_vetoes == 0
    assert f"{computed['cond']}" == stats.summary().splitlines()[1].split()[-1]


def test_every_step_that_a_probe_takes_from_a_plan_is_a_veto(profile) -> None:
    # As if the calibration had seen a probe that the trajectory predicts to the last bit.
    model = profile.models["transformer"]
    contexts = {name: replace(each, qq=each.qq * 0) for name, each in model.contexts.items()}
    exact = replace(profile, models={"transformer": replace(model, contexts=contexts)})
    stats = ran("wan", DiCacheConfig(profile=exact, target_speedup=1.7), num_steps=8)
    assert stats.num_reused == 0
    assert stats.num_vetoes == stats.num_resumed > 0
    assert f"vetoes {stats.num_vetoes}:" in stats.summary()


def test_a_plot_shows_the_run(tmp_path, monkeypatch) -> None:
    weighed = [replace(each, gamma=None, weights=(1.0, 0.2, 0.7)) for each in RECORDS[2:3]]
    RunStats({"cond": RECORDS, "uncond": [*RECORDS[:2], *weighed]}).plot(tmp_path / "run.png")
    assert Image.open(tmp_path / "run.png").width > 1000
    with pytest.raises(ValueError, match="no step to plot"):
        RunStats().plot(tmp_path / "none.png")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "dicache.schedule_plot")
    with pytest.raises(ModuleNotFoundError, match="RunStats.plot needs matplotlib"):
        RunStats({"cond": RECORDS}).plot(tmp_path / "run.png")
