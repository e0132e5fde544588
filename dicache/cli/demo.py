"""`dicache demo`: the shipped models without and with DiCache, as a table, pictures and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dicache import DiCacheConfig, SparseVideoGenConfig
from dicache.demo.heads_plot import save_heads_plot, temporal_shares
from dicache.demo.pictures import (
    comparison_animation,
    comparison_sheet,
    four_runs_animation,
    four_runs_sheet,
    save_animation,
)
from dicache.demo.pipelines import (
    DEMO_MODELS,
    LONG_MODELS,
    decode,
    default_prompts,
    load_pipeline,
    pipeline_inputs,
)
from dicache.demo.profiles import PROFILE_STEPS, shipped_profile
from dicache.demo.report import (
    Summary,
    comparison_table,
    sample_to_dict,
    summarize,
    summary_to_dict,
    write_json,
)
from dicache.demo.runner import Decode, Inputs, Sample, run_cached, run_uncached
from dicache.demo.sparse import (
    NOTE,
    RUNS,
    FourRuns,
    four_runs,
    margin_text,
    sparse_markdown,
    sparse_table,
    sparse_to_dict,
)
from dicache.schedule_plot import save_schedule_plot

from .errors import InputError, note
from .files import make_folder, write_results
from .info import versions
from .rules import make_config, make_sparse_config

SAMPLES = 4
SPARSE_SAMPLES = 2  # these videos are three times as long, and drawn four times
_SPARSE_BLOCK = 16  # of 600 tokens, blocks of 128 would leave five a row
_WARM_UP_STEPS = 10  # so that there is every kind of step: computed, resumed, reused
_WARM_UP_RULES = DiCacheConfig()  # a profile or mask is of the runs that count
# Models this small gain little from more threads, and on a busy machine threads that wait for each
# other make times meaningless.
_THREADS = 1
_CAPTION = (
    "PSNR and SSIM compare DiCache's pictures with the un-cached ones (same seed): higher is "
    "closer, 100 dB and 1 are equal.\n"
    "The speed-up is a ratio of times on one CPU thread, noisy on models this small. A probe costs "
    "one block of 9 here, one of 57 in FLUX.1, of 60 in HunyuanVideo, of 30 in Wan 2.1-1.3B: there "
    "the same steps save more."
)
_SPARSE_CAPTION = (
    "Times are of one CPU thread and 600 tokens, where sparse attention costs more than it saves: "
    "it is for the long sequences of real models on a GPU."
)


def run_demo(
    model: str,
    steps: int | None,
    seed: int,
    out: Path,
    options: Mapping[str, Any],
    sparse: bool = False,
    density: float | None = None,
) -> None:
    """Run the demo of one model or of all, print its table, and write its files.

    Args:
        options: Those of the cache that were given; a target takes the shipped profiles.

    Raises:
        InputError: There is no such model, rule or density, the model cannot be sparse, or `out`
            cannot be written to.
    """
    rules = make_sparse_config(sparse, density, _SPARSE_BLOCK)
    names = _models(model) if rules is None else _sparse_models(model)
    configs = {name: _config(name, options, sparse) for name in names}
    folders = {name: make_folder(out / name) for name in names}
    torch.set_num_threads(_THREADS)
    done = []
    with progress_bar() as progress:
        runs = 2 * SAMPLES if rules is None else len(RUNS) * SPARSE_SAMPLES
        task = progress.add_task("", total=runs * len(names))
        for name in names:
            tick = _ticker(progress, task, name)
            count = steps or PROFILE_STEPS[name]
            done.append(_run_model(name, count, seed, configs[name], rules, tick))
    _print_results(done)
    for name, result in zip(names, done, strict=True):
        files = ", ".join(write_results(folders[name], result.write))
        line = f"{folders[name]}: {files}"
        Console().print(line, soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class _Result:
    """What is told of one model.

    Attributes:
        four_runs: Of those that were also drawn sparsely.
        write: Writes its files into a folder.
    """

    summary: Summary
    four_runs: list[FourRuns]
    write: Callable[[Path], None]


def _run_model(
    name: str,
    steps: int,
    seed: int,
    config: DiCacheConfig,
    rules: SparseVideoGenConfig | None,
    tick: Callable[[str, int], None],
) -> _Result:
    """Draw with one model."""
    tick("loading", 0)
    trained = name if rules is None else LONG_MODELS[name]
    pipe = load_pipeline(trained)
    title = f"{type(pipe).__name__} on the trained demo model {trained!r}, {steps} steps"
    extra: dict[str, Any] = {}
    fours: list[FourRuns] = []
    if rules is None:
        samples = _draw_samples(pipe, _calls(trained, steps, seed, SAMPLES), config, tick)
    else:
        calls = _calls(trained, steps, seed, SPARSE_SAMPLES)
        fours = _draw_four_runs(pipe, calls, config, rules, tick)
        samples = [each.cached for each in fours]
        extra["sparse"] = sparse_to_dict(rules, fours)
    summary = summarize(trained, samples)

    def write(folder: Path) -> None:
        if fours:
            _write_sparse_files(folder, trained, title, fours)
        _write_files(folder, title, samples, summary, extra)

    return _Result(summary, fours, write)


def _print_results(results: list[_Result]) -> None:
    console = Console()
    console.print(comparison_table([result.summary for result in results]))
    console.print(_CAPTION, style="dim", highlight=False)
    sparse = {each.summary.name: each.four_runs for each in results if each.four_runs}
    for name, fours in sparse.items():
        console.print(sparse_table(name, fours))
    if sparse:
        notes = [f"{name}: {margin_text(fours)}" for name, fours in sparse.items()]
        text = "\n".join([NOTE, _SPARSE_CAPTION, *notes])
        console.print(text, style="dim", highlight=False)


def _config(name: str, options: Mapping[str, Any], sparse: bool) -> DiCacheConfig:
    """The rules of a model, with its profile where there is a target."""
    targets = [each for each in options if each.startswith("target_")]
    if targets and sparse:
        option = "--" + targets[0].replace("_", "-")
        raise InputError(f"{option} needs a profile, and the models of --sparse ship without one")
    profile = shipped_profile(name) if targets else None
    return make_config(**options, profile=profile)


def _models(model: str) -> tuple[str, ...]:
    if model == "all":
        return DEMO_MODELS
    if model not in DEMO_MODELS:
        known = ", ".join(("all", *DEMO_MODELS))
        raise InputError(f"unknown demo model {model!r}; expected one of {known}")
    return (model,)


def _sparse_models(model: str) -> tuple[str, ...]:
    names = _models(model)
    found = tuple(name for name in names if name in LONG_MODELS)
    if not found:
        raise InputError(
            f"--sparse is for videos and {model} draws images; expected --model "
            f"{' or '.join(LONG_MODELS)}, or all"
        )
    for name in names:
        if name not in found:
            note(f"--sparse is for videos, so {name} is left out")
    return found


def progress_bar() -> Progress:
    """On stderr, gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def _ticker(progress: Progress, task: Any, name: str) -> Callable[[str, int], None]:
    """Tells the progress bar what starts now, and how many more runs are over."""

    def tick(what: str, advance: int) -> None:
        progress.update(task, description=f"{name}: {what}", advance=advance)

    return tick


