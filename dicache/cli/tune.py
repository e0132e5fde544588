"""`dicache tune`: calibrate a model, show what each speed costs, and write its profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dicache import DiCacheConfig, Profile, apply_dicache, calibrate, remove_dicache
from dicache.demo import pipelines
from dicache.demo.profiles import PROFILE_STEPS, shipped_profile
from dicache.demo.report import number_text
from dicache.profiling import expect

from .demo import progress_bar
from .errors import InputError, one_line
from .files import write_elsewhere
from .generate import (
    Request,
    check_arguments,
    find_device,
    find_dtype,
    first_pictures,
    load_pipeline,
    memory_errors,
)
from .info import versions
from .prompts import read_prompts

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
_PROMPTS = (
    "a fishing boat on a calm lake at sunrise, photograph",
    "portrait of an old man with a grey beard, oil painting",
    "a busy street in the rain at night, neon lights",
    "a red fox walks through deep snow",
    "a bowl of fruit on a wooden table, still life",
    "a castle on a hill above a river, seen from the air",
    "a child throws a ball to a small dog on the beach",
    "close-up of a mechanical watch, macro photograph",
)


def run_tune(request: Request, prompts: Path | None, samples: int, gains: int, out: Path) -> None:
    """Calibrate, print the curve, and write the profile.

    Args:
        request: The model, its pipeline's arguments, device and dtype; and under `rules` the
            target, for the lines that use the profile.
        prompts: A file with a prompt a line, which samples take in turns.
        samples: Number of un-cached runs.
        gains: Number of runs that measure how far an error goes.
        out: The profile's file.

    Raises:
        InputError: The request cannot be met.
    """
    _check_file(out)
    targets = {name: value for name, value in request.rules.items() if value is not None}
    _check_targets(targets, gains)
    texts = read_prompts(prompts) if prompts is not None else None
    job = _demo_job(request, texts) if request.model in PROFILE_STEPS else _job(request, texts)
    about = {"model": request.model, "versions": versions(), **request.arguments, **targets}
    with progress_bar() as bar:
        task = bar.add_task(f"calibrating {request.model}", total=samples + gains)
        try:
            profile = calibrate(
                job.pipe,
                job.run,
                samples,
                gains=gains,
                about=about,
                progress=lambda done, _: bar.update(task, completed=done),
            )
        except ValueError as error:
            raise InputError(one_line(error)) from error
    console = Console()
    console.print(curve_table(profile))
    if targets:
        console.print(_target_line(profile, targets), highlight=False)
    try:
        profile.save(out)
    except OSError as error:
        elsewhere = write_elsewhere(lambda folder: profile.save(folder / out.name))
        reason = f"--out {out} cannot be written: {one_line(error)}"
        raise InputError(f"{reason}; {elsewhere}") from error
    for line in usage_lines(out, targets):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class _Job:
    """A pipeline, and what makes one sample with it."""

    pipe: Any
    run: Callable[[int], Tensor]


def _demo_job(request: Request, prompts: list[str] | None) -> _Job:
    """A shipped model's."""
    name, steps = request.model, request.arguments.get("num_inference_steps", None)
    others = sorted({*request.arguments} - {"num_inference_steps"})
    if others:
        raise InputError(f"{name} is a demo model, which takes no {', '.join(others)}")
    texts = prompts or pipelines.default_prompts(name)
    try:
        for text in texts:
            pipelines.pipeline_inputs(name, text, 0, 1)
    except ValueError as error:
        raise InputError(f"{one_line(error)} (the demo models know no other words)") from error
    pipe = pipelines.load_pipeline(name)
    torch.set_num_threads(1)

    def run(index: int) -> Tensor:
        text = texts[index % len(texts)]
        inputs = pipelines.pipeline_inputs(
            name, text, request.seed + index, steps or PROFILE_STEPS[name]
        )
        return pipelines.decode(name, pipe(**inputs))

    return _Job(pipe, run)


def _job(request: Request, prompts: list[str] | None) -> _Job:
    """That of any pipeline."""
    device = find_device(request.device)
    dtype = find_dtype(request.dtype, device)
    pipe = load_pipeline(request.model, dtype)
    try:
        apply_dicache(pipe)
        remove_dicache(pipe)
    except ValueError as error:
        raise InputError(one_line(error)) from error
    arguments = check_arguments(pipe, request)
    texts = prompts or [*_PROMPTS]
    pipe.set_progress_bar_config(disable=True)
    with memory_errors(device):
        pipe.to(device)

    def run(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(request.seed + index)
        inputs = {**arguments, "prompt": texts[index % len(texts)], "generator": generator}
        with memory_errors(device):
            return first_pictures(pipe(**inputs))

    return _Job(pipe, run)


def curve_table(profile: Profile) -> Table:
    """What the plan of every speed computes, and expects."""
    table = Table(title=f"steps: {profile.num_steps}, samples: {profile.samples}")
    for head in ("target", "computed", "less block work", "expected PSNR"):
        table.add_column(head, justify="right")
    table.add_column("mask", overflow="fold")
    for speedup in SPEEDUPS:
        try:
            each = expect(profile, DiCacheConfig(profile=profile, target_speedup=speedup))
        except ValueError:  # the probes alone cost more
            table.add_row(f"{number_text(speedup)}x", "-", "-", "-", "too few steps")
            continue
        psnr = "-" if each.psnr is None else f"{each.psnr:.1f} dB"
        masks = "\n".join(each.masks.values())
        less = f"{each.speedup:.2f}x"
        table.add_row(f"{number_text(speedup)}x", str(each.computed), less, psnr, masks)
    return table


def usage_lines(out: Path, targets: dict[str, float]) -> list[str]:
    """Python that uses the profile."""
    target = ", ".join(f"{name}={value:g}" for name, value in targets.items())
    return [
        "from dicache import DiCacheConfig, apply_dicache",
        f"config = DiCacheConfig(profile={str(out)!r}, {target or 'target_speedup=2.5'})",
        "apply_dicache(pipe, config)",
    ]


def _target_line(profile: Profile, targets: dict[str, Any]) -> str:
    each = expect(profile, DiCacheConfig(profile=profile, **targets))
    psnr = "" if each.psnr is None else f", {each.psnr:.1f} dB expected"
    return f"target: {each.computed} of {profile.num_steps} steps, {each.speedup:.2f}x{psnr}"


def _check_targets(targets: dict[str, Any], gains: int) -> None:
    """Find out now, before the runs, whether a configuration could have these."""
    if len(targets) > 1:
        raise InputError("--target-speedup and --target-psnr are given; expected one of them")
    if "target_psnr" in targets and gains == 0:
        raise InputError("--target-psnr needs --gains above 0, to see how far an error goes")
    try:
        DiCacheConfig(profile=shipped_profile("flux"), **targets)  # any profile will do
    except ValueError as error:
        raise InputError(one_line(error)) from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; expected the profile's file")
    probe = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {one_line(error)}") from error
