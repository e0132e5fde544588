"""`dicache bench` counts and compares what it says it does."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import sys
from types import ModuleType

import numpy
import pipeline_folders
import pytest
import torch
from PIL import Image

from dicache import DiCacheConfig, apply_dicache, get_stats, remove_dicache
from dicache.bench.counter import BlockCounter, cost_of
from dicache.bench.methods import Lesson, Method, choose, mag_ratios_of, uncached
from dicache.bench.report import markdown
from dicache.bench.results import Point, Result, at_cost
from dicache.bench.runner import Bench, compare, task_of
from dicache.bench.strip import difference, strip
from dicache.bench.subjects import ShippedModel, loaded
from dicache.cli import main
from dicache.cli.bench import numbers
from dicache.demo import pipelines
from dicache.demo.profiles import shipped_profile

FLUX = ShippedModel("flux", 8)
CALIBRATION = range(9000, 9010)


@pytest.fixture
def bench():
    """Two Flux samples of eight steps, in this process."""
    return Bench(task_of(FLUX, CALIBRATION), [7, 8], map, 1, (1.5, 2.0))


def point(setting, costs, values):
    return Point(setting, costs, 1.0, {"psnr": values})


def test_counter_agrees_with_the_stats_of_the_run():
    pipe = pipelines.load_pipeline("flux")
    counter = BlockCounter(pipe.transformer)
    apply_dicache(pipe, DiCacheConfig(schedule="CCRRCRC"))
    pipe(**pipelines.pipeline_inputs("flux", pipelines.default_prompts("flux")[0], 7, 7))
    calls = counter.take()
    assert calls == [9, 9, 1, 1, 9, 1, 9]
    assert get_stats(pipe)["transformer"].block_calls == sum(calls)
    remove_dicache(pipe)
    counter.remove()
    assert all("forward" not in vars(block) for block in pipe.transformer.transformer_blocks)


def test_counter_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="Linear is in no family"):
        BlockCounter(torch.nn.Linear(2, 2))


def test_cost_scales_computed_steps_to_the_siblings_depth():
    """Three steps computed and one reused: 4 L / (3 L + 1) at every depth L."""
    assert cost_of([9, 9, 1, 9], 9, 9, 4) == 36 / 28
    assert cost_of([9, 9, 1, 9], 9, 57, 4) == 228 / 172
    assert cost_of([9, 0, 0], 9, 57, 3) == 3
    assert cost_of([9, 9], 9, 57, 4) == 2  # the same model in half the steps


def test_spread_is_that_of_numpy_and_of_the_right_end():
    values = [50.0, 41.0, 47.0, 62.0, 44.0, 45.5, 39.0]
    found = point(1.0, (2, 2), values).spread("psnr")
    assert found == pytest.approx((numpy.mean(values), numpy.percentile(values, 10), 39.0))
    far = Point(1.0, (2, 2), 1.0, {"lpips": values}).spread("lpips")
    assert far == pytest.approx((numpy.mean(values), numpy.percentile(values, 90), 62.0))


def test_cells_are_linear_in_cost():
    """Half-way between 50 dB at 1.5x and 40 dB at 2.5x lie 45 dB, the worst sample likewise."""
    points = [point(0.2, (2.5, 3.5), [38.0, 42.0]), point(0.1, (1.5, 1.8), [44.0, 56.0])]
    found = at_cost(points, 0, 2.0, "psnr")
    assert (found.mean, found.worst) == (45.0, 41.0)
    assert at_cost(points, 0, 1.75, "psnr").mean == 47.5
    assert at_cost(points, 1, 2.65, "psnr").mean == pytest.approx(45.0)
    assert at_cost(points, 0, 3.0, "psnr") is None
    assert at_cost(points, 0, 2.52, "psnr").mean == 40.0  # missed by less than a percent


@pytest.fixture
def result():
    """Two methods of made-up numbers."""
    made = Result("flux", 30, (9, 57), "FLUX.1", (1.5, 2.0, 3.0), (7, 2), 0.5, {"command": "x"})
    made.curves = {
        "good": [point(1.7, (1.5, 1.5), [60.0, 70.0]), point(2.2, (2.0, 2.1), [50.0, 60.0])],
        "coarse": [point(1.0, (1.7, 1.8), [40.0, 44.0]), point(2.0, (3.2, 4.0), [30.0, 31.0])],
    }
    made.failures = {"absent": "ValueError: it is not installed"}
    made.promises = ["good"]
    return made


def test_report_says_who_is_best_and_who_does_not_get_there(result):
    lines = markdown(result).splitlines()
    good = next(line for line in lines if line.startswith("| good"))
    coarse = next(line for line in lines if line.startswith("| coarse"))
    assert "**65.0** (61.0, 60.0)" in good and good.endswith("| up to 2.10x |")
    assert coarse.startswith("| coarse | from 1.80x |")
    assert "- absent: not run (ValueError: it is not installed)" in lines
    # 1.5 / 1.7 and 2.0 / 2.2: what came out over what was asked for.
    assert any("-11.8% to -9.1% off the target_speedup" in line for line in lines)


def test_of_lpips_less_is_better_and_it_has_a_table_where_it_was_measured(result):
    assert "LPIPS" not in markdown(result)
    for points, values in zip(result.curves.values(), ([0.1, 0.4], [0.1, 0.2]), strict=True):
        for each in points:
            each.likeness["lpips"] = values
    table = markdown(result).partition("## LPIPS")[2].splitlines()
    assert any("| 0.2500 (0.3700, 0.4000) |" in line for line in table if "good" in line)
    assert any("| **0.1500** (0.1900, 0.2000) |" in line for line in table if "coarse" in line)


def test_files_keep_every_number(result, tmp_path):
    result.save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == result
    result.save_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert rows[1]["method"] == "good" and float(rows[1]["cost_sibling_depth"]) == 2.1
    assert float(rows[1]["psnr_worst"]) == 50.0 and float(rows[1]["psnr_mean"]) == 55.0


def test_a_second_run_keeps_what_the_first_one_found(result):
    """Of the same samples; what is run again is the new one's alone."""

    def fresh():
        return Result("flux", 30, (9, 57), "FLUX.1", (2.0,), (7, 2), 0.5, {"command": "y"})

    again = fresh()
    again.curves["good"] = [point(3.0, (3.0, 3.0), [1.0, 2.0])]
    again.keep(result)
    assert list(again.curves) == ["good", "coarse"]
    assert again.curves["good"][0].setting == 3.0
    assert again.about["command"] == "x; y" and again.promises == ["good"]
    other = fresh()
    other.seeds = (8, 2)
    other.keep(result)
    assert other.curves == {}


