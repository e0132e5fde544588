"""`dicache tune` makes the profile that `generate` and `demo` then keep their targets by."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pipeline_folders
import pytest
import torch
from tiny_pipelines import pipeline, run

from dicache import DiCacheConfig, Profile, apply_dicache, calibrate, get_stats
from dicache.cli import main
from dicache.demo import pipelines
from dicache.demo.profiles import PROFILE_STEPS, shipped_profile
from dicache.profiling import expect

SIZE = ["--height", "32", "--width", "32"]


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return pipeline_folders.save_flux(tmp_path_factory.mktemp("pipelines") / "flux")


def test_a_tuned_pipeline_is_generated_from_as_fast_as_was_asked(flux_folder, tmp_path, capsys):
    out = tmp_path / "made" / "profile.json"
    (tmp_path / "prompts").write_text("red circle\n\n  blue square \n")
    options = ["--model", flux_folder, "--prompts", tmp_path / "prompts", "--steps", 6, *SIZE]
    options += ["--samples", 1, "--gains", 2, "--target-speedup", 2, "--out", out]
    assert main(["tune", *map(str, options)]) == 0

    printed = capsys.readouterr().out
    profile = Profile.load(out)
    assert (profile.num_steps, profile.samples, profile.peak) == (6, 1, 1.0)
    assert profile.about["height"] == 32 and profile.about["target_speedup"] == 2
    # 9 blocks, 3 of 6 steps computed: 54 calls against 3 x 9 + 3 x 1; 2 would be 54 to 22.
    assert "3 of 6 steps" in printed and f"{54 / 30:.2f}x" in printed and "dB" in printed
    lines = [line for line in printed.splitlines() if line.startswith(("from", "config", "apply"))]
    pipe = pipelines.load_pipeline("flux")
    exec("\n".join(lines), {"pipe": pipe})
    assert pipe.transformer._cache_config.target_speedup == 2

    base = ["generate", "--model", flux_folder, "--prompt", "red circle", "--steps", 6, *SIZE]
    drawn = tmp_path / "drawn"
    options = ["--profile", out, "--target-speedup", 2, "--out", drawn]
    assert main([str(each) for each in [*base, *options]]) == 0
    report = json.loads((drawn / "stats.json").read_text())["transformers"]["transformer"]
    assert report["stats"]["planned"] == {"cond": 3}
    assert report["config"]["target_speedup"] == 2 and "6 steps" in report["config"]["profile"]
    options = ["--profile", out, "--target-psnr", 20, "--out", drawn]
    assert main([str(each) for each in [*base, *options]]) == 0
    report = json.loads((drawn / "stats.json").read_text())["transformers"]["transformer"]
    assert report["config"]["target_psnr"] == 20


def test_tune_calibrates_as_python_does_on_the_prompts_of_the_file(tmp_path, capsys):
    (tmp_path / "prompts").write_text("red circle center on white\nblue ring center on black\n")
    options = ["--model", "flux", "--prompts", tmp_path / "prompts", "--steps", 4, "--seed", 7]
    out = tmp_path / "p.json"
    assert main(["tune", *map(str, [*options, "--gains", 0, "--out", out])]) == 0
    usage = f"config = DiCacheConfig(profile={str(out)!r}, target_speedup=2.5)"
    assert usage in capsys.readouterr().out.splitlines()

    pipe = pipelines.load_pipeline("flux")
    prompts = ["red circle center on white", "blue ring center on black"]

    def draw(index: int) -> torch.Tensor:
        inputs = pipelines.pipeline_inputs("flux", prompts[index], 7 + index, 4)
        return pipelines.decode("flux", pipe(**inputs))

    made = Profile.load(out).to_dict()
    expected = calibrate(pipe, draw, samples=2, gains=0).to_dict()
    del made["about"], expected["about"]
    assert json.dumps(made) == json.dumps(expected)


def trouble(capsys, *arguments):
    """The one line that a command says on stderr, and exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    assert [line for line in lines if line] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-speedup", 2, "--target-psnr", 40], "expected one of them"),
        (["--target-speedup", 0.5], "target_speedup is 0.5"),
        (["--target-psnr", 40, "--gains", 0], "--gains above 0"),
        (["--prompts", "missing"], "--prompts missing cannot be read"),
        (["--prompts", "empty"], "expected a prompt a line"),
        (["--prompts", "other"], "demo models know no other words"),
        (["--height", 32], "takes no height"),
        (["--steps", 2], "three or more steps"),
        (["--out", "folder"], "is a folder"),
        (["--out", "empty/profile.json"], "cannot be written"),
    ],
)
def test_tune_refuses_in_one_line_and_leaves_no_file(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty").write_text("\n")
    Path("other").write_text("a lighthouse in a storm\n")
    arguments = ["tune", "--model", "flux", *options]
    arguments += [] if "--out" in options else ["--out", "profile.json"]
    assert words in trouble(capsys, *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "empty", "other"}


def test_generate_refuses_profiles_that_do_not_fit_in_one_line(flux_folder, tmp_path, capsys):
    base = ["generate", "--model", flux_folder, "--prompt", "x", "--out", tmp_path]
    assert "there is no profile" in trouble(capsys, *base, "--target-speedup", 2)
    line = trouble(capsys, *base, "--profile", tmp_path / "missing.json")
    assert "missing.json cannot be read" in line
    assert f"--profile {tmp_path} cannot be read" in trouble(capsys, *base, "--profile", tmp_path)
    (tmp_path / "text.json").write_text("{}")
    assert "text.json: the format is None" in trouble(
        capsys, *base, "--profile", tmp_path / "text.json"
    )
    shipped_profile("wan").save(tmp_path / "wan.json")
    options = ["--profile", tmp_path / "wan.json", "--target-speedup", 2]
    assert "does not know this model" in trouble(capsys, *base, *options)


def test_the_demo_keeps_its_target_by_the_shipped_profile(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dicache.cli.demo.SAMPLES", 1)
    options = ["demo", "--model", "flux", "--out", str(tmp_path)]
    assert main([*options, "--target-speedup", "2"]) == 0
    data = json.loads((tmp_path / "flux" / "stats.json").read_text())
    assert data["summary"]["fewer_blocks"] == pytest.approx(2, rel=0.05)
    assert data["samples"][0]["transformers"]["transformer"]["stats"]["planned"] == {"cond": 13}

    assert main([*options, "--steps", "4", "--schedule", "CCRC"]) == 0
    data = json.loads((tmp_path / "flux" / "stats.json").read_text())
    assert data["summary"]["reused"] == 1
    capsys.readouterr()
    assert "needs a profile" in trouble(
        capsys, "demo", "--model", "wan", "--sparse", "--target-psnr", 40, "--out", tmp_path
    )
    assert (
        "expected one of"
        in trouble(capsys, *options, "--target-psnr", 40, "--threshold", 1).lower()
    )


@pytest.mark.parametrize("name", PROFILE_STEPS)
def test_every_demo_model_has_its_profile(name):
    profile = shipped_profile(name)
    assert profile.num_steps == PROFILE_STEPS[name] and len(profile.gains) == profile.num_steps
    apply_dicache(pipelines.load_pipeline(name), DiCacheConfig(profile=profile, target_psnr=40))
    with pytest.raises(ValueError, match="has no profile"):
        shipped_profile(f"{name}-long")


def test_shipped_profiles_come_from_the_script(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks" / "train"))
    monkeypatch.delitem(sys.modules, "profiles", raising=False)
    import profiles

    monkeypatch.setitem(profiles.PROFILE_STEPS, "flux", 3)
    made = profiles.make_profile("flux", samples=1, gains=1)
    shipped = shipped_profile("flux")
    assert made.models["transformer"].identity == shipped.models["transformer"].identity
    assert made.about["seeds"] == [1000, 1007] and shipped.about["seeds"] == [1000, 1015]
    assert (made.samples, shipped.samples) == (8, 16)
    assert {**made.about, "seeds": 0}.keys() == shipped.about.keys()


def test_the_benchmark_of_targets_measures_what_was_drawn(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from targets import measure

    (row,) = measure("flux", 1, [{"target_speedup": 3}])
    assert row["speedup"] == pytest.approx((270 / (8 * 9 + 22), 270 / (8 * 9 + 22)))
    # One sample: its error is the mean one, and far from none and from all.
    assert row["psnr_of_mean_error"] == row["mean_psnr"] == row["worst_psnr"]
    assert 25 < row["mean_psnr"] < 90
    assert row["reached"] == (row["mean_psnr"] >= row["expected_psnr"])


def test_what_is_expected_of_a_plan_is_what_a_run_does():
    pipe = pipeline("wan")
    profile = calibrate(pipe, lambda i: run("wan", pipe, 8, seed=i), samples=1, gains=3)
    config = DiCacheConfig(profile=profile, target_speedup=1.6, veto=None)
    expected = expect(profile, config)
    reference = run("wan", pipe, 8)
    apply_dicache(pipe, config)
    made = run("wan", pipe, 8)
    stats = get_stats(pipe)["transformer"]
    assert expected.masks == {"transformer": stats.mask("cond")}
    assert expected.computed == stats.mask("uncond").count("C")
    assert expected.speedup == pytest.approx(stats.block_speedup)
    # Of the sample that was calibrated on: as far off as gains between measured steps are.
    square = float((made - reference).square().mean())
    peak = float(reference.max() - reference.min())
    actual = 10 * torch.tensor(peak**2 / square).log10()
    assert expected.psnr == pytest.approx(float(actual), abs=6)
