"""`dicache generate`: one prompt through any supported pipeline, with DiCache or more."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dicache import (
    DiCacheConfig,
    SparseVideoGenConfig,
    apply_dicache,
    apply_sparse_videogen,
    remove_dicache,
    remove_sparse_videogen,
)
from dicache.demo.heads_plot import save_heads_plot, temporal_shares
from dicache.demo.pictures import (
    comparison_animation,
    comparison_sheet,
    four_runs_animation,
    four_runs_sheet,
    save_animation,
    to_image,
)
from dicache.demo.report import (
    comparison_table,
    sample_to_dict,
    summarize,
    summary_to_dict,
    write_json,
)
from dicache.demo.runner import Inputs, Run, Sample, run_cached, run_sparse, run_uncached
from dicache.demo.sparse import (
    NOTE,
    RUNS,
    FourRuns,
    density,
    four_runs,
    margin_text,
    sparse_table,
    sparse_to_dict,
)
from dicache.schedule_plot import save_schedule_plot

from .errors import InputError, note, one_line
from .files import make_folder, write_results
from .info import devices, versions
from .rules import make_config, make_sparse_config

VIDEO_FPS = 16
NOT_FINITE = "the pipeline's output has NaN or infinite pixels"
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        arguments: Arguments of the pipeline's call that were given, by the pipeline's names.
        rules: Arguments of `rules.make_config`, each None, or missing, where not given.
        sparsity: `sparse` and `density`.
    """

    model: str
    prompt: str
    seed: int
    arguments: dict[str, Any]
    rules: dict[str, Any]
    sparsity: dict[str, Any]
    compare: bool = False
    dtype: str = "auto"
    device: str = "auto"
    out: Path = Path("dicache-output")


def run_generate(request: Request) -> None:
    """Draw, print what the cache did, and write the files.

    Raises:
        InputError: The request cannot be met: an unknown rule, device or option, a model that is
            no pipeline or is not supported, or too little memory for it.
    """
    config = make_config(**request.rules)
    sparse = make_sparse_config(**request.sparsity)
    device = find_device(request.device)
    dtype = find_dtype(request.dtype, device)
    folder = make_folder(request.out)
    pipe, arguments = load(request, dtype, config, sparse)
    with memory_errors(device):
        pipe.to(device)
        sample, four = _draw(pipe, request, arguments, config, sparse)
    name = type(pipe).__name__
    summary = summarize(name, [sample])
    console = Console()
    console.print(comparison_table([summary]))
    if four is not None:
        console.print(sparse_table(name, [four]))
        console.print(f"{NOTE} {margin_text([four])}", style="dim", highlight=False)
    elif sparse is not None:
        console.print(f"attention density {density(sample.cached):.3f}", highlight=False)
    data = {
        "model": request.model,
        "pipeline": name,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "arguments": request.arguments,
        "summary": summary_to_dict(summary),
        **sample_to_dict(sample),
    }
    sparse_run = None
    if sparse is not None:
        sparse_run = four.runs["sparse"] if four else sample.cached
        data["density"] = density(sample.cached)
        if four is not None:
            data["sparse"] = sparse_to_dict(sparse, [four])
        if not temporal_shares([sparse_run]):
            note("all steps were dense, so there is no map of the heads; use more --steps")
            sparse_run = None

    def write(folder: Path) -> None:
        _write_pictures(folder, name, sample, four)
        title = f"DiCache in {name}, seed {request.seed}: {request.prompt}"
        save_schedule_plot(folder / "schedule.png", title, sample.cached.plot_rows())
        if sparse_run is not None:
            save_heads_plot(folder / "heads.png", f"Heads of {name}", [sparse_run])
        write_json(folder / "stats.json", data)

    files = ", ".join(write_results(folder, write))
    console.print(f"{folder}: {files}", soft_wrap=True, highlight=False, markup=False)


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a CUDA GPU if there is one, else the CPU.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = devices()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not any(key in (name, f"{name}:0") for key in known):
        raise InputError(f"device {name!r} is not here; expected auto, {', '.join(known)}")
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        InputError: There is no such dtype.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}; expected one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_pipeline(model: str, dtype: torch.dtype) -> Any:
    """Load a pipeline from a folder or from the Hub.

    Raises:
        InputError: There is no pipeline, or it cannot be loaded.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    path = Path(model).expanduser()
    if path.is_file():
        raise InputError(f"--model {model} is a file; expected a pipeline's folder or Hub name")
    if not path.exists() and (path.is_absolute() or model.count("/") != 1 or model[0] in ".~"):
        raise InputError(f"--model {model} is neither a folder nor a Hub name (owner/name)")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise InputError(
            f"--model {model} holds no diffusers pipeline (there is no model_index.json in it)"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would tell on the way is in the exception, too
    try:
        return DiffusionPipeline.from_pretrained(path if path.is_dir() else model, dtype=dtype)
    except Exception as error:  # other people's files and network: whatever fails, fails on them
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"cannot load the pipeline {model!r}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def load(
    request: Request, dtype: torch.dtype, config: DiCacheConfig, sparse: SparseVideoGenConfig | None
) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the arguments of its call, once all that was asked for fits it.

    Raises:
        InputError: It cannot be loaded, is not supported, or does not take the arguments.
    """
    pipe = load_pipeline(request.model, dtype)
    _check_supported(pipe, config, sparse)
    return pipe, check_arguments(pipe, request)