def made_up(monkeypatch, bench, costs, scouted):
    """A method whose settings have these costs; the first samples see other ones."""
    whole = []

    def measure(method, setting, count=None):
        if count is None:
            whole.append(setting)
        cost = (costs if count is None else scouted)[setting]
        return point(setting, (cost, cost), [50.0])

    monkeypatch.setattr(bench, "measure", measure)
    return Method("made up", "", uncached, lambda task: range(len(costs))), whole


@pytest.mark.parametrize(("spacing", "most"), [(0.1, 6), (0.3, 5)])
def test_search_finds_settings_around_every_target(monkeypatch, bench, spacing, most):
    """Within 5 % or on both sides, also where the first samples promised more than all keep."""
    costs = [1.01 + spacing * place for place in range(30)]
    scouted = [1 + 1.15 * spacing * place for place in range(30)]
    method, whole = made_up(monkeypatch, bench, costs, scouted)
    found = [each.cost[0] for each in bench.sweep(method)]
    assert found == sorted(found) and len(whole) <= most
    assert found[0] <= bench.targets[0] and found[-1] >= bench.targets[-1]
    for target in bench.targets:
        below, above = max(c for c in found if c < target), min(c for c in found if c >= target)
        is_near = min(target - below, above - target) <= 0.05 * target
        assert is_near or above - below == pytest.approx(spacing)


def test_search_ends_where_nothing_more_is_saved(monkeypatch, bench):
    """A method that saves at most 1.7x: the first setting that does is measured, for 2x."""
    costs = [min(1 + 0.1 * place, 1.7) for place in range(30)]
    method, whole = made_up(monkeypatch, bench, costs, costs)
    assert max(each.cost[0] for each in bench.sweep(method)) == 1.7
    assert max(whole) <= 8


