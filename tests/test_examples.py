"""The examples draw what the package draws, on the shipped models and on saved pipelines."""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
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


def test_controlnet(run, tmp_path):
    text = run("controlnet", "--steps", 20, "--end", 0.5, "--out", tmp_path)
    psnr, mask = re.search(r"^(\d+\.\d) dB, ([CR]{20}) ", text, re.M).groups()
    assert mask[10:12] == "CC"  # where the residuals end, the trajectory begins anew
    without, cached = (pixels(tmp_path / f"{n}.png") / 255.0 for n in ("without", "cached"))
    # Rounding to 8 bits adds the variance of two uniform distributions, a level wide.
    expected = -10 * math.log10(10 ** (-float(psnr) / 10) + 2 / 12 / 255**2)
    assert -10 * math.log10(((without - cached) ** 2).mean()) == pytest.approx(expected, abs=1)

    longer = run("controlnet", "--steps", 20, "--end", 1, "--out", tmp_path / "longer")
    assert "CC" not in re.search(r" ([CR]{20}) ", longer)[1][9:13]
    pipe = pipelines.load_pipeline("flux")
    prompt = pipelines.default_prompts("flux")[0]
    plain = pipelines.decode("flux", pipe(**pipelines.pipeline_inputs("flux", prompt, 0, 20)))[0]
    for folder in (tmp_path, tmp_path / "longer"):  # the ControlNet does something
        off = pixels(folder / "without.png")[0] / 255.0 - numpy.asarray(to_image(plain)) / 255.0
        assert (off**2).mean() > 1e-3


def test_processes_that_split_a_sequence(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--steps", "12", "--out", str(tmp_path)]
    command = [sys.executable, *launch, str(EXAMPLES / "split_sequence.py"), *options]
    paths = os.pathsep.join([str(EXAMPLES.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    pipe = pipelines.load_pipeline("flux")
    apply_dicache(pipe)
    prompt = pipelines.default_prompts("flux")[0]
    whole = pipelines.decode("flux", pipe(**pipelines.pipeline_inputs("flux", prompt, 0, 12)))[0]
    stats = get_stats(pipe)["transformer"]
    mask = stats.mask("cond")
    assert re.findall(r"^rank (\d): ([CR]+) ", done.stdout, re.M) == [("0", mask), ("1", mask)]
    stats.cache_bytes //= 2  # each keeps its half of the tokens
    assert done.stdout.endswith(stats.summary() + "\n") and "R" in mask
    picture = pixels(tmp_path / "picture.png")[0].astype(int)
    assert abs(picture - numpy.asarray(to_image(whole))).max() <= 1


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
