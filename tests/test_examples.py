"""The examples draw what the package draws, on the shipped models and on saved pipelines."""

from __future__ import annotations

import re
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy
import pipeline_folders
import pytest
import torch
from PIL import Image, ImageSequence

from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.demo import pipelines
from dicache.demo.pictures import save_animation, to_image

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as `python docs/examples/NAME.py ...` would, and returns what it prints."""

    def script(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return script


def pixels(path):
    image = Image.open(path)
    return numpy.stack(
        [numpy.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    )


def save(tmp_path, video):
    save_animation(tmp_path / "expected.gif", [to_image(frame) for frame in video], 1000 // 16)
    return pixels(tmp_path / "expected.gif")


@pytest.mark.parametrize("options", [[], ["--by-sample"], ["--compile"]])
def test_text_to_image(run, options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    text = run("text_to_image", "--steps", 12, "--out", tmp_path, *options)

    prompts = pipelines.default_prompts("flux")[:2]
    pipe = pipelines.load_pipeline("flux")
    granularity = "sample" if "--by-sample" in options else "batch"
    for name in ("without", "cached"):
        if name == "cached":
            apply_dicache(pipe, DiCacheConfig(granularity=granularity))
        drawn = pipelines.decode("flux", pipe(**pipelines.pipeline_inputs("flux", prompts, 0, 12)))
        for index, picture in enumerate(drawn):
            found = pixels(tmp_path / f"{index}-{name}.png")[0]
            assert numpy.array_equal(found, numpy.asarray(to_image(picture)))
    stats = get_stats(pipe)["transformer"]
    assert stats.num_reused > 0 and text.endswith(stats.summary() + "\n")
    assert all(re.search(rf"^{prompt}: \d\d\.\d dB$", text, re.M) for prompt in prompts)


def test_calibrated_video(run, tmp_path):
    options = ["--steps", 8, "--target-speedup", 2, "--out", tmp_path]
    first = run("calibrated_video", *options)
    assert f"wrote {tmp_path / '8-steps.json'}" in first
    video = pixels(tmp_path / "video.gif")
    again = run("calibrated_video", *options)
    assert first.endswith(again) and "wrote" not in again  # the profile was there

    pipe = pipelines.load_pipeline("wan")
    apply_dicache(pipe, DiCacheConfig(profile=tmp_path / "8-steps.json", target_speedup=2))
    inputs = pipelines.pipeline_inputs("wan", pipelines.default_prompts("wan")[0], 0, 8)
    expected = pipelines.decode("wan", pipe(**inputs))[0]
    assert numpy.array_equal(video, save(tmp_path, expected))
    assert get_stats(pipe)["transformer"].num_reused > 0


def test_a_loop_of_calls(run, tmp_path):
    text = run("loop_of_calls", "--steps", 16, "--out", tmp_path)

    pipe = pipelines.load_pipeline("wan")
    apply_dicache(pipe)
    inputs = pipelines.pipeline_inputs("wan", pipelines.default_prompts("wan")[0], 0, 16)
    expected = pipelines.decode("wan", pipe(**inputs))[0]
    assert numpy.array_equal(pixels(tmp_path / "video.gif"), save(tmp_path, expected))
    reused = get_stats(pipe)["transformer"].num_reused
    columns = re.findall(r"^branch\d +16 +\d+ +\d+ +(\d+)", text, re.M)
    assert len(columns) == 2 and sum(map(int, columns)) == reused > 0


def test_a_loop_of_calls_runs_on_a_saved_pipeline(run, tmp_path):
    folder = pipeline_folders.save_wan(tmp_path / "wan")
    size = ["--size", 32, 48, "--frames", 5]
    run("loop_of_calls", "--model", folder, "--steps", 2, "--out", tmp_path, *size)
    assert pixels(tmp_path / "video.gif").shape[1:] == (32, 48, 3)


def test_own_model(run):
    before, after, off = re.search(
        r"(\d+) blocks without cache, (\d+) with, relative error (\S+)$",
        text := run("own_model"),
        re.M,
    ).groups()
    assert int(before) == 30 * 4
    computed, resumed, reused = map(int, re.search(r"30 +(\d+) +(\d+) +(\d+)", text).groups())
    assert int(after) == 4 * (computed + resumed) + reused < int(before)
    assert 0 < float(off) < 0.02