def _check_supported(pipe: Any, config: DiCacheConfig, sparse: SparseVideoGenConfig | None) -> None:
    """Find out now, before an hour of un-cached work, whether all of it fits the pipeline."""
    try:
        apply_dicache(pipe, config)
        remove_dicache(pipe)
        if sparse is not None:
            apply_sparse_videogen(pipe, sparse)
            remove_sparse_videogen(pipe)
    except ValueError as error:
        raise InputError(one_line(error)) from error


def check_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """Arguments for the pipeline's call, all of which it takes.

    Raises:
        InputError: It lacks one that was given, or requires one that this command has not.
    """
    name = type(pipe).__name__
    parameters = inspect.signature(type(pipe).__call__).parameters
    for argument in request.arguments:
        if argument not in parameters:
            option = _option_name(argument)
            raise InputError(f"{name} has no {argument}, so {option} cannot be used with it")
    arguments = {"prompt": request.prompt, "output_type": "pt", **request.arguments}
    for argument, parameter in list(parameters.items())[1:]:
        named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if named and parameter.default is parameter.empty and argument not in arguments:
            raise InputError(
                f"{name} needs {argument!r}, which this command cannot give; use apply_dicache in "
                f"Python"
            )
    if "negative_prompt" in arguments and not arguments.get("true_cfg_scale"):
        default = parameters["true_cfg_scale"].default if "true_cfg_scale" in parameters else 2.0
        if isinstance(default, (int, float)) and default <= 1:
            note(f"{name} ignores --negative-prompt unless --true-cfg-scale is above 1")
    return {key: value for key, value in arguments.items() if key in parameters}


def _draw(
    pipe: Any,
    request: Request,
    arguments: dict[str, Any],
    config: DiCacheConfig,
    sparse: SparseVideoGenConfig | None,
) -> tuple[Sample, FourRuns | None]:
    """A run with what was asked for; to compare, a short warm-up before and the others, too."""

    def inputs(**changes: Any) -> dict[str, Any]:
        # On the CPU, a seed gives the same noise whatever the device.
        generator = torch.Generator().manual_seed(request.seed)
        return {**arguments, "generator": generator, **changes}

    prompt, seed = request.prompt, request.seed
    with refused_arguments():
        if request.compare:
            pipe.set_progress_bar_config(desc="warm-up")
            run_uncached(pipe, lambda: inputs(num_inference_steps=1), first_pictures)
        if request.compare and sparse is not None:
            runs = {}
            pipe.set_progress_bar_config(desc=RUNS[0])
            for (kind, run), coming in zip(
                four_runs(pipe, inputs, first_pictures, sparse, config),
                (*RUNS[1:], ""),
                strict=True,
            ):
                runs[kind] = run
                pipe.set_progress_bar_config(desc=coming)
            return Sample(prompt, seed, runs["both"], runs["dense"]), FourRuns(prompt, seed, runs)
        pipe.set_progress_bar_config(desc="with DiCache")
        cached = draw_cached(pipe, inputs, config, sparse)
        if not bool(cached.pictures.isfinite().all()):
            note(NOT_FINITE)
        if not request.compare:
            return Sample(prompt, seed, cached), None
        pipe.set_progress_bar_config(desc="without cache")
        uncached = run_uncached(pipe, inputs, first_pictures)
    return Sample(prompt, seed, cached, uncached), None


