"""`--sparse`: four runs of a prompt, their table and the map of their heads.

flex_attention runs uncompiled, which is the same mask in plain arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pipeline_folders
import pytest
import torch
from PIL import Image
from test_cli import one_line_of_trouble

from dicache import (
    DiCacheConfig,
    RunStats,
    SparseVideoGenConfig,
    SparseVideoGenStats,
    StepRecord,
    apply_dicache,
    apply_sparse_videogen,
    get_stats,
)
from dicache.cli import main
from dicache.demo import heads_plot, pictures, sparse
from dicache.demo.pipelines import decode, default_prompts, load_pipeline, pipeline_inputs
from dicache.demo.runner import CacheReport, Run
from dicache.likeness import quality
from dicache.sparse_videogen import AttentionRecord, attention

FILES = {"comparison.png", "animation.gif", "schedule.png", "stats.json"}
SPARSE_FILES = {"heads.png", "sparse.gif", "sparse.md", "sparse.png"}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(attention, "COMPILED", False)
    monkeypatch.setattr("dicache.cli.demo.SPARSE_SAMPLES", 1)
    monkeypatch.setattr("dicache.cli.demo._WARM_UP_STEPS", 1)
    yield
    torch.set_num_threads(threads)  # which the demo sets


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folders.save_wan(tmp_path_factory.mktemp("pipelines") / "wan")


def attention_run(records: list[AttentionRecord]) -> Run:
    return Run(torch.zeros(2, 3, 16, 16), 1.0, {}, {"t": SparseVideoGenStats({"cond": records})})


def made_up() -> sparse.FourRuns:
    """Four runs of two blocks and three steps, whose numbers are counted by hand."""
    full = [AttentionRecord(step, 0, 100, 100) for step in range(3)]
    heads = [((True, False),), ((True, True),), ((False, False),)]
    thin = [AttentionRecord(s, 1, 40, 100, heads[s]) for s in range(3)]
    actions = [StepRecord(0, "compute"), StepRecord(1, "resume"), StepRecord(2, "reuse")]
    caches = {"t": CacheReport(DiCacheConfig(), RunStats({"cond": actions}, 5), 2)}
    dense = torch.full((2, 3, 16, 16), 0.25)
    runs = {
        "dense": Run(dense, 4.0),
        "sparse": Run(dense + 0.1, 5.0, {}, attention_run(full + thin).sparse),
        "DiCache": Run(dense + 0.01, 2.0, caches),
        "both": Run(dense + 0.2, 3.0, caches, attention_run(full + thin[:2]).sparse),
    }
    return sparse.FourRuns("a prompt", 7, runs)


def test_the_table_is_what_the_runs_say():
    """A constant difference d has a PSNR of -20 log10 d."""
    table = {row.name: row for row in sparse.rows([made_up(), made_up()])}
    assert list(table) == ["dense", "sparse", "DiCache", "both"]
    counts = {name: (row.density, row.attention, row.block_calls) for name, row in table.items()}
    both = (300 + 80) / 500
    assert counts["dense"] == (1.0, 1.0, 6)
    assert counts["sparse"] == (pytest.approx(420 / 600), pytest.approx(0.7), 6)
    assert counts["DiCache"] == (1.0, pytest.approx(5 / 6), 5)
    assert counts["both"] == (pytest.approx(both), pytest.approx(both * 5 / 6), 5)
    assert [row.seconds for row in table.values()] == [4.0, 5.0, 2.0, 3.0]
    psnr = [row.psnr for row in table.values()]
    assert psnr == pytest.approx([100.0, 20.0, 40.0, -20 * numpy.log10(0.2)], abs=1e-3)
    assert made_up().margin == pytest.approx(psnr[3] - 20.0, abs=1e-3)


def test_the_map_of_the_heads_shows_their_shares(tmp_path, monkeypatch):
    """Block 1: the first head was temporal in two of three steps, the second in one."""
    shown: list[Any] = []
    draw = heads_plot._draw_map
    monkeypatch.setattr(
        heads_plot, "_draw_map", lambda axes, shares: shown.append(draw(axes, shares)) or shown[-1]
    )
    runs = [made_up().runs["sparse"]]
    assert heads_plot.temporal_shares(runs) == {"t": {1: pytest.approx([2 / 3, 1 / 3])}}
    heads_plot.save_heads_plot(tmp_path / "heads.png", "title", runs * 2)
    assert shown[0].get_array().tolist() == [pytest.approx([2 / 3, 1 / 3])]
    assert Image.open(tmp_path / "heads.png").width > 400
    with pytest.raises(ValueError, match="no step of these runs was sparse"):
        heads_plot.save_heads_plot(tmp_path / "none.png", "title", [made_up().runs["dense"]])
    kinds = (tuple(bool(head % 2) for head in range(40)),)
    many = [AttentionRecord(0, block, 1, 2, kinds) for block in range(1, 60)]
    heads_plot.save_heads_plot(tmp_path / "many.png", "title", [attention_run(many)])


def test_the_pictures_show_all_four_runs():
    sheet = numpy.asarray(pictures.four_runs_sheet("title", [made_up()]))
    frames = pictures.four_runs_animation("title", [made_up()])
    assert len(frames) == 2
    for picture, side in ((sheet, 100), (numpy.asarray(frames[0]), 140)):
        for level in (0.25, 0.26, 0.35, 0.45):
            assert (picture == round(level * 255)).all(axis=-1).sum() >= side**2


@pytest.mark.parametrize(
    ("model", "steps", "density"), [("hunyuan-video", 8, 0.25), ("wan", 6, 0.30)]
)
def test_the_demo_tells_and_writes_what_the_four_runs_did(model, steps, density, tmp_path, capsys):
    """Against runs made here, with steps and blocks counted from the rules."""
    code = main(
        ["demo", "--model", model, "--sparse", "--steps", str(steps), "--out", str(tmp_path)]
    )
    assert code == 0
    assert {path.name for path in (tmp_path / model).iterdir()} == FILES | SPARSE_FILES
    stats = json.loads((tmp_path / model / "stats.json").read_text())
    found = stats["sparse"]["runs"]
    trained = f"{model}-long"
    pipe, prompt = load_pipeline(trained), default_prompts(trained)[0]

    def draw() -> torch.Tensor:
        return decode(trained, pipe(**pipeline_inputs(trained, prompt, 0, steps)))[0]

    drawn = {"dense": draw()}
    apply_dicache(pipe)
    drawn["DiCache"] = draw()
    cached = get_stats(pipe)["transformer"]
    apply_sparse_videogen(pipe, SparseVideoGenConfig(block_size=16))
    drawn["both"] = draw()
    together = get_stats(pipe)["transformer"]
    for name, video in drawn.items():
        wanted = quality(video, drawn["dense"])
        assert (found[name]["psnr"], found[name]["ssim"]) == pytest.approx(
            (wanted.psnr, wanted.ssim)
        )
    branches = len(cached.contexts)
    calls = [found[name]["block_calls"] for name in sparse.RUNS]
    assert calls == [9 * steps * branches] * 2 + [cached.block_calls, together.block_calls]
    # The widest band of at most so many elements; dense: one block and one step.
    dense_steps, tokens = 1, 600
    valid = tokens + (0 if model == "wan" else len(prompt.split()))
    sink = 25 if model == "wan" else 0
    i, j = torch.arange(valid)[:, None], torch.arange(valid)
    always = (i >= tokens) | (j >= tokens) | (i < sink) | (j < sink)
    counts = [int((always | ((i - j).abs() <= w)).sum()) for w in range(tokens)]
    kept = max(count for count in counts if count <= density * valid**2) / valid**2
    thin = (steps - dense_steps) / steps * 8 / 9
    assert found["sparse"]["density"] == pytest.approx(1 - thin + thin * kept)
    elements = 0.0  # in maps of full attention
    for records in together.contexts.values():
        for each in records:
            later = 0 if each.action == "reuse" else 8
            elements += 1 + later * (1.0 if each.step < dense_steps else kept)
    assert found["both"]["density"] == pytest.approx(elements / together.block_calls)
    assert found["both"]["attention"] == pytest.approx(elements / (9 * steps * branches))
    markdown = (tmp_path / model / "sparse.md").read_text()
    assert f"| both | {found['both']['density']:.3f} |" in markdown
    printed = capsys.readouterr().out
    assert f"{found['sparse']['psnr']:.1f}" in printed
    assert "…" not in printed  # nothing is cut off
    assert max(len(line) for line in printed.splitlines() if "│" in line) <= 80
    (shares,) = (each["temporal_shares"]["transformer"] for each in stats["sparse"]["samples"])
    assert list(shares) == [str(block) for block in range(1, 9)]


def generate(folder: Path, out: Path, *options: str) -> dict[str, Any]:
    base = ["generate", "--model", str(folder), "--out", str(out), "--prompt", "red circle"]
    size = ["--num-frames", "9", "--height", "64", "--width", "64", "--steps", "5"]
    assert main([*base, *size, *options]) == 0
    return json.loads((out / "stats.json").read_text())


def test_generate_draws_with_both(wan_folder, tmp_path, monkeypatch, capsys):
    """As with both applied in Python; and with --compare all four."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("dicache.cli.generate._has_ffmpeg", lambda: False)
    options = ["--sparse", "--density", "0.6", "--schedule", "CCCRC"]
    alone = generate(wan_folder, tmp_path / "alone", *options)
    assert f"attention density {alone['density']:.3f}" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {"output.gif", "heads.png", "schedule.png", "stats.json"}

    pipe = DiffusionPipeline.from_pretrained(wan_folder)
    apply_dicache(pipe, DiCacheConfig(schedule="CCCRC"))
    apply_sparse_videogen(pipe, SparseVideoGenConfig(density=0.6))
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 5}
    drawn = pipe("red circle", generator=generator, output_type="pt", **arguments).frames[0]

    four = generate(wan_folder, tmp_path / "four", *options, "--compare")
    names = {path.name for path in (tmp_path / "four").iterdir()}
    assert names == {"output.gif", "uncached.gif", "sparse.gif", "dicache.gif"} | (
        {"heads.png", "comparison.png", "animation.gif", "schedule.png", "stats.json"}
    )
    rows = four["sparse"]["runs"]
    assert rows["both"]["density"] == alone["density"] == four["density"] < 1.0
    assert four["psnr_db"] == pytest.approx(rows["both"]["psnr"])
    assert rows["dense"]["psnr"] == 100.0 and rows["sparse"]["psnr"] < 100.0
    assert four["sparse"]["config"]["density"] == 0.6
    first = Image.open(tmp_path / "alone" / "output.gif").convert("RGB")
    wanted = pictures.to_image(drawn[0].float())
    # A GIF has 256 colours of its own.
    assert numpy.abs(numpy.asarray(first, float) - numpy.asarray(wanted, float)).mean() < 8