def test_every_method_saves_work_and_the_strictest_setting_is_dearest(bench):
    """No row of the table runs in a mode that never caches, and none changes what a row draws."""
    groups = ["caches", "rules", "guidance", "memory"]
    ratios = mag_ratios_of(bench.task)
    assert len(ratios) == 8 and ratios[0] == 1.0 and all(0.5 < ratio < 2 for ratio in ratios)
    bench.task.mag_ratios.extend(ratios)
    for method in choose(groups, ("flux", "flux-delta-minus")):
        if method.missing or method.lesson:
            continue
        settings = method.settings(bench.task)
        loose = bench.measure(method, settings[-1], 1)
        assert loose.cost[0] > 1.2, method.name
        strict = bench.measure(method, settings[0], 1)
        assert strict.cost[1] < loose.cost[1], method.name
        if strict.cost == (1.0, 1.0):
            assert strict.likeness == {"psnr": [100.0], "ssim": [1.0]}, method.name
        else:
            assert method.name.startswith("TaylorSeer"), method.name  # every other step at least
    again = bench.measure(Method("no cache", "", uncached), 0.0)
    assert again.likeness == {"psnr": [100.0, 100.0], "ssim": [1.0, 1.0]}


def test_calibrated_rows_meet_the_speedup_that_is_asked_for(bench):
    """On seeds that the calibration has not seen, each setting is a whole number of steps."""
    (method,) = choose(["calibrated"], ())
    method.prepare(bench.task)
    settings = method.settings(bench.task)
    assert settings[0] == 1.0 and settings[4] == pytest.approx(8 / (4 + 4 / 9))
    found = bench.measure(method, settings[4])
    assert found.cost[0] == pytest.approx(settings[4], rel=0.01)
    assert bench.task.profiles[Lesson()].samples == 2


@pytest.mark.parametrize(
    ("lesson", "steps"),
    [
        (Lesson(1, 0, steps=1.5), 6),
        (Lesson(1, 0, guidance=2.0), 4),
        (Lesson(1, 0, noise=0.3), 4),
    ],
)
def test_lessons_are_made_as_they_say(lesson, steps):
    """Other steps, other guidance, other weights; and the model is as it was."""
    wan = ShippedModel("wan", 4)
    task = task_of(wan, CALIBRATION)
    before = loaded(wan).transformer.patch_embedding.weight.clone()
    for each in (Lesson(1, 0), lesson):
        Method("", "", uncached, lesson=each).prepare(task)
    plain, other = (task.profiles[each].models["transformer"].contexts["cond"].rr
                    for each in (Lesson(1, 0), lesson))  # fmt: skip
    assert len(other) == steps
    assert len(other) != len(plain) or not torch.allclose(other, plain, rtol=1e-2)
    assert torch.equal(loaded(wan).transformer.patch_embedding.weight, before)


def test_what_cache_dit_leaves_behind_harms_no_other_method(monkeypatch, bench):
    """As its 1.5.3 does: a `forward` of its own stays, and the order of the lists is another."""
    fake = ModuleType("cache_dit")
    fake.DBCacheConfig = fake.TaylorSeerCalibratorConfig = lambda **_: None

    def enable_cache(pipe, **_):
        model = pipe.transformer
        model.forward = model.forward
        model._modules["transformer_blocks"] = model._modules.pop("transformer_blocks")

    fake.enable_cache, fake.disable_cache = enable_cache, lambda pipe: None
    monkeypatch.setitem(sys.modules, "cache_dit", fake)
    theirs, first_block = choose(["cache-dit F1B0 with TaylorSeer", "FirstBlockCache"], ())
    model = loaded(bench.task.subject).transformer
    known, lists = set(vars(model)), list(model._modules)
    before = bench.measure(first_block, 0.5)
    known |= set(vars(model))
    assert bench.measure(theirs, 0.5).cost == (1.0, 1.0)
    assert set(vars(model)) == known and list(model._modules) == lists
    after = bench.measure(first_block, 0.5)
    assert after.cost == before.cost != (1.0, 1.0) and after.likeness == before.likeness


def test_a_method_that_fails_says_why_and_the_others_go_on(bench, result):
    def broken(pipe, task, setting):
        raise RuntimeError("no luck")

    result.curves, result.failures = {"broken": [], "coarse": []}, {"fewer steps": "of old"}
    (works,) = choose(["fewer steps"], ())
    methods = [
        Method("broken", "", broken),
        Method("absent", "", uncached, package="no_such_package"),
        works,
    ]
    assert list(compare(bench, methods, result)) == ["broken", "absent", "fewer steps"]
    assert list(result.curves) == ["coarse", "fewer steps"]
    assert result.failures == {
        "broken": "RuntimeError: no luck",
        "absent": "ValueError: no_such_package is not installed",
    }
    assert {point.setting: point.cost[0] for point in result.curves["fewer steps"]} == {
        6: 8 / 6,
        5: 8 / 5,
        4: 2.0,
    }