def draw_cached(
    pipe: Any, inputs: Inputs, config: DiCacheConfig, sparse: SparseVideoGenConfig | None
) -> Run:
    """One run of a pipeline with what was asked for, which is taken off again."""
    if sparse is None:
        return run_cached(pipe, inputs, first_pictures, config)
    return run_sparse(pipe, sparse, lambda: run_cached(pipe, inputs, first_pictures, config))


def first_pictures(output: Any) -> Tensor:
    """The first picture [3, H, W] or video [F, 3, H, W] of a pipeline's result."""
    for field in ("images", "frames"):
        batch = getattr(output, field, None)
        if isinstance(batch, Tensor):
            return batch[0].float().cpu()
    raise InputError(f"this pipeline returns a {type(output).__name__} without pictures or videos")


def _write_pictures(folder: Path, pipeline: str, sample: Sample, four: FourRuns | None) -> None:
    """Write picture or video of every run, and all side by side."""
    write_output(folder, "output", sample.cached.pictures)
    if sample.uncached is None:
        return
    write_output(folder, "uncached", sample.uncached.pictures)
    title = f"{pipeline}, seed {sample.seed}"
    if four is not None:
        for name in ("sparse", "DiCache"):
            write_output(folder, name.lower(), four.runs[name].pictures)
        sheet, frames = four_runs_sheet(title, [four]), four_runs_animation(title, [four])
    else:
        is_video = sample.cached.pictures.ndim == 4
        sheet = comparison_sheet(title, [sample])
        frames = comparison_animation(title, [sample]) if is_video else []
    sheet.save(folder / "comparison.png")
    if frames:
        save_animation(folder / "animation.gif", frames, round(1000 / VIDEO_FPS))


def write_output(folder: Path, stem: str, pictures: Tensor) -> str:
    """Write a picture as PNG, a video as MP4 or, without ffmpeg, GIF; returns the file's name."""
    if pictures.ndim == 3:
        to_image(pictures).save(folder / f"{stem}.png")
        return f"{stem}.png"
    frames = [to_image(frame) for frame in pictures]
    if not _has_ffmpeg():
        save_animation(folder / f"{stem}.gif", frames, round(1000 / VIDEO_FPS))
        return f"{stem}.gif"
    import imageio
    import numpy

    arrays = [numpy.asarray(frame) for frame in frames]
    options = {"fps": VIDEO_FPS, "quality": 8, "macro_block_size": 2}
    imageio.mimwrite(folder / f"{stem}.mp4", arrays, **options)
    return f"{stem}.mp4"


def _has_ffmpeg() -> bool:
    from importlib.util import find_spec

    return find_spec("imageio_ffmpeg") is not None


@contextmanager
def refused_arguments() -> Iterator[None]:
    """Turn what a pipeline's own check of its arguments says into an `InputError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.name == "check_inputs" for frame in frames):
            raise
        raise InputError(one_line(error)) from error


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn too little memory into an `InputError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"not enough memory on {device}; try a smaller --height, --width or --num-frames, or "
            f"--dtype bfloat16"
        ) from error


def _option_name(argument: str) -> str:
    return "--steps" if argument == "num_inference_steps" else "--" + argument.replace("_", "-")
