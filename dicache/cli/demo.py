"""`dicache demo`: the shipped models without and with DiCache, as a table, pictures and plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dicache.demo.pictures import comparison_animation, comparison_sheet, save_animation
from dicache.demo.pipelines import (
    DEMO_MODELS,
    decode,
    default_prompts,
    load_pipeline,
    pipeline_inputs,
)
from dicache.demo.report import (
    Summary,
    comparison_table,
    sample_to_dict,
    summarize,
    summary_to_dict,
    write_json,
)
from dicache.demo.runner import Sample, run_cached, run_uncached
from dicache.demo.schedule_plot import save_schedule_plot

from .errors import InputError
from .files import make_folder
from .info import versions

DEFAULT_STEPS = {"flux": 30, "hunyuan-video": 50, "wan": 50}
SAMPLES = 4
_WARM_UP_STEPS = 6  # enough for every kind of step: computed, resumed, reused
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


def run_demo(model: str, steps: int | None, seed: int, out: Path) -> None:
    """Run the demo of one model or of all, print its table, and write its files.

    Raises:
        InputError: There is no such model, or `out` cannot be written to.
    """
    names = _models(model)
    folders = {name: make_folder(out / name) for name in names}
    summaries = []
    torch.set_num_threads(_THREADS)
    with _progress() as progress:
        task = progress.add_task("", total=2 * SAMPLES * len(names))
        for name in names:
            count = steps or DEFAULT_STEPS[name]
            tick = _ticker(progress, task, name)
            tick("loading", 0)
            pipe = load_pipeline(name)
            samples = _draw_samples(name, pipe, count, seed, tick)
            summaries.append(summarize(name, samples))
            tick("writing files", 0)
            title = f"{type(pipe).__name__} on the trained demo model {name!r}, {count} steps"
            _write_files(folders[name], title, samples, summaries[-1])
    console = Console()
    console.print(comparison_table(summaries))
    console.print(_CAPTION, style="dim", highlight=False)
    for name in names:
        found = ", ".join(sorted(path.name for path in folders[name].iterdir()))
        console.print(f"{folders[name]}: {found}", soft_wrap=True, highlight=False, markup=False)


def _models(model: str) -> tuple[str, ...]:
    if model == "all":
        return DEMO_MODELS
    if model not in DEMO_MODELS:
        known = ", ".join(("all", *DEMO_MODELS))
        raise InputError(f"unknown demo model {model!r}; expected one of {known}")
    return (model,)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def _ticker(progress: Progress, task: Any, name: str) -> Callable[[str, int], None]:
    """Tells the progress bar what starts now, and how many more runs are over."""

    def tick(what: str, advance: int) -> None:
        progress.update(task, description=f"{name}: {what}", advance=advance)

    return tick


def _draw_samples(
    name: str, pipe: Any, steps: int, seed: int, tick: Callable[[str, int], None]
) -> list[Sample]:
    """Draw the first prompts in turn without and with the cache, so that both see the same load."""
    prompts = default_prompts(name)[:SAMPLES]

    def to_pictures(output: Any) -> Any:
        return decode(name, output)[0]

    def warm_up_inputs() -> dict[str, Any]:
        return pipeline_inputs(name, prompts[0], seed, min(steps, _WARM_UP_STEPS))

    run_uncached(pipe, warm_up_inputs, to_pictures)
    run_cached(pipe, warm_up_inputs, to_pictures)
    samples = []
    for index, prompt in enumerate(prompts):

        def inputs(prompt: str = prompt, own_seed: int = seed + index) -> dict[str, Any]:
            return pipeline_inputs(name, prompt, own_seed, steps)

        tick(f"prompt {index + 1} without cache", 0)
        uncached = run_uncached(pipe, inputs, to_pictures)
        tick(f"prompt {index + 1} with DiCache", 1)
        cached = run_cached(pipe, inputs, to_pictures)
        tick("", 1)
        samples.append(Sample(prompt, seed + index, cached, uncached))
    return samples


def _write_files(folder: Path, title: str, samples: list[Sample], summary: Summary) -> None:
    comparison_sheet(title, samples).save(folder / "comparison.png")
    if samples[0].cached.pictures.ndim == 4:
        save_animation(folder / "animation.gif", comparison_animation(title, samples))
    first = samples[0]
    plot_title = f"{title}: {first.prompt}, seed {first.seed}"
    save_schedule_plot(folder / "schedule.png", plot_title, first.cached)
    data = {
        "model": summary.name,
        "versions": versions(),
        "summary": summary_to_dict(summary),
        "samples": [sample_to_dict(sample) for sample in samples],
    }
    write_json(folder / "stats.json", data)
