"""The `dicache` command does what it says, and says in one line what it cannot do."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
import warnings
from dataclasses import asdict

import imageio.v3
import numpy
import pipeline_folders
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.utils import logging
from PIL import Image

import dicache
from dicache import DiCacheConfig, apply_dicache, get_stats
from dicache.cli import main, many, tune
from dicache.cli.errors import InputError, one_line, plain_warnings
from dicache.cli.generate import (
    Request,
    check_arguments,
    find_dtype,
    refused_arguments,
    write_output,
)
from dicache.driver.families import supported_families
from dicache.ops import backend_status, build_record

SIZE = ["--height", "32", "--width", "32"]


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return pipeline_folders.save_flux(tmp_path_factory.mktemp("pipelines") / "flux")


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    return pipeline_folders.save_wan(tmp_path_factory.mktemp("pipelines") / "wan")


def generate(folder, out, *options):
    """Run `dicache generate` and return its exit code and stats.json."""
    code = main(["generate", "--model", str(folder), "--out", str(out), *options])
    return code, json.loads((out / "stats.json").read_text())


def pixels(path):
    return numpy.asarray(Image.open(path).convert("RGB"))


def one_line_of_trouble(capsys, *arguments):
    """Run a command that must fail with exit code 2 and one line on stderr; return the line."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dicache: ")
    return lines[0]


def test_generate_draws_what_the_python_api_draws(flux_folder, tmp_path):
    options = ["--prompt", "red circle", "--steps", "8", "--seed", "3", "--threshold", "0.5", *SIZE]
    code, stats = generate(flux_folder, tmp_path, *options)

    pipe = DiffusionPipeline.from_pretrained(flux_folder)
    apply_dicache(pipe, DiCacheConfig(threshold=0.5))
    picture = pipe(
        "red circle",
        height=32,
        width=32,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(3),
    ).images[0]

    assert code == 0
    assert numpy.array_equal(pixels(tmp_path / "output.png"), numpy.asarray(picture))
    expected = get_stats(pipe)["transformer"].to_dict()
    assert stats["transformers"]["transformer"]["stats"] == json.loads(json.dumps(expected))
    assert (stats["device"], stats["dtype"], stats["pipeline"]) == (
        "cpu",
        "float32",
        "FluxPipeline",
    )
    assert Image.open(tmp_path / "schedule.png").width > 1000


def test_compare_adds_the_uncached_run_and_how_close_it_is(flux_folder, tmp_path, capsys):
    options = ["--prompt", "x", "--steps", "6", "--schedule", "CCRRCC", "--compare", *SIZE]
    code, stats = generate(flux_folder, tmp_path, *options)

    assert code == 0
    records = stats["transformers"]["transformer"]["stats"]["contexts"]["cond"]
    assert [record["action"][:3] for record in records] == [
        "com",
        "com",
        "reu",
        "reu",
        "com",
        "com",
    ]
    # 9 blocks: four full steps and two probes of one block each.
    assert stats["summary"]["fewer_blocks"] == pytest.approx(6 * 9 / (4 * 9 + 2 * 1))
    assert stats["summary"]["speedup"] == stats["seconds_uncached"] / stats["seconds"]
    plain, cached = (pixels(tmp_path / f"{n}.png") / 255.0 for n in ("uncached", "output"))
    error = ((plain - cached) ** 2).mean()
    if error > 1e-4:  # below, rounding to 8 bits is a part of it
        assert stats["psnr_db"] == pytest.approx(10 * numpy.log10(1 / error), abs=0.3)
    assert (tmp_path / "comparison.png").is_file()
    table = capsys.readouterr().out
    assert "PSNR" in table and "SSIM" in table and "wall-clock speed-up" in table


