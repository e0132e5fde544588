"""What the demo measures and draws: metrics, means, pictures and the schedule plot."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from dicache import DiCacheConfig, RunStats, StepRecord, schedule_plot
from dicache.demo import pictures, report
from dicache.demo.runner import CacheReport, Run, Sample
from dicache.fonts import lettering
from dicache.likeness import quality

RECORDS = [
    StepRecord(0, "compute"),
    StepRecord(1, "reuse", 0.03, 0.03, 1.2),
    StepRecord(2, "resume", 0.09, 0.12),
    StepRecord(3, "compute"),
]


def make_sample(shape, seconds=(3.0, 2.0), difference=0.1, contexts=("cond",)):
    stats = RunStats(
        {name: list(RECORDS) for name in contexts},
        block_calls=28 * len(contexts),
        cache_tensors=4,
        cache_bytes=4096,
    )
    cache = CacheReport(DiCacheConfig(threshold=0.1), stats, num_blocks=9)
    plain = torch.full(shape, 0.25)
    cached = Run(plain + difference, seconds[1], {"transformer": cache})
    return Sample("a prompt", 7, cached, Run(plain, seconds[0]))


def test_psnr_is_that_of_the_formula_and_capped():
    reference = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    # A constant difference d has the mean squared error d^2: 10 log10(1 / 0.01) = 20 dB.
    assert quality(reference + 0.1, reference).psnr == pytest.approx(20.0, abs=1e-3)
    same = quality(reference, reference)
    assert same.psnr == 100.0 and same.ssim == pytest.approx(1.0, abs=1e-6)


def test_a_video_counts_as_one_sample():
    reference = torch.zeros(4, 3, 16, 16)
    video = reference.clone()
    video[0] = 0.2  # mean squared error 0.04 / 4 = 0.01: not the mean of three caps and 14 dB
    assert quality(video, reference).psnr == pytest.approx(20.0, abs=1e-3)
    assert quality(video, reference).ssim < 0.9


def test_metrics_refuse_different_shapes():
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*\(3, 8, 8\)"):
        quality(torch.zeros(3, 16, 16), torch.zeros(3, 8, 8))


def test_summary_averages_samples_and_adds_branches():
    shape = (3, 16, 24)
    samples = [
        make_sample(shape, (3.0, 2.0), 0.1, ("cond", "uncond")),
        make_sample(shape, (5.0, 2.0), 0.01, ("cond", "uncond")),
    ]
    summary = report.summarize("wan", samples)
    assert (summary.computed, summary.resumed, summary.reused) == (4, 2, 2)
    # 9 blocks x 4 steps x 2 branches un-cached, 28 x 2 with the cache.
    assert summary.fewer_blocks == pytest.approx(72 / 56)
    assert summary.speedup == pytest.approx(8.0 / 4.0)
    assert summary.psnr == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert (summary.size, summary.steps) == ("24 x 16", "4 x 2")


def test_json_stays_valid_with_infinity(tmp_path):
    report.write_json(tmp_path / "x.json", {"a": [math.inf, math.nan, 1.5], 2: (None, True)})
    text = (tmp_path / "x.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data == {"a": ["inf", "nan", 1.5], "2": [None, True]}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (98320, "98.3 kB"), (2.5e10, "25 GB")]
)
def test_sizes_have_the_right_unit(count, text):
    assert report.format_bytes(count) == text


def test_small_pictures_grow_without_blur_and_large_ones_shrink():
    small = pictures.to_image(torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(1)))
    grown = pictures.fit(small, 192, 1024)
    assert grown.size == (210, 140)
    assert numpy.array_equal(numpy.asarray(grown)[::7, ::7], numpy.asarray(small))
    assert pictures.fit(Image.new("RGB", (4096, 2048)), 192, 1024).size == (1024, 512)


def test_pictures_survive_values_out_of_range():
    picture = torch.tensor([float("nan"), 2.0, -1.0]).reshape(3, 1, 1)
    assert pictures.to_image(picture).getpixel((0, 0)) == (0, 255, 0)


def test_sheets_show_both_runs():
    sample = make_sample((3, 20, 20), difference=0.5)
    sheet = numpy.asarray(pictures.comparison_sheet("title", [sample, sample]))
    for level in (0.25, 0.75):  # un-cached and cached
        shown = (sheet == round(level * 255)).all(axis=-1).sum()
        assert shown >= 2 * 200 * 200
    assert (sheet == 255).all(axis=-1).sum() > 0.2 * sheet[..., 0].size


def test_animation_has_every_frame(tmp_path):
    sample = make_sample((5, 3, 20, 20))
    for index in range(5):
        sample.cached.pictures[index] = index / 5
    frames = pictures.comparison_animation("title", [sample])
    pictures.save_animation(tmp_path / "a.gif", frames)
    shown = Image.open(tmp_path / "a.gif")
    assert shown.n_frames == 5 and shown.info["loop"] == 0


def test_schedule_plot_shows_every_action_in_its_colour(tmp_path):
    run = make_sample((3, 8, 8), contexts=("cond", "uncond")).cached
    schedule_plot.save_schedule_plot(tmp_path / "s.png", "title", run.plot_rows())
    plot = numpy.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    for color in schedule_plot.ACTION_COLORS.values():
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        # The strip alone: 3 panels x 2 branches x at least one step of about 80 x 15 pixels.
        assert (plot == rgb).all(axis=-1).sum() > 3 * 2 * 80 * 15


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved since."""
    saved = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def said(panel):
    return [text.get_text() for text in panel.texts]


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_schedule_plot_of_any_number_of_steps(steps, tmp_path, figures):
    records = [StepRecord(0, "compute")]
    records += [StepRecord(step, "reuse", 0.01, 0.01, 1.5) for step in range(1, steps)]
    RunStats({"cond": records}).plot(tmp_path / "s.png")

    (figure,) = figures
    error, total, weight = figure.axes
    nothing = [["no step was probed"], ["no step was probed"], ["no step was reused"]]
    assert [said(error), said(total), said(weight)] == (nothing if steps == 1 else [[], [], []])
    for panel in figure.axes:
        ticks = [tick for tick in panel.get_xticks() if 0 <= tick < steps]
        assert ticks[0] == 0 and all(tick == round(tick) for tick in ticks)
    assert len(error.patches) == len(records) + steps - 1  # a strip of all, and bars