def test_flux_is_left_out_of_all_models_with_a_notice(tmp_path, monkeypatch, capsys):
    asked: list[str] = []

    def stop(name: str) -> Any:
        asked.append(name)
        raise RuntimeError("far enough")

    monkeypatch.setattr("dicache.cli.demo.load_pipeline", stop)
    with pytest.raises(RuntimeError, match="far enough"):
        main(["demo", "--sparse", "--out", str(tmp_path)])
    assert asked == ["hunyuan-video-long"]
    assert "--sparse is for videos, so flux is left out" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hunyuan-video", "wan"]


def test_what_cannot_be_sparse_is_refused_in_one_line(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    line = one_line_of_trouble(capsys, "demo", "--model", "flux", "--sparse", *out)
    assert "flux" in line and "hunyuan-video or wan" in line
    for density in ("0.3", "0"):
        line = one_line_of_trouble(capsys, "demo", "--density", density, *out)
        assert f"--density {density} needs --sparse" in line
    line = one_line_of_trouble(capsys, "demo", "--sparse", "--density", "1.5", *out)
    assert "density is 1.5" in line and "up to 1" in line
    base = ["generate", "--model", "x/y", "--prompt", "x", *out]
    assert "needs --sparse" in one_line_of_trouble(capsys, *base, "--density", "0.3")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_cannot_be_sparse_is_refused_in_one_line(tmp_path, capsys):
    folder = pipeline_folders.save_flux(tmp_path / "flux")
    options = ["--prompt", "x", "--sparse", "--out", str(tmp_path / "out")]
    assert main(["generate", "--model", str(folder), *options]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "Sparse VideoGen does not support FluxPipeline" in line


def test_a_run_of_dense_steps_alone_has_no_map(wan_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dicache.cli.generate._has_ffmpeg", lambda: False)
    generate(wan_folder, tmp_path, "--sparse", "--num-frames", "1")
    assert not (tmp_path / "heads.png").exists()
    assert "all steps were dense" in capsys.readouterr().err
