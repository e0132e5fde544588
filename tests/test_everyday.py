"""What happens on an ordinary day: other folders, full disks, narrow terminals, wrong rules."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy
import pipeline_folders
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import build

import dicache
from dicache import DiCacheConfig, DiCacheWarning, apply_dicache, get_stats
from dicache.cli import main
from dicache.demo.pictures import difference_gain
from dicache.driver.families import supported_families

SIZE = ["--height", "32", "--width", "32"]


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return pipeline_folders.save_flux(tmp_path_factory.mktemp("pipelines") / "flux")


def generate(folder, out, *options):
    arguments = ["--model", folder, "--prompt", "red circle", "--out", out, *options]
    return main(["generate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("save", "size", "contexts"),
    [
        (pipeline_folders.save_hunyuan_video, {"height": 32, "width": 32, "num_frames": 5}, 1),
        (pipeline_folders.save_cogvideox, {"height": 16, "width": 16, "num_frames": 5}, 1),
        (pipeline_folders.save_chroma, {"height": 32, "width": 32}, 2),
    ],
)
def test_generate_draws_with_a_saved_folder_of_other_families(
    save, size, contexts, tmp_path, monkeypatch
):
    animations = []  # as they are before colours are counted
    monkeypatch.setattr("dicache.cli.generate._has_ffmpeg", lambda: False)
    monkeypatch.setattr(
        "dicache.cli.generate.save_animation", lambda *given: animations.append(given[1])
    )
    folder, out = save(tmp_path / "pipeline"), tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in size.items()]
    assert generate(folder, out, "--steps", "6", "--schedule", "CCCRRC", *options) == 0

    pipe = DiffusionPipeline.from_pretrained(folder)
    apply_dicache(pipe, DiCacheConfig(schedule="CCCRRC"))
    generator = torch.Generator().manual_seed(0)
    made = pipe("red circle", num_inference_steps=6, generator=generator, **size)
    expected = made.frames[0] if "num_frames" in size else made.images
    drawn = animations[0] if "num_frames" in size else [Image.open(out / "output.png")]
    assert len(expected) == len(drawn)
    assert all(map(numpy.array_equal, map(numpy.asarray, drawn), map(numpy.asarray, expected)))
    stats = json.loads((out / "stats.json").read_text())
    records = stats["transformers"]["transformer"]["stats"]["contexts"]
    assert len(records) == contexts
    actions = [[record["action"][0] for record in each] for each in records.values()]
    assert actions == [["c", "c", "c", "r", "r", "c"]] * contexts


def full_disk(monkeypatch, *folders):
    """Let no file of more than a byte be written below some folders."""
    write = Path.write_text

    def refuse(path, *args, **kwargs):
        if any(folder in path.parents for folder in folders):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse)  # it is used for the last file


def test_a_full_disk_loses_neither_table_nor_pictures(flux_folder, tmp_path, monkeypatch, capsys):
    out, spare = tmp_path / "out", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    assert generate(flux_folder, out, "--steps", "1", *SIZE) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()

    full_disk(monkeypatch, out)
    assert generate(flux_folder, out, "--steps", "1", "--seed", "1", *SIZE) == 2
    told = capsys.readouterr()
    assert "block calls, DiCache" in told.out
    line = told.err.splitlines()[-1]
    assert line.startswith(f"dicache: --out {out} cannot be written to") and "No space left" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    rescued = Path(line.rpartition("the files are in ")[2])
    assert rescued.parent == spare
    assert {path.name for path in rescued.iterdir()} == {"output.png", "schedule.png", "stats.json"}
    assert json.loads((rescued / "stats.json").read_text())["seed"] == 1

    full_disk(monkeypatch, out, spare)
    assert generate(flux_folder, out, "--steps", "1", *SIZE) == 2
    assert capsys.readouterr().err.count("No space left") == 2
    assert [*spare.iterdir()] == [rescued]


def test_a_full_disk_loses_no_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dicache.cli.demo.SAMPLES", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full_disk(monkeypatch, tmp_path / "out")
    assert main(["demo", "--model", "flux", "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "block calls, DiCache" in told.out and "the files are in" in told.err
    assert not any((tmp_path / "out" / "flux").iterdir())


def test_a_full_disk_loses_no_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full_disk(monkeypatch, tmp_path / "out")
    out = str(tmp_path / "out" / "mine.json")
    options = ["--samples", "1", "--gains", "0", "--steps", "6"]
    assert main(["tune", "--model", "flux", "--out", out, *options]) == 2
    told = capsys.readouterr()
    assert "less block work" in told.out
    folder = Path(told.err.splitlines()[-1].rpartition("the files are in ")[2])
    assert dicache.Profile.load(folder / "mine.json").num_steps == 6


def test_files_of_an_earlier_run_are_told(flux_folder, tmp_path, capsys):
    assert generate(flux_folder, tmp_path, "--steps", "1", "--compare", *SIZE) == 0
    (tmp_path / "my notes.txt").touch()
    assert "earlier run" not in capsys.readouterr().err
    assert generate(flux_folder, tmp_path, "--steps", "1", *SIZE) == 0
    told = capsys.readouterr()
    line = f"{tmp_path}: comparison.png, uncached.png: left from an earlier run"
    assert told.err.splitlines()[-1] == f"dicache: warning: {line}"
    assert told.out.splitlines()[-1] == f"{tmp_path}: output.png, schedule.png, stats.json"


@pytest.mark.parametrize("arguments", [["info"], ["info", "--families"], ["generate", "--help"]])
@pytest.mark.parametrize("columns", [80, 40])
def test_an_ascii_terminal_is_enough(arguments, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(arguments) == 0
    sys.stdout.flush()
    lines = written.getvalue().decode("ascii").splitlines()
    known = supported_families()
    if arguments == ["info"]:
        assert max(map(len, lines)) <= columns
        # A name that is folded goes on below, in its own column.
        cells = [line.split("|")[1].strip() for line in lines if line.count("|") == 2]
        assert all(each.model_class in "".join(cells) for each in known)
        assert "?" not in "".join(lines)  # nothing is cut
    if "--families" in arguments:
        names = {line.partition("|")[0].strip() for line in lines}
        assert names > {each.name for each in known if each.module == "diffusers"}


def test_a_narrow_terminal_cuts_no_number(flux_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "28")
    assert generate(flux_folder, tmp_path, "--steps", "2", "--compare", *SIZE) == 0
    table = capsys.readouterr().out.partition(str(tmp_path))[0]
    assert max(map(len, table.splitlines())) <= 28
    assert all(each in table for each in ("FluxPipeline", "32 x 32", "100.0 dB", "1.0000"))


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["generate", "--stepz", "3"], "dicache generate"),
        (["demo", "--steps", "0"], "dicache demo"),
        (["tune"], "dicache tune"),
        (["dmeo"], "dicache"),
    ],
)
def test_usage_errors_point_to_the_help_of_their_command(arguments, command, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(f" (see {command} --help)\n")


@pytest.mark.parametrize(
    ("preset", "family", "words"),
    [
        ("wan2.1", "flux", ["'wan2.1'", "its own is 'flux'"]),
        ("flux", "hunyuan-video", ["'flux'", "its own is 'hunyuan-video'"]),
        ("flux", "chroma", ["'flux'", "nobody has published any"]),
        ("flux", "flux", []),
        ("flux-delta-minus", "flux", []),
        ("hunyuan-video", "hunyuan-video", []),
        ("wan2.1", "wan", []),
        (None, "chroma", []),
    ],
)
def test_a_preset_of_another_family_warns(preset, family, words):
    config = DiCacheConfig() if preset is None else DiCacheConfig.preset(preset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_dicache(build(family), config)
        if preset is not None:  # who gives a threshold has thought of it
            apply_dicache(build(family), DiCacheConfig.preset(preset, threshold=0.3))
    told = [str(each.message) for each in caught if each.category is DiCacheWarning]
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)


@pytest.mark.parametrize("others", ["default", "ignore", "error"])
def test_the_command_warns_once_of_a_preset(flux_folder, tmp_path, capsys, others):
    """Whatever PYTHONWARNINGS says of other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter(others, UserWarning)
        assert generate(flux_folder, tmp_path, "--steps", "1", "--preset", "wan2.1", *SIZE) == 0
    assert capsys.readouterr().err.count("'wan2.1'") == 1


