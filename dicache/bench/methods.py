"""What is compared: a row a method, with how it goes on a pipeline and its one free setting.

`dicache bench` searches the setting for a given cost, so `settings` are in the order of that: from
one that saves nothing or little to one that saves all it can.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

import dicache
from dicache import DiCacheConfig, Profile, calibrate

from . import teacache
from .subjects import Subject, loaded, transformers_of

THRESHOLDS = tuple(float(f"{1.3**power:.3g}") for power in range(-30, 12))  # 0.0004 to 18


@dataclass(frozen=True)
class Lesson:
    """How a profile is made: the plain one, or one that does not quite fit what it is used for.

    Attributes:
        samples: Number of un-cached runs that record.
        gains: Number of runs that measure how far an error goes.
        steps: Their number of steps over the subject's.
        guidance: Their guidance scale over the subject's.
        noise: Standard deviation of what is added to every weight, over that of the weight.
    """

    samples: int = 2
    gains: int = 8
    steps: float = 1.0
    guidance: float = 1.0
    noise: float = 0.0


@dataclass(frozen=True)
class Task:
    """What a method knows of the runs that it is for.

    Attributes:
        subject: What is drawn.
        num_blocks: Of its model.
        calibration_seeds: Seeds that have no part in the comparison.
        profiles: What calibrations found, by their lesson.
        mag_ratios: What MagCache's own calibration found.
    """

    subject: Subject
    num_blocks: int
    calibration_seeds: Sequence[int]
    profiles: dict[Lesson, Profile] = field(default_factory=dict)
    mag_ratios: list[float] = field(default_factory=list)


def thresholds(task: Task) -> Sequence[float]:
    """Of every method that has one."""
    return THRESHOLDS


# Puts a method with a setting on a pipeline; gives arguments of the call that it changes.
Apply = Callable[[Any, Task, float], AbstractContextManager[dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        name: For tables.
        group: What it is compared with by default.
        apply: Puts it on a pipeline.
        settings: Its settings for a task.
        lesson: What a calibration has to be like, if it takes a profile.
        learns_ratios: Whether it takes MagCache's calibration.
        package: A package that it needs beyond the command line's.
        is_speedup: Whether the setting promises a cost at the model's own depth.
    """

    name: str
    group: str
    apply: Apply
    settings: Callable[[Task], Sequence[float]] = thresholds
    lesson: Lesson | None = None
    learns_ratios: bool = False
    package: str | None = None
    is_speedup: bool = False

    @property
    def missing(self) -> str | None:
        """Why it cannot run here."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed"

    def prepare(self, task: Task) -> None:
        """Learn on the calibration's seeds what it needs and the task has not yet."""
        if self.lesson is not None and self.lesson not in task.profiles:
            task.profiles[self.lesson] = profile_of(task, self.lesson)
        if self.learns_ratios and not task.mag_ratios:
            task.mag_ratios.extend(mag_ratios_of(task))


# --- How they go on -----------------------------------------------------------------------------


@contextmanager
def uncached(pipe: Any, task: Task, setting: float) -> Iterator[dict[str, Any]]:
    """No cache."""
    yield {}


@contextmanager
def _fewer_steps(pipe: Any, task: Task, setting: float) -> Iterator[dict[str, Any]]:
    yield {"num_inference_steps": int(setting)}


@contextmanager
def _dicache(
    make: Callable[[Task, float], DiCacheConfig], pipe: Any, task: Task, setting: float
) -> Iterator[dict[str, Any]]:
    dicache.apply_dicache(pipe, make(task, setting))
    try:
        yield {}
    finally:
        dicache.remove_dicache(pipe)


@contextmanager
def _of_diffusers(
    make: Callable[[Task, float], Any], pipe: Any, task: Task, setting: float
) -> Iterator[dict[str, Any]]:
    models: list[Any] = transformers_of(pipe)
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_telling_position(model, pipe.scheduler))
            model.enable_cache(make(task, setting))
            stack.callback(model.disable_cache)
        yield {}


