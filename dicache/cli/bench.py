"""`dicache bench`: caches at equal cost, on the shipped models or on a pipeline of the user's."""

from __future__ import annotations

import datetime
import functools
import inspect
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dicache import Profile
from dicache.bench.methods import Lesson, choose
from dicache.bench.page import html
from dicache.bench.report import markdown, save_plot
from dicache.bench.results import Result
from dicache.bench.runner import Bench, Map, compare, task_of, workers
from dicache.bench.subjects import ShippedModel, Subject, UserPipeline, loaded, presets_for
from dicache.demo.pipelines import DEMO_MODELS

from .errors import InputError, one_line
from .files import make_folder
from .generate import find_device, find_dtype, load_pipeline
from .info import processor, versions
from .prompts import read_prompts

_CALIBRATION_SEEDS = range(9_000_000, 9_000_100)  # the comparison's have nothing to do with them
_PROMPTS = (
    "a red fox in deep snow at sunrise",
    "an old harbour at night, lights on wet stones",
    "a bowl of ripe peaches on a blue table",
    "a cyclist on a mountain road, low clouds",
)


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        model: A shipped one, all of them, or a pipeline's folder or name.
        methods: Groups, or parts of names.
        speedups: Costs to compare at.
        arguments: Of a user's pipeline.
    """

    model: str = "all"
    methods: Sequence[str] = ("caches",)
    speedups: Sequence[float] = (1.5, 2.0, 2.5, 3.0, 4.0)
    seeds: int = 32
    first_seed: int = 2000
    steps: int | None = None
    jobs: int = 1
    profile: Path | None = None
    prompts: Path | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "auto"
    out: Path = Path("dicache-bench")


def run_bench(request: Request) -> None:
    """Compare, and write files named after the model: json, csv, md, png and html.

    Raises:
        InputError: Something in the request cannot be had.
    """
    subjects = _subjects(request)
    folder = make_folder(request.out)
    profile = _profile(request.profile)
    with workers(request.jobs) as run:
        for subject in subjects:
            _bench(request, subject, profile, run, folder)


def _bench(
    request: Request, subject: Subject, profile: Profile | None, run: Map, folder: Path
) -> None:
    console = Console(stderr=True, highlight=False)
    try:
        methods = choose(request.methods, presets_for(loaded(subject)))
        task = task_of(subject, _CALIBRATION_SEEDS)
    except ValueError as error:
        raise InputError(one_line(error)) from error
    if profile is not None:
        task.profiles[Lesson()] = profile
    seeds = range(request.first_seed, request.first_seed + request.seeds)
    bench = Bench(task, seeds, run, request.jobs, request.speedups)
    result = Result(
        subject.name,
        subject.steps,
        bench.depths,
        subject.sibling[0] if subject.sibling else None,
        tuple(request.speedups),
        (request.first_seed, request.seeds),
        sum(each.seconds for each in bench.references) / request.seeds,
        _about(request),
    )
    stored = folder / f"{subject.name}.json"
    if stored.exists():
        result.keep(Result.load(stored))
    start = datetime.datetime.now()
    for name in compare(bench, methods, result):
        minutes = (datetime.datetime.now() - start).total_seconds() / 60
        result.about["time"] = f"{minutes:.0f} minutes with {request.jobs} workers"
        told = result.failures.get(name, f"{len(result.curves.get(name, ()))} settings")
        console.print(f"{subject.name}: {name}: {told}, {minutes:.1f} min", markup=False)
        if result.curves:
            write(result, bench, folder)  # what is there outlives an interrupt
    if not result.curves:
        raise InputError(f"no method ran: {'; '.join(result.failures.values())}")
    Console().print(f"{folder}: {subject.name}.json, .csv, .md, .png, .html", markup=False)


def write(result: Result, bench: Bench, folder: Path) -> None:
    """All files of a model."""
    base = folder / result.model
    result.save(base.with_suffix(".json"))
    result.save_csv(base.with_suffix(".csv"))
    base.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    save_plot(result, base.with_suffix(".png"))
    page = html(result, base.with_suffix(".png"), bench.shown)
    base.with_suffix(".html").write_text(page, encoding="utf-8")


def _subjects(request: Request) -> list[Subject]:
    if request.model in ("all", *DEMO_MODELS):
        names = DEMO_MODELS if request.model == "all" else (request.model,)
        return [ShippedModel(name, request.steps) for name in names]
    device = find_device(request.device)
    dtype = find_dtype(request.dtype, device)
    pipe = load_pipeline(request.model, dtype).to(device)
    parameters = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(request.arguments) - set(parameters))
    if unknown:
        raise InputError(f"{type(pipe).__name__} has no {unknown[0]}")
    if request.jobs > 1:
        raise InputError("--jobs is for the shipped models; expected 1 for a pipeline of yours")
    steps = request.steps or parameters["num_inference_steps"].default
    name = Path(request.model).name
    arguments = tuple(request.arguments.items())
    prompts = _PROMPTS if request.prompts is None else tuple(read_prompts(request.prompts))
    return [UserPipeline(name, functools.partial(_same, pipe), prompts, steps, arguments)]


def _same(pipe: Any) -> Any:
    return pipe


def _profile(path: Path | None) -> Profile | None:
    if path is None:
        return None
    try:
        return Profile.load(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--profile: {one_line(error)}") from error


def _about(request: Request) -> dict[str, str]:
    """How the numbers were made."""
    profile = "2 samples, seeds from 9000000" if request.profile is None else str(request.profile)
    return {
        "command": shlex.join(["dicache", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} CPU cores; times are of a machine as it was",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "calibration": profile,
    }


def numbers(text: str) -> tuple[float, ...]:
    """ "1.5,2,3" as rising speed-ups.

    Raises:
        InputError: It is no such list.
    """
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] <= 1:
        raise InputError(f"--speedups {text} is no list of numbers above 1, such as 1.5,2,3")
    return found
