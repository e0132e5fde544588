"""Every option of the command line reaches what it is for."""

from __future__ import annotations

import functools
import json

import pipeline_folders
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from dicache import DiCacheConfig
from dicache.cli import main
from dicache.demo import pipelines

# A zero is given, too; so is an empty text.
OPTIONS = {
    "--steps": 3,
    "--height": 32,
    "--width": 48,
    "--guidance-scale": 0,
    "--true-cfg-scale": 2.5,
    "--negative-prompt": "blue",
}
ARGUMENTS = {
    "num_inference_steps": 3,
    "height": 32,
    "width": 48,
    "guidance_scale": 0.0,
    "true_cfg_scale": 2.5,
    "negative_prompt": "blue",
}


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return pipeline_folders.save_flux(tmp_path_factory.mktemp("pipelines") / "flux")


@pytest.fixture
def calls(monkeypatch):
    """What Flux pipelines were called with since, and in which dtype they were."""
    made = []
    usual = FluxPipeline.__call__

    @functools.wraps(usual)
    def call(pipe, *arguments, **options):
        made.append({**options, "dtype": pipe.dtype})
        return usual(pipe, *arguments, **options)

    monkeypatch.setattr(FluxPipeline, "__call__", call)
    return made


def run(command, **options):
    line = [command, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]
    line += [f"{name}={value}" for name, value in OPTIONS.items()] if command != "bench" else []
    return main(line)


def seeds(calls):
    return [call["generator"].initial_seed() for call in calls]


def shared(call, expected=ARGUMENTS):
    return {name: call[name] for name in expected}


def test_generate_calls_the_pipeline_as_it_is_told(flux_folder, tmp_path, calls, capsys):
    given = {"model": flux_folder, "prompt": "x", "seed": 2**32 - 1, "dtype": "fp16"}
    assert run("generate", **given, out=tmp_path) == 0
    (call,) = calls
    assert shared(call) == ARGUMENTS and call["prompt"] == "x"
    assert seeds(calls) == [2**32 - 1] and call["dtype"] == torch.float16
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["arguments"] == ARGUMENTS
    assert (stats["seed"], stats["prompt"], stats["dtype"]) == (2**32 - 1, "x", "float16")
    assert "--negative-prompt" not in capsys.readouterr().err
    assert run("generate", **{**given, "seed": 2**32}, out=tmp_path) == 2
    assert "--seed" in capsys.readouterr().err


def test_generate_warms_up_with_one_step_before_it_compares(flux_folder, tmp_path, calls):
    line = ["generate", "--model", str(flux_folder), "--prompt", "x", "--compare"]
    assert main([*line, "--steps", "3", "--height=32", "--width=32", f"--out={tmp_path}/a/b"]) == 0
    assert [call["num_inference_steps"] for call in calls] == [1, 3, 3]


def test_a_file_of_prompts_is_drawn_with_all_options(flux_folder, tmp_path, calls):
    (tmp_path / "prompts").write_text("x\n")
    given = {"model": flux_folder, "prompts": tmp_path / "prompts", "seed": 7, "dtype": "bf16"}
    assert run("generate", **given, out=tmp_path) == 0
    (call,) = calls
    assert shared(call) == ARGUMENTS and seeds(calls) == [7] and call["dtype"] == torch.bfloat16
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["arguments"] == ARGUMENTS and settings["dtype"] == "bfloat16"
    assert settings["versions"]["torch"] == torch.__version__


def test_tune_calls_the_pipeline_as_it_is_told(flux_folder, tmp_path, calls, capsys):
    (tmp_path / "prompts").write_text("x\ny\n")
    given = {"model": flux_folder, "prompts": tmp_path / "prompts", "dtype": "bfloat16"}
    more = {"samples": 3, "gains": 0, "seed": 7}
    assert run("tune", **given, **more, out=tmp_path / "p.json") == 0
    assert all(shared(call) == ARGUMENTS for call in calls)
    assert [call["prompt"] for call in calls] == ["x", "y", "x"] and seeds(calls) == [7, 8, 9]
    assert calls[0]["dtype"] == torch.bfloat16
    assert "3/3 [" not in capsys.readouterr().err  # tune has a bar of its own, over all runs