def test_strip_shows_a_picture_and_the_ends_of_a_video():
    video = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 3, 2, 2)
    image = numpy.asarray(strip(video))
    assert image.shape == (2, 8, 3)
    assert [int(each) for each in image[0, ::2, 0]] == [0, 96, 159, 255]
    assert strip(torch.zeros(3, 512, 512)).size == (256, 256)
    found = difference(torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), 0.4))
    assert found.flatten().tolist() == pytest.approx([0.5] * 12)


def test_command_writes_all_files_and_a_page_that_needs_no_other(tmp_path):
    options = ["--steps", "6", "--seeds", "2", "--speedups", "1.5", "--methods", "fewer steps"]
    assert main(["bench", "--model", "flux", *options, "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"flux.{kind}" for kind in ("json", "csv", "md", "png", "html")}
    result = Result.load(tmp_path / "flux.json")
    assert result.seeds == (2000, 2) and result.sibling == "FLUX.1"
    assert "| fewer steps |" in (tmp_path / "flux.md").read_text()
    page = (tmp_path / "flux.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith("data:image/") for link in links)
    # The plot; two samples, un-cached alone, and with their difference for 4 of 6 steps.
    assert len(links) == 1 + 2 + 4
    shown = Image.open(io.BytesIO(base64.b64decode(links[1].partition(",")[2])))
    inputs = ShippedModel("flux", 6).inputs(2000)
    drawn = strip(pipelines.decode("flux", pipelines.load_pipeline("flux")(**inputs))[0])
    assert numpy.array_equal(numpy.asarray(shown), numpy.asarray(drawn))


def test_a_bench_of_which_nothing_ran_ends_in_a_line(tmp_path, monkeypatch, capsys):
    def compared(bench, methods, result):
        result.failures["fewer steps"] = "RuntimeError: no luck"
        yield "fewer steps"

    monkeypatch.setattr("dicache.cli.bench.compare", compared)
    options = ["--steps", "4", "--seeds", "1", "--methods", "fewer steps", "--out", str(tmp_path)]
    assert main(["bench", "--model", "flux", *options]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "dicache: no method ran: RuntimeError: no luck"


def test_speedups_are_taken_in_their_order():
    assert numbers("9, 3,1.5,3.0") == (1.5, 3, 9)


def test_a_pipeline_of_the_users_is_benched_at_its_own_depth(tmp_path, capsys):
    folder = pipeline_folders.save_flux(tmp_path / "mine")
    (tmp_path / "prompts.txt").write_text("red circle\n\nblue square\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--height", "32", "--width", "32"]
    options += ["--steps", "6", "--seeds", "2", "--speedups", "1.5", "--methods", "DiCacheConfig()"]
    out = tmp_path / "out"
    line = ["bench", "--model", str(folder), *options, "--out", str(out)]
    assert main([*line, "--jobs", "2"]) == 2
    assert "--jobs is for the shipped models" in capsys.readouterr().err.splitlines()[-1]
    assert main(line) == 0
    result = Result.load(out / "mine.json")
    assert result.sibling is None and result.depths == (9, 9)
    assert list(result.curves) == ["DiCacheConfig()"]
    assert all(
        math.isfinite(v) for p in result.curves["DiCacheConfig()"] for v in p.likeness["psnr"]
    )


def test_a_profile_that_is_given_is_the_one_that_is_used(tmp_path, monkeypatch):
    def unwanted(*_):
        raise AssertionError("there is a profile already")

    monkeypatch.setattr("dicache.bench.methods.profile_of", unwanted)
    shipped_profile("flux").save(tmp_path / "mine.json")
    options = ["--profile", str(tmp_path / "mine.json"), "--seeds", "1", "--speedups", "2"]
    for method in ("fewer steps", "without veto"):  # what is there stays
        line = ["bench", "--model", "flux", *options, "--methods", method]
        assert main([*line, "--out", str(tmp_path)]) == 0
    result = Result.load(tmp_path / "flux.json")
    assert {*result.curves} == {"fewer steps", "without veto"} and not result.failures
    assert result.about["calibration"] == str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--methods", "no such"], "No method is called 'no such'"),
        (["--speedups", "1,2"], "--speedups 1,2 is no list of numbers above 1"),
        (["--profile", "nowhere.json"], "--profile: "),
        (["--model", "nowhere"], "neither a folder nor a Hub name"),
    ],
)
def test_what_cannot_be_had_is_one_line(options, told, tmp_path, capsys):
    assert main(["bench", "--model", "flux", *options, "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0]