@dataclass(frozen=True)
class _Calls:
    """The calls of one model's pipeline.

    Attributes:
        decode: Turns a result into the pictures of its one sample.
        warm_up: Arguments of a short call.
        samples: Prompt, seed and arguments of the calls that count.
    """

    decode: Decode
    warm_up: Inputs
    samples: list[tuple[str, int, Inputs]]


def _calls(name: str, steps: int, seed: int, count: int) -> _Calls:
    """The model's first prompts, each with a seed of its own."""
    prompts = default_prompts(name)[:count]

    def inputs(prompt: str, own_seed: int, own_steps: int) -> Inputs:
        return lambda: pipeline_inputs(name, prompt, own_seed, own_steps)

    seeds = [seed + index for index in range(count)]
    samples = [
        (prompt, own, inputs(prompt, own, steps))
        for prompt, own in zip(prompts, seeds, strict=True)
    ]
    warm_up = inputs(prompts[0], seed, min(steps, _WARM_UP_STEPS))
    return _Calls(lambda output: decode(name, output)[0], warm_up, samples)


def _draw_samples(
    pipe: Any, calls: _Calls, config: DiCacheConfig, tick: Callable[[str, int], None]
) -> list[Sample]:
    """Draw every prompt in turn without and with the cache, so that both see the same load."""
    run_uncached(pipe, calls.warm_up, calls.decode)
    run_cached(pipe, calls.warm_up, calls.decode, _WARM_UP_RULES)
    samples = []
    for number, (prompt, seed, inputs) in enumerate(calls.samples, start=1):
        tick(f"prompt {number} without cache", 0)
        uncached = run_uncached(pipe, inputs, calls.decode)
        tick(f"prompt {number} with DiCache", 1)
        cached = run_cached(pipe, inputs, calls.decode, config)
        tick("", 1)
        samples.append(Sample(prompt, seed, cached, uncached))
    return samples


def _draw_four_runs(
    pipe: Any,
    calls: _Calls,
    config: DiCacheConfig,
    rules: SparseVideoGenConfig,
    tick: Callable[[str, int], None],
) -> list[FourRuns]:
    """Draw every prompt by all kinds of runs in turn."""
    tick("warm-up", 0)
    for _ in four_runs(pipe, calls.warm_up, calls.decode, rules, _WARM_UP_RULES):
        pass
    samples = []
    for number, (prompt, seed, inputs) in enumerate(calls.samples, start=1):
        runs = {}
        tick(f"prompt {number}, {RUNS[0]}", 0)
        for (kind, run), coming in zip(
            four_runs(pipe, inputs, calls.decode, rules, config), (*RUNS[1:], "done"), strict=True
        ):
            runs[kind] = run
            tick(f"prompt {number}, {coming}", 1)
        samples.append(FourRuns(prompt, seed, runs))
    return samples


def _write_sparse_files(folder: Path, name: str, title: str, samples: list[FourRuns]) -> None:
    four_runs_sheet(title, samples).save(folder / "sparse.png")
    save_animation(folder / "sparse.gif", four_runs_animation(title, samples))
    sparse_runs = [sample.runs["sparse"] for sample in samples]
    if temporal_shares(sparse_runs):  # a run of few steps may have dense ones only
        save_heads_plot(folder / "heads.png", f"Heads of {name}", sparse_runs)
    markdown = sparse_markdown(title, samples)
    (folder / "sparse.md").write_text(f"{markdown}\n{_SPARSE_CAPTION}\n", encoding="utf-8")


def _write_files(
    folder: Path, title: str, samples: list[Sample], summary: Summary, extra: dict[str, Any]
) -> None:
    comparison_sheet(title, samples).save(folder / "comparison.png")
    if samples[0].cached.pictures.ndim == 4:
        save_animation(folder / "animation.gif", comparison_animation(title, samples))
    first = samples[0]
    plot_title = f"{title}, seed {first.seed}: {first.prompt}"
    save_schedule_plot(folder / "schedule.png", plot_title, first.cached.plot_rows())
    data = {
        "model": summary.name,
        "versions": versions(),
        "summary": summary_to_dict(summary),
        "samples": [sample_to_dict(sample) for sample in samples],
        **extra,
    }
    write_json(folder / "stats.json", data)