def test_schedule_plot_of_samples_with_decisions_of_their_own(tmp_path, figures):
    """A row each, of which the first ones are drawn."""
    actions = ("reuse", "resume")
    records = [
        StepRecord(step, actions[sample % 2], 0.1, 0.1, sample=sample)
        for step in range(2)
        for sample in range(10)
    ]
    contexts = {"cond": [StepRecord(0, "compute"), *records], "uncond": records}
    RunStats(contexts).plot(tmp_path / "s.png")
    (figure,) = figures
    labels = [panel.get_ylabel() for panel in figure.axes[::3]]
    assert labels[:2] == [
        "branch 'cond, sample 0'\n1 computed, 0 resumed, 2 reused",
        "branch 'cond, sample 1'\n1 computed, 2 resumed, 0 reused",
    ]
    assert labels[-1] == "branch 'uncond, sample 5'\n0 computed, 2 resumed, 0 reused"
    assert len(labels) == 16
    assert figure.get_suptitle() == "DiCache\nthe first 16 of 20 branches and samples"


@pytest.fixture
def fonts(monkeypatch):
    """matplotlib's own alone, whatever this machine has; it goes on to find what is added."""
    own = Path(matplotlib.get_data_path())
    ours = [each for each in fontManager.ttflist if own in Path(each.fname).parents]
    monkeypatch.setattr(fontManager, "ttflist", ours)
    lettering.cache_clear()
    yield
    lettering.cache_clear()