def test_a_cache_that_never_reuses_gives_the_uncached_picture(flux_folder, tmp_path):
    options = ["--prompt", "red circle", "--steps", "4", "--threshold", "0", "--compare", *SIZE]
    code, stats = generate(flux_folder, tmp_path, *options)

    assert code == 0
    assert stats["psnr_db"] == 100.0 and stats["ssim"] == pytest.approx(1.0, abs=1e-6)
    assert stats["summary"]["reused"] == 0 and stats["summary"]["fewer_blocks"] == 1.0
    assert numpy.array_equal(pixels(tmp_path / "output.png"), pixels(tmp_path / "uncached.png"))


def test_preset_and_threshold_reach_the_cache(flux_folder, tmp_path):
    options = ["--prompt", "x", "--steps", "2", "--preset", "flux", "--threshold", "inf", *SIZE]
    _, stats = generate(flux_folder, tmp_path, *options)

    used = stats["transformers"]["transformer"]["config"]
    expected = asdict(DiCacheConfig.preset("flux", threshold=0.0))
    expected |= {"threshold": "inf", "gamma_range": [1.0, 1.5]}  # JSON has no infinity, no tuples
    del expected["process_group"]  # of one process
    assert used == expected


def test_generate_writes_videos_and_keeps_branches_apart(wan_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dicache.cli.generate._has_ffmpeg", lambda: False)
    options = ["--prompt", "red circle moves right", "--negative-prompt", "blue", "--compare"]
    options += ["--steps", "5", "--num-frames", "5", "--height", "64", "--width", "64"]
    code, stats = generate(wan_folder, tmp_path, *options)

    assert code == 0
    contexts = stats["transformers"]["transformer"]["stats"]["contexts"]
    assert {name: len(records) for name, records in contexts.items()} == {"cond": 5, "uncond": 5}
    for name in ("output.gif", "uncached.gif", "animation.gif"):
        shown = Image.open(tmp_path / name)
        # 16 frames a second, in the hundredths of a second that a GIF has.
        assert shown.n_frames == 5 and shown.info["duration"] == pytest.approx(1000 / 16, abs=5)
    assert (stats["summary"]["size"], stats["summary"]["frames"]) == ("64 x 64", 5)


def test_one_step_runs(flux_folder, tmp_path):
    code, stats = generate(flux_folder, tmp_path, "--prompt", "x", "--steps", "1", *SIZE)
    assert code == 0 and stats["summary"]["computed"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], ["--steps"]),
        (["--steps", "many"], ["--steps"]),
        (["--preset", "fluxx"], ["fluxx", "hunyuan-video"]),
        (["--preset", "x" * 5000], ["xxx..."]),
        (["--threshold", "-1"], ["threshold", "-1"]),
        (["--threshold", "nan"], ["threshold", "nan"]),
        (["--schedule", "CXR"], ["schedule", "CXR"]),
        (["--dtype", "float8"], ["float8", "bfloat16"]),
        (["--device", "toaster"], ["toaster", "cpu"]),
        (["--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["--num-frames", "5"], ["FluxPipeline", "--num-frames"]),
        (["--seed", "-1"], ["--seed"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_generate_refuses_bad_options_in_one_line(flux_folder, tmp_path, capsys, options, words):
    # The progress bar of loading is not trouble; a test that gets that far starts counting behind.
    base = ["generate", "--model", flux_folder, "--prompt", "x", "--out", tmp_path]
    assert main([str(argument) for argument in [*base, *options]]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    assert [line for line in lines if line] == lines[-1:]
    assert lines[-1].startswith("dicache: ") and all(word in lines[-1] for word in words)
    assert len(lines[-1]) < 500
    assert not (tmp_path / "stats.json").exists()


def test_generate_needs_model_and_prompt(capsys):
    assert "--model" in one_line_of_trouble(capsys, "generate", "--prompt", "x")
    assert "--prompt" in one_line_of_trouble(capsys, "generate", "--model", "x")


def test_a_model_that_is_no_pipeline_is_one_line(flux_folder, tmp_path, capsys):
    out = ["--prompt", "x", "--out", tmp_path / "out"]
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    transformer = flux_folder / "transformer"

    line = one_line_of_trouble(capsys, "generate", "--model", transformer, *out)
    assert "model_index.json" in line
    for missing in (tmp_path / "missing", "/missing", "./missing", "~/missing", "a/b/c", "missing"):
        line = one_line_of_trouble(capsys, "generate", "--model", missing, *out)
        assert "neither a folder nor a Hub name" in line
    assert "file" in one_line_of_trouble(capsys, "generate", "--model", tmp_path / "file", *out)
    line = one_line_of_trouble(capsys, "generate", "--model", tmp_path / "broken", *out)
    assert "cannot load" in line


def test_what_diffusers_logs_is_told_but_while_it_loads(tmp_path, monkeypatch, capsys, request):
    """Then it is in the exception, too; later it may be about the prompt."""
    seen = []

    def refuse(*_, **__):
        seen.append(logging.get_verbosity())
        raise OSError("there is no such model")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    before = logging.get_verbosity()
    request.addfinalizer(lambda: logging.set_verbosity(before))
    logging.set_verbosity_info()
    options = ["--model", "a/b", "--prompt", "x", "--out", tmp_path]
    assert "OSError: there is no such model" in one_line_of_trouble(capsys, "generate", *options)
    assert seen == [logging.ERROR] and logging.get_verbosity() == logging.INFO


def test_auto_is_the_gpus_dtype_or_the_cpus():
    names = ("auto", "fp32", "fp16", "bf16", "float32", "float16", "bfloat16")
    given = [torch.float32, torch.float16, torch.bfloat16] * 2
    for device, auto in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        found = [find_dtype(name, torch.device(device)) for name in names]
        assert found == [auto, *given]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--negative-prompt", "blue"], True),
        (["--negative-prompt", "blue", "--true-cfg-scale", "1.5"], False),
        ([], False),
    ],
)
def test_a_negative_prompt_without_guidance_is_told(flux_folder, tmp_path, capsys, options, told):
    base = ["--prompt", "x", "--steps", "1", *SIZE]
    assert generate(flux_folder, tmp_path, *base, *options)[0] == 0
    words = "FluxPipeline ignores --negative-prompt unless --true-cfg-scale is above 1"
    assert (words in capsys.readouterr().err) == told


class NeedsPicture:
    def __call__(self, image, prompt, num_frames=1, **others): ...


class NeedsNothing:
    def __call__(self, output_type="pil", negative_prompt=None): ...


def test_a_pipeline_gets_what_it_takes_and_has_to_get_what_it_needs():
    def checked(pipe, **given):
        return check_arguments(pipe, Request("", "x", 0, given, {}, {}))

    with pytest.raises(InputError, match="NeedsPicture needs 'image'.*apply_dicache in Python"):
        checked(NeedsPicture())
    with pytest.raises(InputError, match="no num_inference_steps, so --steps cannot be used"):
        checked(NeedsNothing(), num_inference_steps=3)
    found = checked(NeedsNothing(), negative_prompt="y")
    assert found == {"output_type": "pt", "negative_prompt": "y"}


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_only_what_a_pipelines_check_refuses_is_the_users_mistake(error):
    def check_inputs():
        raise error("no such size")

    def broken():
        raise error("a bug")

    with pytest.raises(InputError, match="no such size"), refused_arguments():
        check_inputs()
    with pytest.raises(error, match="a bug"), refused_arguments():
        broken()


def test_too_little_memory_is_one_line(flux_folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dicache.cli.generate.draw_cached", full)
    assert main(["generate", "--model", str(flux_folder), "--prompt", "x"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dicache: not enough memory on cpu; try a smaller --height")


def test_pixels_that_are_no_numbers_are_told(flux_folder, tmp_path, monkeypatch, capsys):
    usual = FluxPipeline.__call__

    @functools.wraps(usual)
    def spoilt(pipe, *arguments, **options):
        result = usual(pipe, *arguments, **options)
        result.images[0, 0, 0, 0] = torch.nan
        return result

    monkeypatch.setattr(FluxPipeline, "__call__", spoilt)
    options = ["--model", str(flux_folder), "--out", str(tmp_path), "--steps", "1", *SIZE]
    words = "the pipeline's output has NaN or infinite pixels"
    assert main(["generate", "--prompt", "x", *options]) == 0
    assert f"dicache: warning: {words}" in capsys.readouterr().err
    (tmp_path / "prompts").write_text('{"prompt": "x", "name": "one"}')
    assert main(["generate", "--prompts", str(tmp_path / "prompts"), *options]) == 0
    assert f"dicache: warning: one: {words}" in capsys.readouterr().err
    assert words in (tmp_path / "manifest.jsonl").read_text()


def test_a_pipeline_goes_to_the_device_that_is_asked_for(flux_folder, tmp_path, monkeypatch):
    """Before anything is drawn; a pipeline on a device that is not here."""
    asked = []
    monkeypatch.setattr("dicache.cli.generate.find_device", torch.device)
    monkeypatch.setattr(tune, "find_device", torch.device)
    monkeypatch.setattr(many, "find_device", torch.device)

    def to(pipe, device):
        asked.append(device)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DiffusionPipeline, "to", to)
    options = ["--model", str(flux_folder), "--device", "xpu:3"]
    (tmp_path / "prompts").write_text("x")
    out = ["--out", str(tmp_path / "out")]
    assert main(["generate", *options, "--prompt", "x", *out]) == 2
    assert main(["generate", *options, "--prompts", str(tmp_path / "prompts"), *out]) == 2
    assert main(["tune", *options, "--out", str(tmp_path / "p.json")]) == 2
    assert asked == [torch.device("xpu:3")] * 3


@pytest.mark.parametrize("shape", [(3, 3, 48, 64), (3, 3, 50, 62)])
def test_a_video_keeps_its_size_and_has_sixteen_frames_a_second(shape, tmp_path):
    file = write_output(tmp_path, "film", torch.rand(shape))
    facts = imageio.v3.immeta(tmp_path / file, plugin="FFMPEG")
    assert file == "film.mp4" and facts["fps"] == 16
    assert facts["size"] == (shape[3], shape[2])


def test_an_unsupported_transformer_is_one_line(tmp_path, capsys):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    capsys.readouterr()
    options = ["--model", tmp_path / "ddpm", "--prompt", "x", "--out", tmp_path / "out"]
    code = main(["generate", *map(str, options)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "does not support DDPMPipeline" in line and "FluxTransformer" in line


def test_what_the_pipeline_itself_refuses_is_one_line(wan_folder, tmp_path, capsys):
    options = ["--model", str(wan_folder), "--height", "33", "--out"]
    for line in (
        ["generate", "--prompt", "x", *options, str(tmp_path)],
        ["tune", *options, str(tmp_path / "profile.json")],
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert "divisible by 16" in error.splitlines()[-1] and "Traceback" not in error
    (tmp_path / "prompts").write_text("x\n")
    line = ["generate", "--prompts", str(tmp_path / "prompts"), *options, str(tmp_path)]
    assert main(line) == 1
    assert " FAILED: `height` and `width` have to be" in capsys.readouterr().err


def test_out_must_be_a_folder(flux_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    options = ["--model", flux_folder, "--prompt", "x", "--out", tmp_path / "file"]
    assert "is a file" in one_line_of_trouble(capsys, "generate", *options)
    inside = ["--model", "flux", "--out", tmp_path / "file" / "inside"]
    assert "cannot be written to" in one_line_of_trouble(capsys, "demo", *inside)


def test_demo_tells_and_writes_what_the_cache_did(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dicache.cli.demo.SAMPLES", 2)
    options = ["--model", "flux", "--steps", "12", "--seed", "5", "--out", str(tmp_path)]
    code = main(["demo", *options])
    stats = json.loads((tmp_path / "flux" / "stats.json").read_text())

    assert code == 0
    files = {path.name for path in (tmp_path / "flux").iterdir()}
    assert files == {"comparison.png", "schedule.png", "stats.json"}
    told = capsys.readouterr()
    table = told.out
    assert "higher is closer" in " ".join(table.split())
    assert "warning" not in told.err  # of the short run that warms up, either
    assert table.split("\n")[0].strip() == "DiCache against the same runs without it"
    assert max(len(line) for line in table.splitlines() if "│" in line) <= 80
    assert f"{stats['summary']['fewer_blocks']:.2f}x" in table and "flux" in table
    assert [sample["seed"] for sample in stats["samples"]] == [5, 6]
    mean = sum(sample["psnr_db"] for sample in stats["samples"]) / 2
    assert stats["summary"]["psnr"] == pytest.approx(mean)


def test_demo_refuses_unknown_models_and_zero_steps(tmp_path, capsys):
    line = one_line_of_trouble(capsys, "demo", "--model", "sdxl", "--out", tmp_path / "out")
    assert "sdxl" in line and "hunyuan-video" in line
    assert not (tmp_path / "out").exists()
    assert "--steps" in one_line_of_trouble(capsys, "demo", "--steps", "0")
    assert "dmeo" in one_line_of_trouble(capsys, "dmeo")


def test_info_shows_every_family_and_why_a_backend_is_absent(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(
        family.name in text and family.model_class in text for family in supported_families()
    )
    words = " ".join(text.replace("│", " ").split())
    assert all(
        f"{family.preset} {family.name}, {family.threshold:g}" in words
        for family in supported_families()
        if family.preset and family.module == "diffusers"
    )
    assert all(
        f" {family.name} {family.model_class} {family.default_threshold:g} " in f"{words} "
        for family in supported_families()
    )
    assert f" cpu {platform.machine()}, {torch.get_num_threads()} threads " in words
    assert "…" not in text  # 80 characters are wide enough
    assert all(status in words for status in backend_status().values())
    assert dicache.__version__ in text and torch.__version__ in text
    built = build_record()
    assert not built or f"torch, at least {built['torch_stable_abi']}" in words


def test_info_says_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("dicache.cli.info._PACKAGES", ("torch", "no-such-package"))
    assert main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["no-such-package", "not", "installed"] in lines


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dicache {dicache.__version__}\n"
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in ("demo", "generate", "tune", "info"))


def test_python_runs_the_package_as_the_command():
    def run(*arguments):
        command = [sys.executable, "-m", "dicache", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("--version").stdout == f"dicache {dicache.__version__}\n"
    wrong = run("generate", "--threshold", "-1")
    assert wrong.returncode == 2 and wrong.stderr.startswith("dicache: ")


def test_help_imports_no_model_library():
    code = (
        "import sys; from dicache.cli import main; assert main(['generate', '--help']) == 0;"
        "heavy = {'diffusers', 'transformers', 'matplotlib', 'torchmetrics'};"
        "print(sorted(heavy & {*sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_missing_extras_name_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "dicache.cli.app", raising=False)
    assert "pip install 'dicache[cli]'" in one_line_of_trouble(capsys, "info")

    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("cli.demo", "demo.pictures", "demo.runner", "fonts", "schedule_plot"):
        monkeypatch.delitem(sys.modules, f"dicache.{name}", raising=False)
    assert "matplotlib" in one_line_of_trouble(capsys, "demo", "--model", "flux")


def test_other_warnings_stay_as_they_are_and_an_error_without_words_has_its_name():
    with pytest.warns(UserWarning, match="of a library"), plain_warnings():
        warnings.warn("of a library", stacklevel=1)
    assert one_line(KeyError()) == "KeyError"


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def broken():
        raise ValueError("a bug")

    monkeypatch.setattr("dicache.cli.info.print_info", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["info"])

    def missing():
        raise ModuleNotFoundError("No module named 'dicache.gone'", name="dicache.gone")

    monkeypatch.setattr("dicache.cli.info.print_info", missing)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        main(["info"])