@pytest.mark.parametrize(("schedule", "steps", "warns"), [("CCRRC", 4, True), ("CCRC", 4, False)])
def test_a_schedule_longer_than_the_run_warns_once(schedule, steps, warns):
    pipe = tiny_pipelines.pipeline("flux")
    apply_dicache(pipe, DiCacheConfig(schedule=schedule))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_pipelines.run("flux", pipe, steps)
    told = [str(each.message) for each in caught if each.category is DiCacheWarning]
    assert len(told) == warns
    assert all("5 letters and the run 4 steps" in each for each in told)
    assert get_stats(pipe)["transformer"].notes == told


def test_without_diffusers_a_sentence_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in [name for name in sys.modules if name.startswith("dicache.adapters.diffusers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("dicache.adapters.diffusers.attach")
    with pytest.raises(ValueError, match=r"pip install 'diffusers>=0\.42' transformers accel"):
        apply_dicache(object())


@pytest.mark.parametrize("psnr", [10.0, 26.0, 40.0, 50.0, 60.0])
def test_a_difference_is_seen_whatever_its_size(psnr):
    root_mean_square = 10 ** (-psnr / 20)
    gain = difference_gain([torch.full((3, 8, 8), root_mean_square)])
    # At least a tenth of white, and not so much that all is white.
    assert 0.1 <= gain * root_mean_square <= 0.26 or (psnr < 26 and gain == 5)


def test_equal_pictures_have_a_difference_too():
    assert difference_gain([torch.zeros(3, 8, 8)]) == 5


SNIPPET = """\
from torch import nn

from dicache import DiCacheConfig, RunStats, apply_dicache, get_stats

class Pipeline:
    transformer: nn.Module

DiCacheConfig(error="delta_y", cfg="shared", backend="cpp", retention_rounding="next")
pipe = Pipeline()
apply_dicache(pipe, DiCacheConfig())
of_model: RunStats = get_stats(pipe.transformer)
of_pipe: dict[str, RunStats] = get_stats(pipe)

DiCacheConfig(error="typo")  # wrong
DiCacheConfig(granularity="typo")  # wrong
DiCacheConfig.preset("typo")  # wrong
get_stats(pipe).num_reused  # wrong
get_stats(pipe.transformer)["transformer"]  # wrong
apply_dicache(pipe, "flux")  # wrong
"""
# In torch's place, which takes mypy most of a minute: modules, and all else of any type.
TORCH = {
    "__init__.pyi": "from typing import Any\ndef __getattr__(name: str) -> Any: ...\n",
    "nn.pyi": "class Module: ...\n",
}
MYPY = """\
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*]
ignore_missing_imports = true
[mypy-accelerate.*,diffusers.*,matplotlib.*,numpy.*,transformers.*,triton.*]
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy: pip install mypy")
def test_mypy_sees_a_typo_in_user_code(tmp_path):
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "user.py").write_text(SNIPPET)
    (tmp_path / "torch").mkdir()
    for name, text in TORCH.items():
        (tmp_path / "torch" / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "user.py"]
    paths = [str(tmp_path), str(Path(dicache.__file__).parents[1])]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(paths)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stderr == ""
    wrong = [n for n, line in enumerate(SNIPPET.splitlines(), 1) if line.endswith("# wrong")]
    assert [int(n) for n in re.findall(r"user\.py:(\d+): error", run.stdout)] == wrong, run.stdout