def black_squares(path, characters):
    """A font in which these characters are black squares, as wide as high."""
    font = FontBuilder(1000)
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", "space", "square"]
    font.setupGlyphOrder(names)
    font.setupCharacterMap({32: "space"} | {ord(each): "square" for each in characters})
    blank = TTGlyphPen(None).glyph()
    font.setupGlyf({".notdef": blank, "space": blank, "square": pen.glyph()})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    fontManager.addfont(path)


def assert_fits(figure):
    """The title is not wider than its figure."""
    extent = figure._suptitle.get_window_extent()
    assert 0 < extent.x0 < extent.x1 < figure.bbox.width


def test_schedule_plot_takes_any_prompt_for_its_title(tmp_path, figures, fonts):
    """Dollars are no formula, and a script that no font has is no matter for a warning."""
    prompts = ["$_^$", "a fox", "狐狸 🦊", "é\ud800", "word " * 1000, "blackbird" * 99]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, prompt in enumerate(prompts):
            RunStats({prompt[:9]: RECORDS}).plot(tmp_path / f"{number}.png", prompt)
    titles = [figure.get_suptitle() for figure in figures]
    assert titles[:4] == ["$_^$", "a fox", "?? ?", "é?"]
    for figure, title in zip(figures[4:], titles[4:], strict=True):
        assert title.endswith(" ...") and title.count("\n") == 1
        assert_fits(figure)


def test_texts_are_drawn_in_a_font_that_has_them(tmp_path, figures, fonts):
    """Of the installed ones; of several, in the one that has most of the text, and a "?"."""
    for name, characters in {"1": "狐狸🦊", "2": "狐?", "3": "狐狸?"}.items():
        black_squares(tmp_path / f"{name}.ttf", characters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RunStats({"cond": RECORDS}).plot(tmp_path / "s.png", "狐狸🦊" * 100)
    title = figures[0]._suptitle
    assert title.get_text().startswith("狐狸?狐狸?")
    assert title.get_fontproperties().get_file() == str(tmp_path / "3.ttf")
    assert_fits(figures[0])
    assert figures[0].axes[0].yaxis.label.get_fontname() == "DejaVu Sans"

    sample = replace(make_sample((3, 20, 20)), prompt="狐狸" * 40)
    sheet = numpy.asarray(pictures.comparison_sheet("title", [sample]).convert("L"))
    blank = replace(sample, prompt="")
    plain = pictures.comparison_sheet("title", [blank])
    # 80 squares of 14 x 14 pixels, on as many lines as the page's width needs.
    assert plain.width == sheet.shape[1] < 80 * 14
    ink = (sheet < 100).sum() - (numpy.asarray(plain.convert("L")) < 100).sum()
    assert 0.8 * 80 * 14 * 14 < ink < 1.2 * 80 * 14 * 14


def test_long_words_are_broken_where_they_must_be(fonts):
    def pixels(text):
        return numpy.asarray(pictures._text(text, 100))

    assert pixels("one two three four five six").shape[1] <= 100
    # A word that has no room beside another goes below it, whole where it can.
    assert numpy.array_equal(pixels("one blackbird two"), pixels("one\nblackbird\ntwo"))
    assert pixels("w" * 500).shape[1] <= 100 and pixels("w" * 500).shape[0] > 50 * 14


def test_schedule_plot_needs_steps_but_not_finite_ones(tmp_path):
    with pytest.raises(ValueError, match="no step to plot"):
        schedule_plot.save_schedule_plot(tmp_path / "s.png", "t", [])
    records = [StepRecord(0, "compute"), StepRecord(1, "resume", math.nan, math.inf)]
    cache = CacheReport(DiCacheConfig(threshold=math.inf), RunStats({"cond": records}, 9), 9)
    run = Run(torch.zeros(3, 8, 8), 1.0, {"transformer": cache})
    schedule_plot.save_schedule_plot(tmp_path / "s.png", "t", run.plot_rows())
    assert (tmp_path / "s.png").is_file()
