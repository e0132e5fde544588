"""`dicache generate --prompts`: every prompt once, whatever is killed, fails or runs beside it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pipeline_folders
import psutil
import pytest
import torch
from PIL import Image

from dicache.cli import main
from dicache.cli.errors import InputError
from dicache.cli.prompts import read_jobs, read_prompts
from dicache.cli.records import Records, only_run
from dicache.demo.profiles import shipped_profile

SIZE = ["--height", "32", "--width", "32"]
RULES = ["--steps", "5", "--schedule", "CCRRC", *SIZE]


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return pipeline_folders.save_flux(tmp_path_factory.mktemp("pipelines") / "flux")


def command(folder, prompts, out, *options):
    return ["generate", "--model", folder, "--prompts", prompts, "--out", out, *options]


def draw(*arguments):
    return main([str(each) for each in command(*arguments)])


def manifest(out):
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def pictures(out):
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def partials(out):
    return [path for path in out.rglob("*") if "partial" in path.name]


def test_a_file_is_read_by_its_rules(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = [
        "# a comment",
        "red circle",
        "",
        "   ",
        "  blue square  ",
        '{ "prompt": "a fox", "seed": 7, "name": "Fox 1"}',
        "red circle",
        "{red|blue} ring",
        '{"prompt": " red circle "}',
        "a\u2028line",  # of which an editor shows two
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # as an editor on Windows

    jobs = read_jobs(path, 3)
    found = [(job.prompt, job.seed) for job in jobs]
    # A prompt that stands there again gets the next seed; others do not count.
    assert found == [
        ("red circle", 3),
        ("blue square", 3),
        ("a fox", 7),
        ("red circle", 4),
        ("{red|blue} ring", 3),
        ("red circle", 5),
        ("a\u2028line", 3),
    ]
    assert read_prompts(path) == [prompt for prompt, _ in found]
    assert jobs[2].name == "Fox 1" and jobs[1].name.startswith("blue-square-")
    assert len({job.name for job in jobs}) == 7

    path.write_text(f'{{"prompt": "{"long " * 1000}", "seed": 4294967295}}')
    (long,) = read_jobs(path, 3)
    assert long.seed == 4294967295 and len(long.name) <= 50  # one of a file

    path.write_text("\n".join(lines[4:6]))  # what is left keeps its seed and name
    assert read_jobs(path, 3) == jobs[1:3]
    assert all("/" not in job.name for job in read_jobs(path, 0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["cannot be read"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        ("", ["expected a prompt a line"]),
        ("# only\n\n", ["expected a prompt a line"]),
        ('x\n{"prompt": "x",}', ["line 2"]),
        ('{"promt": "x"}', ["line 1", "'promt'", "prompt, seed, name"]),
        ('{"seed": 3}', ["prompt is None"]),
        ('{"prompt": " "}', ["prompt is ' '"]),
        ('{"prompt": "x", "seed": -1}', ["seed is -1"]),
        ('{"prompt": "x", "seed": true}', ["seed is True"]),
        ('{"prompt": "x", "seed": "3"}', ["seed is '3'"]),
        ('{"prompt": "x", "seed": 4294967296}', ["seed is 4294967296"]),
        ('{"prompt": "x", "name": "a/b"}', ["name is 'a/b'", "no slash"]),
        ('{"prompt": "x", "name": "..\\\\up"}', ["name is"]),
        ('{"prompt": "x", "name": ".partial-x"}', ["no dot"]),
        ('{"prompt": "x", "name": ""}', ["name is ''"]),
        (r'{"prompt": "x", "name": "a\nb"}', ["name is 'a\\nb'"]),
        ('{"prompt": "x", "name": 3}', ["name is 3"]),
        (json.dumps({"prompt": "x", "name": "é" * 101}), ["200 bytes"]),
        ('{"prompt": "x", "name": "A"}\n\n{"prompt": "y", "name": "a"}', ["lines 1 and 3", "'a'"]),
        ('x\n{"prompt": "x", "seed": 0}', ["lines 1 and 2", "another name or seed"]),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, capsys, text, words):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert draw("nowhere/model", path, tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dicache: ") and all(word in line for word in [str(path), *words])
    assert not (tmp_path / "out").exists()


def test_every_prompt_is_drawn_as_alone_and_once(flux_folder, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text('blue square\n{"prompt": "red circle", "seed": 3, "name": "red"}\n')
    assert draw(flux_folder, path, out, *RULES) == 0

    told = capsys.readouterr()
    assert "red:" not in told.err  # a bar: nobody looks at one
    printed = told.out.splitlines()
    assert len(printed) == 3 and printed[1].startswith("[2/2] red.png:")
    assert "2 drawn, 0 finished before, 0 not drawn" in printed[2]
    alone = ["--model", str(flux_folder), "--prompt", "red circle", "--seed", "3", *RULES]
    assert main(["generate", *alone, "--out", str(tmp_path / "alone")]) == 0
    stats = json.loads((tmp_path / "alone" / "stats.json").read_text())
    expected = numpy.asarray(Image.open(tmp_path / "alone" / "output.png"))
    assert numpy.array_equal(numpy.asarray(Image.open(out / "red.png")), expected)
    record = manifest(out)["red"]
    assert (record["prompt"], record["seed"], record["file"]) == ("red circle", 3, "red.png")
    # 9 blocks, 3 steps of them and 2 probes of one.
    assert record["block_speedup"] == pytest.approx(5 * 9 / (3 * 9 + 2))
    assert record["block_speedup"] == stats["summary"]["fewer_blocks"]
    assert (record["computed"], record["resumed"], record["reused"]) == (3, 0, 2)
    assert record["masks"] == {"transformer": {"cond": "CCRRC"}} and record["error"] is None
    assert record["cache_bytes"] == stats["summary"]["cache_bytes"] and record["seconds"] > 0
    assert [*manifest(out)][1] == "red"  # in the file's order

    def unwanted(*_):
        raise AssertionError("a pipeline is loaded for nothing")

    with monkeypatch.context() as patch:
        patch.setattr("dicache.cli.many.load", unwanted)
        for folder in (out, out / "records"):  # of a process that was killed
            (folder / ".partial-0123abcd-red.png").touch()
        assert draw(flux_folder, path, out, *RULES) == 0
    assert "0 drawn, 2 finished before, 0 not drawn" in capsys.readouterr().out
    assert partials(out) == []

    # One more line costs one more picture, wherever it stands.
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.png")}
    path.write_text("green ring\n" + path.read_text())
    assert draw(flux_folder, path, out, *RULES) == 0
    assert "1 drawn, 2 finished before" in capsys.readouterr().out
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    assert len(manifest(out)) == 3


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "6"],
        ["--seed", "1"],
        ["--height", "64"],
        ["--schedule", "CCRCC"],
        ["--dtype", "bfloat16"],
    ],
)
def test_what_makes_another_picture_is_drawn_anew(
    flux_folder, tmp_path, capsys, monkeypatch, options
):
    def killed(*_):
        raise AssertionError("killed")

    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text('{"prompt": "red circle", "name": "red"}\n')
    assert draw(flux_folder, path, out, *RULES) == 0
    before = pictures(out)
    capsys.readouterr()

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="killed"):
        patch.setattr("dicache.cli.many.load", killed)
        draw(flux_folder, path, out, *RULES, *options)
    assert manifest(out) == {}  # it tells of these settings' pictures alone
    capsys.readouterr()

    assert draw(flux_folder, path, out, *RULES, *options) == 0
    printed = capsys.readouterr()
    assert "1 drawn, 0 finished before" in printed.out
    assert "1 pictures of other settings are there" in printed.err
    assert pictures(out)["red.png"] != before["red.png"]


def test_another_model_or_profile_makes_another_picture(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red circle\n")
    (job,) = read_jobs(path, 0)
    settings = [{"model": "a/b", "profile": None}, {"model": "a/c"}, {"profile": "0123"}]
    Records(tmp_path, settings[0]).finish(job, torch.zeros(3, 4, 4), {})
    left = [Records(tmp_path, {**settings[0], **each}).remaining([job]) for each in settings]
    assert left == [[], [job], [job]]
    Records(tmp_path, settings[1]).write_manifest([job])
    assert manifest(tmp_path) == {}

    # Of the same name, too; a failure has no picture that could be replaced.
    other = replace(job, prompt="blue square")
    assert Records(tmp_path, settings[0]).remaining([other]) == [other]
    assert Records(tmp_path, settings[1]).replaced([job]) == 1
    Records(tmp_path, settings[0]).fail(job, "broken", {})
    assert Records(tmp_path, settings[1]).replaced([job]) == 0


def test_sparse_attention_makes_another_picture_and_another_way_to_the_model_does_not(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pipeline_folders.save_wan(tmp_path / "wan")
    (tmp_path / "prompts").write_text("red circle\n")
    size = ["--num-frames", 5, "--height", 64, "--width", 64, "--steps", 2]
    counts = []
    for folder, options in (
        (tmp_path / "wan", []),
        ("wan", []),
        ("wan", ["--sparse"]),
        ("wan", ["--sparse", "--density", 0.5]),
    ):
        assert draw(folder, "prompts", "out", *size, *options) == 0
        counts += re.findall(r"(\d) drawn", capsys.readouterr().out)
    assert counts == ["1", "0", "1", "1"]


def test_a_profile_counts_by_its_content(flux_folder, tmp_path, capsys):
    path, out, file = (tmp_path / name for name in ("prompts.txt", "out", "profile.json"))
    path.write_text("red circle\n")
    options = ["--steps", "30", "--profile", file, "--target-speedup", "3", *SIZE]
    shipped_profile("flux").save(file)
    counts = []
    for change in (1.0, 1.0, 2.0):
        profile = json.loads(file.read_text())
        profile["gains"][3] *= change
        file.write_text(json.dumps(profile))
        assert draw(flux_folder, path, out, *options) == 0
        counts += re.findall(r"(\d) drawn", capsys.readouterr().out)
    assert counts == ["1", "0", "1"]


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    from dicache.cli import many

    used = []
    monkeypatch.setattr(many, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    alone, second = (
        SimpleNamespace(num_processes=count, local_process_index=count - 1) for count in (1, 2)
    )
    assert many._own_device("cuda", second) == torch.device("cuda:1") == used[0]
    assert many._own_device("cuda:0", alone) == torch.device("cuda:0")
    assert many._own_device("cpu", second) == torch.device("cpu") and len(used) == 1
    with pytest.raises(InputError, match="cuda:0 is one device for 2 processes"):
        many._own_device("cuda:0", second)


def test_only_a_whole_picture_with_its_record_is_finished(tmp_path):
    (tmp_path / "prompts").write_text("red circle\n")
    jobs = read_jobs(tmp_path / "prompts", 0)
    records = Records(tmp_path / "out", {})
    assert records.remaining(jobs) == jobs

    def harm(change):
        file = records.finish(jobs[0], torch.rand(3, 8, 8), {})
        assert records.remaining(jobs) == []
        change(tmp_path / "out" / file, tmp_path / "out" / "records" / f"{jobs[0].name}.json")
        return records.remaining(jobs)

    assert harm(lambda picture, _: picture.unlink()) == jobs
    assert harm(lambda picture, _: picture.write_bytes(picture.read_bytes()[:-1])) == jobs
    assert harm(lambda _, record: record.unlink()) == jobs
    assert harm(lambda _, record: record.write_text("")) == jobs
    assert harm(lambda _, record: record.write_text("[]")) == jobs
    assert harm(lambda _, record: record.write_text(record.read_text()[:40])) == jobs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_record_never_tells_of_another_picture_than_the_one_that_is_there(tmp_path):
    """A process is killed at every call that changes the folder, while it replaces a picture."""
    (tmp_path / "prompts").write_text('{"prompt": "x", "name": "x"}\n')
    jobs = read_jobs(tmp_path / "prompts", 0)
    red, green, _ = torch.eye(3)
    old, new = (color.view(3, 1, 1) for color in (red, green))

    def killed_at(step, out):
        """Whether the process that draws came to that call."""
        child = os.fork()
        if child == 0:
            done = 0

            def dying(usual):
                def call(*arguments, **options):
                    nonlocal done
                    if done == step:
                        os._exit(9)
                    done += 1
                    return usual(*arguments, **options)

                return call

            for name in ("replace", "unlink", "write_text"):
                setattr(Path, name, dying(getattr(Path, name)))
            Records(out, {"of": "new"}).finish(jobs[0], new, {})
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    seen, sizes = [], set()
    for step in range(20):
        out = tmp_path / f"out{step}"
        records = {name: Records(out, {"of": name}) for name in ("old", "new")}
        records["old"].finish(jobs[0], old, {})
        over = not killed_at(step, out)
        finished = [name for name, each in records.items() if not each.remaining(jobs)]
        there = {(255, 0, 0): "old", (0, 255, 0): "new"}[Image.open(out / "x.png").getpixel((0, 0))]
        assert finished in ([], [there])
        seen.append((finished, there))
        sizes.add((out / "x.png").stat().st_size)
        records["new"].clean()
        assert partials(out) == []
        if over:
            break
    # Also in between: a new picture without a record is drawn once more.
    assert seen[0] == (["old"], "old") and seen[-1] == (["new"], "new") and ([], "new") in seen
    assert len(sizes) == 1  # which does not tell them apart


def test_a_folder_is_for_one_run_at_a_time(flux_folder, tmp_path, capsys):
    (tmp_path / "prompts").write_text("red circle\n")
    with only_run(tmp_path):
        with pytest.raises(InputError, match="another run"), only_run(tmp_path):
            pass
        assert draw(flux_folder, tmp_path / "prompts", tmp_path, *RULES) == 2
        assert "another run writes to it" in capsys.readouterr().err
        assert not (tmp_path / "manifest.jsonl").exists()
    with only_run(tmp_path):
        pass


def test_a_file_system_without_locks_is_enough(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_prompt_that_fails_ends_nothing(flux_folder, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    names = ["broken", "good", "too large", "disk full"]
    path.write_text("".join(json.dumps({"prompt": n, "name": n}) + "\n" for n in names))
    from dicache.cli import many, records

    usual, usual_write = many.draw_cached, records.write_output

    def failing(pipe, inputs, *rules):
        prompt = inputs()["prompt"]
        if prompt == "broken":
            raise RuntimeError("the model\nbroke")
        if prompt == "too large":
            raise torch.OutOfMemoryError
        return usual(pipe, inputs, *rules)

    def full(folder, stem, picture):
        if "disk full" in stem:
            (folder / f"{stem}.png").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return usual_write(folder, stem, picture)

    with monkeypatch.context() as patch:
        patch.setattr(many, "draw_cached", failing)
        patch.setattr(records, "write_output", full)
        assert draw(flux_folder, path, out, *RULES) == 1
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if "FAILED" in line]
    assert told[0] == "[1/4] broken FAILED: RuntimeError: the model broke"
    assert (
        told[1].startswith("[3/4] too large FAILED: not enough memory on cpu")
        and "No space left" in told[2]
        and len(told) == 3
    )
    assert "1 drawn, 0 finished before, 3 not drawn" in printed.out
    found = manifest(out)
    assert [*found] == names and {name for name in names if found[name]["error"]} == {*names} - {
        "good"
    }
    assert "in failing" in found["broken"]["traceback"] and found["broken"]["file"] is None
    assert [*pictures(out)] == ["good.png"] and partials(out) == []

    assert draw(flux_folder, path, out, *RULES) == 0
    assert "3 drawn, 1 finished before, 0 not drawn" in capsys.readouterr().out
    assert all(record["error"] is None for record in manifest(out).values())


def test_a_folder_that_takes_nothing_any_more_ends_the_run(
    flux_folder, tmp_path, capsys, monkeypatch
):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("red circle\nblue square\ngreen ring\n")
    from dicache.cli import records

    usual = Path.write_text

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_for_records(file, *arguments, **options):
        if file.parent.name == "records":
            usual(file, "half")
            full()
        return usual(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_output", full)
        patch.setattr(Path, "write_text", full_for_records)
        assert draw(flux_folder, path, out, *RULES) == 2
    told = capsys.readouterr().err.splitlines()
    assert sum("FAILED" in line for line in told) == 1
    assert "cannot be written: [Errno 28] No space left" in told[-1] and partials(out) == []
    assert draw(flux_folder, path, out, *RULES) == 0 and len(manifest(out)) == 3


def test_a_process_whose_neighbour_is_gone_says_what_is_missing(
    flux_folder, tmp_path, capsys, monkeypatch
):
    """Without a launcher that ends it, too: gloo tells it at the end."""
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("red circle\nblue square\n")
    from dicache.cli import many

    def broken(values):
        if isinstance(values[0], int):
            raise RuntimeError("Connection closed by peer")
        return values

    monkeypatch.setattr(many, "gather_object", broken)
    monkeypatch.setattr(many.PartialState, "split_between_processes", half)
    assert draw(flux_folder, path, out, *RULES) == 1
    printed = capsys.readouterr()
    assert "another process ended early" in printed.err
    assert "1 drawn, 0 finished before, 1 not drawn" in printed.out and len(manifest(out)) == 1


@contextmanager
def half(_, values):
    """What the first of two processes gets."""
    yield values[: len(values) // 2]


def test_a_warning_that_is_the_same_for_all_prompts_is_told_once(flux_folder, tmp_path, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("red circle\nblue square\n")
    assert draw(flux_folder, path, out, "--steps", "4", "--threshold", "0.0001", *SIZE) == 0
    printed = capsys.readouterr()
    assert printed.err.count("None of the 4 steps") == 1
    assert printed.out.count("4 of 4 steps computed") == 2  # some of them from the probe on
    records = manifest(out).values()
    assert all(each["resumed"] > 0 and each["computed"] + each["resumed"] == 4 for each in records)
    notes = [record["notes"] for record in records]
    assert len(notes) == 2 and all("None of the 4 steps" in each[0] for each in notes)


def test_ctrl_c_ends_in_one_line_and_keeps_what_is_finished(
    flux_folder, tmp_path, capsys, monkeypatch
):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("red circle\nblue square\ngreen ring\n")
    from dicache.cli import records

    usual = records.write_output

    def interrupted(folder, stem, picture):
        file = usual(folder, stem, picture)
        if "blue" in stem:
            raise KeyboardInterrupt
        return file

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_output", interrupted)
        assert draw(flux_folder, path, out, *RULES) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted" in last and "2 of 3" in last
    assert len(manifest(out)) == len(pictures(out)) == 1 and partials(out) == []
    assert draw(flux_folder, path, out, *RULES) == 0
    assert "2 drawn, 1 finished before" in capsys.readouterr().out


def test_bad_options_are_one_line(flux_folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("red circle\n")

    def trouble(*options, out=tmp_path / "out"):
        assert main([*map(str, ["generate", "--model", flux_folder, "--out", out, *options])]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "neither" in trouble() and "both" in trouble("--prompt", "x", "--prompts", path)
    assert "--compare" in trouble("--prompts", path, "--compare")
    assert "is a file" in trouble("--prompts", path, out=path)
    assert "cannot be written to" in trouble("--prompts", path, out=path / "inside")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    assert ".lock cannot be written" in trouble("--prompts", path, out=tmp_path / "locked")
    assert "no num_frames" in trouble("--prompts", path, "--num-frames", 5)
    assert not pictures(tmp_path / "out")


def start(*arguments, launcher=("torch.distributed.run", "--nproc-per-node", "2")):
    """Two processes, as a user starts them."""
    line = [sys.executable, "-m", *launcher, "-m", "dicache", *map(str, command(*arguments))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_two_processes_share_the_prompts(flux_folder, tmp_path):
    path = tmp_path / "prompts.txt"
    # No tokenizer takes half a surrogate: the second line fails, in the first process.
    path.write_text(
        'red circle\n{"prompt": "\\ud800", "name": "broken"}\nred circle\nblue square\ngreen ring\n'
    )
    running = start(flux_folder, path, tmp_path / "two", *RULES)
    out, err = running.communicate(timeout=240)
    assert draw(flux_folder, path, tmp_path / "one", *RULES) == 1

    assert running.returncode != 0
    assert err.count("broken FAILED") == 1 and "0, 2/3] broken FAILED" in err
    assert "4 drawn, 0 finished before, 1 not drawn" in out
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")
    assert len(pictures(tmp_path / "one")) == 4 and partials(tmp_path / "two") == []
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert [*one] == [*two]
    assert [record["process"] for record in two.values()] == [0, 0, 0, 1, 1]
    own = {"process", "seconds", "traceback"}  # of a process; all else is the picture's
    for name, record in one.items():
        assert {k: v for k, v in record.items() if k not in own} == {
            k: v for k, v in two[name].items() if k not in own
        }


def test_a_killed_process_costs_the_picture_that_it_was_drawing(flux_folder, tmp_path, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("".join(f"red circle {index}\n" for index in range(12)))
    running = start(flux_folder, path, out, *RULES)
    deadline = time.monotonic() + 200
    try:
        while len([*out.glob("records/*.json")]) < 3:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        assert draw(flux_folder, path, out, *RULES) == 2
        assert "another run writes to it" in capsys.readouterr().err
        workers = psutil.Process(running.pid).children()
        # The second process: the first one has the lock, and waits for it at the end.
        (second,) = [p for p in workers if p.environ().get("RANK") == "1"]
        second.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode != 0 and not any(each.is_running() for each in workers)

    finished = {p: p.stat().st_mtime_ns for p in out.glob("*.png")}
    assert draw(flux_folder, path, out, *RULES) == 0
    kept = [p for p, at in finished.items() if p.stat().st_mtime_ns == at]
    # A picture may be there whose record was not written yet, one a process.
    assert len(finished) - len(kept) <= 2 and 3 <= len(kept) < 12
    assert len(pictures(out)) == len(manifest(out)) == 12 and partials(out) == []
    assert draw(flux_folder, path, tmp_path / "one", *RULES) == 0
    assert pictures(out) == pictures(tmp_path / "one")