@contextmanager
def _telling_position(model: Any, scheduler: Any) -> Iterator[None]:
    """`cache_context` says step, sigma and number of steps, which SeaCache reads.

    Of the pipelines only Wan's does so by itself.
    """
    plain = model.cache_context

    @contextmanager
    def cache_context(name: str, **given: Any) -> Iterator[None]:
        index = scheduler.step_index or 0
        sigma, steps = float(scheduler.sigmas[index]), len(scheduler.timesteps)
        position = {"step_index": index, "sigma": sigma, "num_inference_steps": steps}
        with plain(name, **position | given):
            yield

    model.cache_context = cache_context
    try:
        yield
    finally:
        del model.cache_context


@contextmanager
def _teacache(pipe: Any, task: Task, threshold: float) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        for model in transformers_of(pipe):
            rule = teacache.teacache(model, task.subject.steps, threshold)
            stack.enter_context(rule)
        yield {}


@contextmanager
def _cache_dit(taylor: bool, pipe: Any, task: Task, setting: float) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    import cache_dit  # type: ignore[import-not-found, unused-ignore]

    # Its warm-up of 8 steps is shortened to the tenth of a run that our default retains.
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=setting,
        max_warmup_steps=task.subject.steps // 10,
        num_inference_steps=task.subject.steps,
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    with contextlib.ExitStack() as stack:
        for model in transformers_of(pipe):
            stack.enter_context(_put_back(model))
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        stack.callback(cache_dit.disable_cache, pipe)
        yield {}


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Undo what a cache leaves on a model: a `forward`, say, or another order of its lists.

    diffusers' FirstBlockCache takes the first list for the one that runs first.
    """
    plain, lists = dict(vars(model)), dict(model._modules)
    try:
        yield
    finally:
        for live, kept in ((vars(model), plain), (plain["_modules"], lists)):
            live.clear()
            live.update(kept)


# --- Configurations of a setting ----------------------------------------------------------------


def _rules(fields: dict[str, Any], task: Task, threshold: float) -> DiCacheConfig:
    return replace(DiCacheConfig(), **fields, threshold=threshold)


def _preset(name: str, fields: dict[str, Any], task: Task, threshold: float) -> DiCacheConfig:
    return DiCacheConfig.preset(name, threshold=threshold, **fields)  # type: ignore[arg-type]


def _weights(lesson: Lesson, task: Task, threshold: float) -> DiCacheConfig:
    return DiCacheConfig(profile=task.profiles[lesson], threshold=threshold)


def _plan(
    lesson: Lesson, measured: bool, fields: dict[str, Any], task: Task, speedup: float
) -> DiCacheConfig:
    profile = task.profiles[lesson]
    if not measured:
        profile = replace(profile, gains=None)
    return DiCacheConfig(profile=profile, target_speedup=speedup, **fields)


def _first_block(task: Task, threshold: float) -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold)


def _mag_cache(limit: int | None, retention: float, task: Task, threshold: float) -> MagCacheConfig:
    steps = task.subject.steps
    return MagCacheConfig(
        threshold=threshold,
        max_skip_steps=limit or steps,
        retention_ratio=retention,
        num_inference_steps=steps,
        mag_ratios=task.mag_ratios,
    )


def _sea_cache(limit: int, task: Task, threshold: float) -> SeaCacheConfig:
    return SeaCacheConfig(
        threshold=threshold, max_consecutive_cached=limit, raw_vision_callback=vision_latents
    )


def _taylor_seer(task: Task, interval: float) -> TaylorSeerCacheConfig:
    # Its default stores the factors in bf16; the shipped models run in fp32.
    dtype = transformers_of(loaded(task.subject))[0].dtype
    return TaylorSeerCacheConfig(
        cache_interval=int(interval),
        use_lite_mode=True,
        taylor_factors_dtype=dtype,  # type: ignore[arg-type, unused-ignore]
    )


def vision_latents(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """The latents [C, T, H, W] that SeaCache filters; packed ones are of square pictures."""
    latents = kwargs["hidden_states"]
    if latents.ndim == 5:
        return list(latents)
    side = math.isqrt(latents.shape[1])
    grid = latents.unflatten(1, (side, side)).unflatten(-1, (-1, 2, 2))  # [B, h, w, C, 2, 2]
    return list(grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).unsqueeze(2))


# --- Settings -----------------------------------------------------------------------------------


def _step_counts(task: Task) -> Sequence[float]:
    return range(task.subject.steps, 1, -1)


def _below_one(task: Task) -> Sequence[float]:
    """cache-dit does not compare at all from a threshold of 1 on."""
    return [threshold for threshold in THRESHOLDS if threshold < 1]


def _intervals(task: Task) -> Sequence[float]:
    return range(2, 11)


def _speedups(task: Task) -> Sequence[float]:
    """Those that mean a whole number of computed steps."""
    steps, probe = task.subject.steps, 1 / task.num_blocks
    return [steps / (k + (steps - k) * probe) for k in range(steps, 1, -1)]


# --- The rows -----------------------------------------------------------------------------------


def _variant(group: str, name: str, **fields: Any) -> Method:
    """The default with other rules."""
    return Method(name, group, functools.partial(_dicache, functools.partial(_rules, fields)))


def _peer(name: str, make: Callable[[Task, float], Any], **fields: Any) -> Method:
    return Method(name, "caches", functools.partial(_of_diffusers, make), **fields)


def _calibrated(
    group: str, name: str, lesson: Lesson, measured: bool = True, **fields: Any
) -> Method:
    make = functools.partial(_plan, lesson, measured, fields)
    apply = functools.partial(_dicache, make)
    return Method(name, group, apply, _speedups, lesson=lesson, is_speedup=measured and not fields)


def _preset_row(group: str, name: str, **fields: Any) -> Method:
    title = f"preset {name}" + "".join(f", {key}={value!r}" for key, value in fields.items())
    make = functools.partial(_preset, name, fields)
    return Method(title, group, functools.partial(_dicache, make))


_PLAIN = Lesson()
_TAYLOR = "cache-dit F1B0 with TaylorSeer"

_ROWS = (
    Method("fewer steps", "caches", _fewer_steps, _step_counts),
    _variant("caches", "DiCacheConfig()"),
    _calibrated("caches", "calibrated", _PLAIN),
    Method(
        "calibrated weights, default's gate",
        "caches",
        functools.partial(_dicache, functools.partial(_weights, _PLAIN)),
        lesson=_PLAIN,
    ),
    _peer("FirstBlockCache", _first_block),
    _peer("SeaCache", functools.partial(_sea_cache, 2)),
    _peer("SeaCache, no limit of consecutive reuse", functools.partial(_sea_cache, 0)),
    _peer("TaylorSeer lite, order 1", _taylor_seer, settings=_intervals),
    _peer("MagCache", functools.partial(_mag_cache, 3, 0.2), learns_ratios=True),
    _peer(
        "MagCache, no limit, a tenth retained",
        functools.partial(_mag_cache, None, 0.1),
        learns_ratios=True,
    ),
    Method("TeaCache's rule, no polynomial", "caches", _teacache),
    Method(
        "cache-dit F1B0",
        "caches",
        functools.partial(_cache_dit, False),
        _below_one,
        package="cache_dit",
    ),
    Method(_TAYLOR, "caches", functools.partial(_cache_dit, True), _below_one, package="cache_dit"),
    _calibrated("calibration", "calibrated on 1 sample", Lesson(samples=1)),
    _calibrated("calibration", "calibrated on 2 samples", _PLAIN),
    _calibrated("calibration", "calibrated on 4 samples", Lesson(samples=4)),
    _calibrated("calibration", "calibrated on 8 samples", Lesson(samples=8)),
    _calibrated("calibration", "2 samples, 24 runs for gains", Lesson(gains=24)),
    _calibrated("calibration", "8 samples, 24 runs for gains", Lesson(samples=8, gains=24)),
    _calibrated("calibration", "without measured gains", _PLAIN, measured=False),
    _calibrated("calibration", "without veto", _PLAIN, veto=None),
    _calibrated("calibration", "calibrated in 5/3 of the steps", Lesson(steps=5 / 3)),
    _calibrated("calibration", "calibrated at 1.5 of the guidance", Lesson(guidance=1.5)),
    _calibrated("calibration", "calibrated with 5 % noise on the weights", Lesson(noise=0.05)),
    # Steps of 30 and of 50: a share R retains floor(30 R) and floor(50 R).
    _variant("rules", "retain 1 of 30, 2 of 50", retention_ratio=0.05),
    _variant("rules", "retain 5 of 30, 8 of 50", retention_ratio=0.17),
    _variant("rules", "last step may be reused", compute_last_step=False),
    _variant("rules", "gamma 0 or more", gamma_range=(0.0, None)),
    _variant("rules", "gamma 0 .. 3", gamma_range=(0.0, 3.0)),
    _variant("rules", "gamma 1 .. 1.5", gamma_range=(1.0, 1.5)),
    _variant("rules", "at most 4 reuses in a row", max_consecutive_reuse=4),
    _variant("rules", "probe of 2 blocks", probe_depth=2),
    _variant("rules", 'error="alignment"', error="alignment"),
    _variant("rules", 'error="delta_y", least squares', error="delta_y"),
    _variant("rules", 'error="delta_y", l1', error="delta_y", alignment="l1"),
    _variant("rules", 'error="delta_minus", l1', error="delta_minus", alignment="l1"),
    _variant("guidance", 'cfg="shared"', cfg="shared"),
    _variant("guidance", 'cfg="independent"', cfg="independent"),
    _preset_row("guidance", "wan2.1", cfg="shared"),
    _variant("memory", "as the model keeps it", cache_dtype=None),
    _variant("memory", "bf16", cache_dtype=torch.bfloat16),
    _variant("memory", "fp8, a scale a token", cache_dtype=torch.float8_e4m3fn),
)
GROUPS = tuple(dict.fromkeys(row.group for row in _ROWS))


def choose(wanted: Sequence[str], presets: Sequence[str]) -> list[Method]:
    """The rows that are asked for, by group, name or a part of the name.

    Args:
        wanted: Groups, names, or parts of names.
        presets: Names of the presets that belong to the model: they are of the group "caches".

    Raises:
        ValueError: A word finds nothing.
    """
    rows = [*_ROWS[:2], *(_preset_row("caches", name) for name in presets), *_ROWS[2:]]
    chosen = []
    for word in wanted:
        found = [row for row in rows if word in (row.group, row.name)]
        found = found or [row for row in rows if word.lower() in row.name.lower()]
        if not found:
            raise ValueError(
                f"No method is called {word!r}. Expected one of the groups {', '.join(GROUPS)}, or "
                f"a part of a name: {'; '.join(row.name for row in rows)}."
            )
        chosen += found
    return list(dict.fromkeys(chosen))


# --- Calibration --------------------------------------------------------------------------------


def profile_of(task: Task, lesson: Lesson) -> Profile:
    """What `dicache.calibrate` finds on the calibration's seeds."""
    subject, seeds = task.subject, task.calibration_seeds
    if lesson.noise:
        loaded.cache_clear()  # this pipeline is for one calibration
    pipe = loaded(subject)
    for model in transformers_of(pipe) if lesson.noise else ():
        _disturb(model, lesson.noise)

    def run(index: int) -> torch.Tensor:
        inputs = subject.inputs(seeds[index])
        inputs["num_inference_steps"] = round(subject.steps * lesson.steps)
        if lesson.guidance != 1:
            inputs["guidance_scale"] *= lesson.guidance
        return subject.decode(pipe(**inputs))

    try:
        return calibrate(pipe, run, lesson.samples, gains=lesson.gains)
    finally:
        if lesson.noise:
            loaded.cache_clear()


def _disturb(model: torch.nn.Module, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(share * weight.std(correction=0) * noise)


def mag_ratios_of(task: Task) -> list[float]:
    """What MagCache's calibration prints, averaged over two samples and the contexts."""
    pipe, printed = loaded(task.subject), io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=task.subject.steps)
    for seed in task.calibration_seeds[: _PLAIN.samples]:
        with (
            _of_diffusers(lambda task, setting: config, pipe, task, 0.0),
            contextlib.redirect_stdout(printed),
        ):
            pipe(**task.subject.inputs(seed))
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    return [mean(column) for column in zip(*map(json.loads, lines), strict=True)]
