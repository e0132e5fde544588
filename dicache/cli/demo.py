"""`dicache demo`: the shipped models without and with DiCache, as a table, pictures and plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dicache import SparseVideoGenConfig
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
from dicache.demo.runner import Decode, Inputs, Sample, run_cached, run_uncached
from dicache.demo.schedule_plot import save_schedule_plot
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

from .errors import InputError, note
from .files import make_folder
from .info import versions
from .rules import make_sparse_config

DEFAULT_STEPS = {"flux": 30, "hunyuan-video": 50, "wan": 50}
SAMPLES = 4
SPARSE_MODELS = ("hunyuan-video", "wan")
# Videos of 8 frames of 25 tokens. The families' own densities are for 21 frames and more: here they
# leave a band of less than one frame (21 tokens), in which no head sees its frame. Half of the
# elements are two frames to either side, about what these densities give at full size.
SPARSE_DENSITY = 0.5
_SPARSE_BLOCK = 16  # blocks of 128 would leave two a row, none of which could be skipped
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
_SPARSE_CAPTION = (
    "Times are of one CPU thread and 200 tokens, where sparse attention costs more than it saves: "
    "it is for the long sequences of real models on a GPU."
)


def run_demo(
    model: str,
    steps: int | None,
    seed: int,
    out: Path,
    sparse: bool = False,
    density: float | None = None,
) -> None:
    """Run the demo of one model or of all, print its table, and write its files.

    Raises:
        InputError: There is no such model or density, the model cannot be sparse, or `out` cannot
            be written to.
    """
    rules = make_sparse_config(sparse, density, _SPARSE_BLOCK, SPARSE_DENSITY)
    names = _models(model) if rules is None else _sparse_models(model)
    folders = {name: make_folder(out / name) for name in names}
    summaries, tables, notes = [], [], []
    torch.set_num_threads(_THREADS)
    with _progress() as progress:
        task = progress.add_task("", total=(4 if sparse else 2) * SAMPLES * len(names))
        for name in names:
            count = steps or DEFAULT_STEPS[name]
            tick = _ticker(progress, task, name)
            tick("loading", 0)
            pipe = load_pipeline(name)
            title = f"{type(pipe).__name__} on the trained demo model {name!r}, {count} steps"
            extra: dict[str, Any] = {}
            if rules is None:
                samples = _draw_samples(name, pipe, count, seed, tick)
            else:
                fours = _draw_four_runs(name, pipe, count, seed, rules, tick)
                samples = [each.cached for each in fours]
                tables.append(sparse_table(name, fours))
                notes.append(f"{name}: {margin_text(fours)}")
                extra["sparse"] = sparse_to_dict(rules, fours)
                _write_sparse_files(folders[name], name, title, fours)
            summaries.append(summarize(name, samples))
            tick("writing files", 0)
            _write_files(folders[name], title, samples, summaries[-1], extra)
    console = Console()
    console.print(comparison_table(summaries))
    console.print(_CAPTION, style="dim", highlight=False)
    for table in tables:
        console.print(table)
    if tables:
        text = "\n".join([NOTE, _SPARSE_CAPTION, *notes])
        console.print(text, style="dim", highlight=False)
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


def _sparse_models(model: str) -> tuple[str, ...]:
    names = _models(model)
    found = tuple(name for name in names if name in SPARSE_MODELS)
    if not found:
        raise InputError(
            f"--sparse is for videos and {model} draws images; expected --model "
            f"{' or '.join(SPARSE_MODELS)}, or all"
        )
    for name in names:
        if name not in found:
            note(f"--sparse is for videos, so {name} is left out")
    return found


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
    decode_first, warm_up, calls = _calls(name, steps, seed)
    run_uncached(pipe, warm_up, decode_first)
    run_cached(pipe, warm_up, decode_first)
    samples = []
    for index, (prompt, inputs) in enumerate(calls):
        tick(f"prompt {index + 1} without cache", 0)
        uncached = run_uncached(pipe, inputs, decode_first)
        tick(f"prompt {index + 1} with DiCache", 1)
        cached = run_cached(pipe, inputs, decode_first)
        tick("", 1)
        samples.append(Sample(prompt, seed + index, cached, uncached))
    return samples


def _draw_four_runs(
    name: str,
    pipe: Any,
    steps: int,
    seed: int,
    rules: SparseVideoGenConfig,
    tick: Callable[[str, int], None],
) -> list[FourRuns]:
    """Draw the first prompts by all kinds of runs in turn."""
    decode_first, warm_up, calls = _calls(name, steps, seed)
    tick("warm-up", 0)
    for _ in four_runs(pipe, warm_up, decode_first, rules):
        pass
    samples = []
    for index, (prompt, inputs) in enumerate(calls):
        runs = {}
        tick(f"prompt {index + 1}, {RUNS[0]}", 0)
        for (kind, run), coming in zip(
            four_runs(pipe, inputs, decode_first, rules), (*RUNS[1:], "done"), strict=True
        ):
            runs[kind] = run
            tick(f"prompt {index + 1}, {coming}", 1)
        samples.append(FourRuns(prompt, seed + index, runs))
    return samples


def _calls(name: str, steps: int, seed: int) -> tuple[Decode, Inputs, list[tuple[str, Inputs]]]:
    """How to decode the first sample, the arguments of a warm-up, and those of every prompt."""
    prompts = default_prompts(name)[:SAMPLES]

    def inputs(prompt: str, own_seed: int, own_steps: int) -> Inputs:
        return lambda: pipeline_inputs(name, prompt, own_seed, own_steps)

    calls = [(prompt, inputs(prompt, seed + index, steps)) for index, prompt in enumerate(prompts)]
    warm_up = inputs(prompts[0], seed, min(steps, _WARM_UP_STEPS))
    return lambda output: decode(name, output)[0], warm_up, calls


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
    plot_title = f"{title}: {first.prompt}, seed {first.seed}"
    save_schedule_plot(folder / "schedule.png", plot_title, first.cached)
    data = {
        "model": summary.name,
        "versions": versions(),
        "summary": summary_to_dict(summary),
        "samples": [sample_to_dict(sample) for sample in samples],
        **extra,
    }
    write_json(folder / "stats.json", data)