def test_tune_measures_gains_and_has_seeds_of_its_own(tmp_path, monkeypatch):
    """As docs/calibration.md says: sixteen, and others than those that one draws with."""
    asked, drawn = [], []
    usual = pipelines.pipeline_inputs

    def recorded(name, prompt, seed, steps):
        drawn.append((seed, steps))
        return usual(name, prompt, seed, steps)

    def calibrate(pipe, run, samples, gains, **_):
        asked.append((samples, gains))
        run(1)
        raise ValueError("far enough")

    monkeypatch.setattr(pipelines, "pipeline_inputs", recorded)
    monkeypatch.setattr("dicache.cli.tune.calibrate", calibrate)
    assert main(["tune", "--model=flux", "--steps=4", f"--out={tmp_path / 'p.json'}"]) == 2
    assert asked == [(2, 16)] and drawn[-1] == (1001, 4)


def test_bench_calls_the_pipeline_as_it_is_told(flux_folder, tmp_path, calls):
    (tmp_path / "prompts").write_text("x\n")
    given = {"model": flux_folder, "prompts": tmp_path / "prompts", "dtype": "bfloat16"}
    size = {"height": 32, "width": 48, "guidance_scale": 0}
    more = {"methods": "fewer steps", "steps": 4, "speedups": 2, "seeds": 2, "first_seed": 5}
    assert run("bench", **given, **size, **more, out=tmp_path) == 0
    expected = {"height": 32, "width": 48, "guidance_scale": 0.0}
    assert all(shared(call, expected) == expected for call in calls)
    assert {call["prompt"] for call in calls} == {"x"} and {*seeds(calls)} == {5, 6}
    assert {call["dtype"] for call in calls} == {torch.bfloat16}
    assert {call["num_inference_steps"] for call in calls} >= {4, 2}


def test_demo_draws_by_the_rules_that_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dicache.cli.demo.SAMPLES", 1)
    line = ["demo", "--model=flux", "--steps=2", "--preset=flux", "--threshold=0.3"]
    assert main([*line, f"--out={tmp_path}"]) == 0
    stats = json.loads((tmp_path / "flux" / "stats.json").read_text())
    used = stats["samples"][0]["transformers"]["transformer"]["config"]
    expected = DiCacheConfig.preset("flux", threshold=0.3)
    assert (stats["summary"]["computed"], stats["summary"]["size"]) == (2, "32 x 32")
    assert (used["threshold"], used["error"]) == (0.3, expected.error)
    assert stats["versions"]["torch"] == torch.__version__

    line = ["demo", "--model=wan", "--steps=12", "--schedule=CCCCCCRRCCCC"]
    assert main([*line, f"--out={tmp_path}"]) == 0
    assert "letters" not in capsys.readouterr().err  # of the shorter run that warms up
    stats = json.loads((tmp_path / "wan" / "stats.json").read_text())
    assert stats["summary"]["reused"] == 2 * 2  # by both branches
    assert Image.open(tmp_path / "wan" / "animation.gif").n_frames == stats["summary"]["frames"]


def test_a_tilde_is_the_home_folder_in_every_path(flux_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(flux_folder)
    (tmp_path / "prompts").write_text("x\n")
    assert run("tune", model="~/model", prompts="~/prompts", gains=0, out="~/p.json") == 0
    given = {"model": "~/model", "profile": "~/p.json", "target_speedup": 1.2}
    assert run("generate", **given, prompts="~/prompts", out="~/many") == 0
    assert (tmp_path / "many" / "manifest.jsonl").is_file()
    assert run("generate", **{**given, "model": flux_folder}, prompts="prompts", out="many") == 0
    assert "0 drawn, 1 finished before" in capsys.readouterr().out
    assert run("generate", **given, prompt="x", out="~/one") == 0
    (picture,) = (tmp_path / "many").glob("*.png")
    assert main(["compare", f"~/many/{picture.name}", "~/one/output.png"]) == 0
    assert not (tmp_path / "~").exists()
