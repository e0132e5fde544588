"""Compare caches at equal cost: how close does the cached picture stay to the un-cached one?

    python benchmarks/quality.py                   the default against presets and other caches
    python benchmarks/quality.py --study rules     variants of the default's rules
    python benchmarks/quality.py --study guidance --model wan    one decision for both branches
    python benchmarks/quality.py --study memory    a cache in bf16 and in fp8

The shipped models run in their real pipelines, 30 steps for images and 50 for video, one sample at
a time. Quality is the PSNR of the cached against the un-cached decoded pictures in [0, 1], capped
at 100 dB and averaged over samples. Cost is what counters below every cache's hooks see: block
calls un-cached over cached, probes included, at the model's own depth and at its real sibling's
(a call that ran all blocks counts as the sibling's depth). Every method's threshold is searched and
swept around 2x and 3x; a cell of the table is linear in cost between the two points around it.
The seeds of `--study rules`, which chose the default, are not those of the comparison.

Writes quality.json, quality.md and quality.png (`quality_rules.*`) into `--out`; a model that is
not run again keeps its old section.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig

import dicache
from dicache import DiCacheConfig
from dicache.demo import pipelines, shapes
from dicache.driver.families import find_family

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = {"flux": 30, "hunyuan-video": 50, "wan": 50}
SIBLINGS = {"flux": ("FLUX.1", 57), "hunyuan-video": ("HunyuanVideo", 60), "wan": ("Wan 2.1", 30)}
PRESETS = {
    "flux": ("flux", "flux-delta-minus"),
    "hunyuan-video": ("hunyuan-video",),
    "wan": ("wan2.1",),
}
TARGETS = (2.0, 3.0)
SLACK = 1.06  # how far outside the targets the thresholds are searched
NUM_SCOUTS = 2  # samples that search for them
MAX_EXTENSIONS = 6
MAX_PSNR = 100.0
INTRODUCTION = """\
PSNR in dB of the cached against the un-cached pictures at equal cost: mean over the samples and,
in brackets, the worst one. Cost: block calls un-cached over cached, probes included, at the
model's own depth and at its real sibling's. Every method is tuned by its threshold (TaylorSeer by
its interval); "not reachable" names the highest cost it gets to.
"""


@dataclass(frozen=True)
class Method:
    """A cache with one free setting: a threshold that is searched, or one of `settings`."""

    name: str
    configure: Callable[[float], Any]
    settings: tuple[float, ...] = ()


@dataclass(frozen=True)
class Study:
    """A list of methods to compare, on seeds of its own."""

    title: str
    file: str
    methods: Callable[[str], list[Method]]
    first_seed: int
    num_seeds: int


@dataclass(frozen=True)
class Job:
    """One sample of one configuration, as it travels to a worker."""

    model: str
    steps: int
    seed: int
    config: Any = None  # None: un-cached
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """What a job gave: pictures in [0, 1] or their PSNR, and the blocks run in every call."""

    pictures: np.ndarray | None
    psnr: float
    blocks_per_call: list[int]


@dataclass(frozen=True)
class Point:
    """All samples of one method at one setting; costs at the own and at the sibling's depth."""

    setting: float
    psnr: list[float]
    cost: tuple[float, float]

    @property
    def mean(self) -> float:
        """Average PSNR in dB."""
        return sum(self.psnr) / len(self.psnr)


# --- Running one sample --------------------------------------------------------------------------


class BlockCounter:
    """Counts the blocks that run in every call of a transformer, below any cache's hooks."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        family = find_family(transformer)
        assert family is not None  # the shipped models are supported
        blocks = [block for block, _ in family.blocks(transformer)]
        self.num_blocks = len(blocks)
        self.per_call: list[int] = []
        transformer.register_forward_pre_hook(lambda *_: self.per_call.append(0))
        for block in blocks:
            block.forward = self._counted(block.forward)

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.per_call[-1] += 1
            return forward(*args, **kwargs)

        return counted


@functools.lru_cache(maxsize=1)
def load(model: str) -> tuple[Any, BlockCounter]:
    """The model's pipeline with a counter, once per worker; one thread."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    pipe = pipelines.load_pipeline(model)
    tell_position(pipe)
    return pipe, BlockCounter(pipe.transformer)


def tell_position(pipe: Any) -> None:
    """Let `cache_context` say step, sigma and number of steps, which SeaCache reads.

    Of the three pipelines only Wan's does so by itself.
    """
    plain, scheduler = pipe.transformer.cache_context, pipe.scheduler

    @contextmanager
    def cache_context(name: str, **given: Any) -> Iterator[None]:
        index = scheduler.step_index or 0
        sigma, steps = float(scheduler.sigmas[index]), len(scheduler.timesteps)
        position = {"step_index": index, "sigma": sigma, "num_inference_steps": steps}
        with plain(name, **position | given):
            yield

    pipe.transformer.cache_context = cache_context


def prompt_of(model: str, seed: int) -> str:
    """The prompt that belongs to a seed."""
    kind: shapes.Kind = "image" if model == "flux" else "video"
    return shapes.random_prompts(kind, 1, torch.Generator().manual_seed(seed))[0]


@contextmanager
def cached(pipe: Any, config: Any) -> Iterator[None]:
    """The pipeline with a cache on its transformer, or without one for `None`."""
    if config is None:
        yield
        return
    if isinstance(config, DiCacheConfig):
        dicache.apply_dicache(pipe, config)  # the pipeline knows the number of steps
    else:
        pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def run_sample(job: Job) -> Sample:
    """Generate one sample and compare it with its reference, if there is one."""
    pipe, counter = load(job.model)
    counter.per_call.clear()
    prompt = prompt_of(job.model, job.seed)
    with cached(pipe, job.config):
        output = pipe(**pipelines.pipeline_inputs(job.model, prompt, job.seed, job.steps))
    pictures = pipelines.decode(job.model, output).numpy()
    if job.reference is None:
        return Sample(pictures, MAX_PSNR, list(counter.per_call))
    return Sample(None, psnr(pictures, job.reference), list(counter.per_call))


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of pictures in [0, 1], at most `MAX_PSNR`."""
    error = float(np.mean((pictures.astype(np.float64) - reference) ** 2))
    return min(MAX_PSNR, -10 * math.log10(error)) if error > 0 else MAX_PSNR


# --- Methods -------------------------------------------------------------------------------------


def caches(model: str) -> list[Method]:
    """The default, every preset of the family, and the caches of diffusers."""
    presets = [
        Method(f"preset {name}", functools.partial(_preset, name)) for name in PRESETS[model]
    ]
    return [
        Method("DiCacheConfig()", functools.partial(_rules, {})),
        Method('the same, error="alignment"', functools.partial(_rules, {"error": "alignment"})),
        *presets,
        Method("FirstBlockCache", FirstBlockCacheConfig),
        Method("SeaCache", functools.partial(_sea_cache, model, 2)),
        Method("SeaCache, no limit of consecutive reuse", functools.partial(_sea_cache, model, 0)),
        Method("TaylorSeer lite, order 1", _taylor_seer, settings=(2, 3, 4, 5, 6)),
    ]


# Steps of 30 and of 50: a share R retains floor(30 R) and floor(50 R).
VARIANTS: dict[str, dict[str, Any]] = {
    "DiCacheConfig()": {},
    "retain 1 of 30, 2 of 50": {"retention_ratio": 0.05},
    "retain 5 of 30, 8 of 50": {"retention_ratio": 0.17},
    "last step may be reused": {"compute_last_step": False},
    "gamma 0 or more": {"gamma_range": (0.0, None)},
    "gamma 0 .. 3": {"gamma_range": (0.0, 3.0)},
    "gamma 1 .. 1.5": {"gamma_range": (1.0, 1.5)},
    "at most 4 reuses in a row": {"max_consecutive_reuse": 4},
    "probe of 2 blocks": {"probe_depth": 2},
    'error="alignment"': {"error": "alignment"},
    'error="delta_y", least squares': {"error": "delta_y"},
    'error="delta_y", l1': {"error": "delta_y", "alignment": "l1"},
    'error="delta_minus", l1': {"error": "delta_minus", "alignment": "l1"},
}


def rules(model: str) -> list[Method]:
    """The default and variants of its rules."""
    return [Method(name, functools.partial(_rules, fields)) for name, fields in VARIANTS.items()]


def guidance(model: str) -> list[Method]:
    """Both branches of guidance deciding for themselves, and the first one for both."""
    (preset,) = PRESETS[model]
    methods = []
    for cfg in ("independent", "shared"):
        methods.append(Method(f'cfg="{cfg}"', functools.partial(_rules, {"cfg": cfg})))
        published = functools.partial(DiCacheConfig.preset, preset, cfg=cfg)
        methods.append(Method(f'preset {preset}, cfg="{cfg}"', functools.partial(_at, published)))
    return methods


MEMORY: dict[str, dict[str, Any]] = {
    "as the model, fp32": {},
    "bf16": {"cache_dtype": torch.bfloat16},
    "fp8, a scale a token": {"cache_dtype": torch.float8_e4m3fn},
}


def memory(model: str) -> list[Method]:
    """The default with what it keeps in smaller dtypes."""
    return [Method(name, functools.partial(_rules, fields)) for name, fields in MEMORY.items()]


def _at(configure: Callable[..., DiCacheConfig], threshold: float) -> DiCacheConfig:
    return configure(threshold=threshold)


def _rules(fields: dict[str, Any], threshold: float) -> DiCacheConfig:
    return replace(DiCacheConfig(), **fields, threshold=threshold)


def _preset(name: str, threshold: float) -> DiCacheConfig:
    return DiCacheConfig.preset(name, threshold=threshold)


def _sea_cache(model: str, limit: int, threshold: float) -> SeaCacheConfig:
    callback = functools.partial(vision_latents, model)
    return SeaCacheConfig(
        threshold=threshold, max_consecutive_cached=limit, raw_vision_callback=callback
    )


def _taylor_seer(interval: float) -> TaylorSeerCacheConfig:
    # Its default stores the factors in bf16; the models run in fp32.
    return TaylorSeerCacheConfig(
        cache_interval=int(interval), use_lite_mode=True, taylor_factors_dtype=torch.float32
    )


def vision_latents(
    model: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """The latents [C, T, H, W] that SeaCache filters, from a transformer's arguments."""
    latents = kwargs["hidden_states"]
    if model != "flux":
        return list(latents)
    side = math.isqrt(latents.shape[1])
    grid = latents.unflatten(1, (side, side)).unflatten(-1, (-1, 2, 2))  # [B, h, w, C, 2, 2]
    return list(grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).unsqueeze(2))


STUDIES = {
    "caches": Study("Quality at equal cost", "quality", caches, 2000, 16),
    "rules": Study("Variants of the default's rules", "quality_rules", rules, 100, 8),
    "guidance": Study("One decision for both branches", "quality_guidance", guidance, 300, 12),
    "memory": Study("A cache in smaller dtypes", "quality_memory", memory, 400, 8),
}


# --- Sweeping ------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One model's samples, and a way to run them all with any configuration."""

    model: str
    steps: int
    seeds: Sequence[int]
    run: Callable[[Callable[[Job], Sample], list[Job]], Iterator[Sample]]
    num_points: int
    references: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        jobs = [Job(self.model, self.steps, seed) for seed in self.seeds]
        self.references = list(self.run(run_sample, jobs))

    @property
    def depths(self) -> tuple[int, int]:
        """Blocks of the model and of its real sibling."""
        return self.references[0].blocks_per_call[0], SIBLINGS[self.model][1]

    def measure(self, setting: float, config: Any, num_samples: int | None = None) -> Point:
        """All samples, or the first `num_samples`, with one configuration."""
        jobs = [
            Job(self.model, self.steps, seed, config, reference.pictures)
            for seed, reference in zip(self.seeds, self.references, strict=True)
        ]
        samples = list(self.run(run_sample, jobs[:num_samples]))
        calls = [count for sample in samples for count in sample.blocks_per_call]
        own, sibling = (cost_of(calls, self.depths[0], depth) for depth in self.depths)
        return Point(setting, [sample.psnr for sample in samples], (own, sibling))

    def sweep(self, method: Method) -> list[Point]:
        """Points around both targets at both depths."""
        if method.settings:
            return [self.measure(value, method.configure(value)) for value in method.settings]

        def point(threshold: float) -> Point:
            threshold = float(f"{threshold:.3g}")
            return self.measure(threshold, method.configure(threshold))

        low, high = self.search(method)
        points = [point(threshold) for threshold in np.geomspace(low, high, self.num_points)]
        # The scouts are few: where all samples fall short of a target, go on outwards.
        for _ in range(MAX_EXTENSIONS):
            if points[0].cost[1] > TARGETS[0]:
                points.insert(0, point(points[0].setting / 1.3))
        for _ in range(MAX_EXTENSIONS):
            saturated = len(points) > 1 and points[-1].cost[0] < 1.01 * points[-2].cost[0]
            if points[-1].cost[0] < TARGETS[-1] and not saturated:
                points.append(point(points[-1].setting * 1.3))
        return points

    def search(self, method: Method) -> tuple[float, float]:
        """Thresholds a little outside both targets, found on the first samples."""

        @functools.cache
        def cost(threshold: float) -> tuple[float, float]:
            return self.measure(threshold, method.configure(threshold), NUM_SCOUTS).cost

        most = cost(1e4)[0]  # everything that may be reused is reused
        low = bisect(lambda value: cost(value)[1], TARGETS[0] / SLACK)
        high = bisect(lambda value: cost(value)[0], min(SLACK * TARGETS[-1], 0.99 * most))
        return low, max(low, high)


def bisect(cost: Callable[[float], float], target: float) -> float:
    """A threshold whose cost, which rises with it, is the target or nearly so."""
    low, high = -4.0, 2.0  # powers of ten
    for _ in range(8):
        middle = (low + high) / 2
        reached = cost(10.0**middle)
        if abs(reached - target) < 0.03 * target:
            return 10.0**middle
        low, high = (middle, high) if reached < target else (low, middle)
    return 10.0**high


def cost_of(calls: list[int], num_blocks: int, depth: int) -> float:
    """Block calls un-cached over cached, if the model had `depth` instead of `num_blocks` blocks.

    A call that ran all blocks would run them there too; one that skipped ran its probe alone.
    """
    spent = sum(depth if count == num_blocks else count for count in calls)
    return len(calls) * depth / max(spent, 1)


def at_cost(points: list[Point], depth: int, target: float) -> tuple[float, float] | None:
    """Mean and worst PSNR at a cost (depth 0: own, 1: sibling's), or `None` where no point is.

    Linear in cost between the two points around it.
    """
    curve = sorted((point.cost[depth], point.mean, min(point.psnr)) for point in points)
    for left, right in pairwise(curve):
        if left[0] <= target <= right[0]:
            weight = (target - left[0]) / max(right[0] - left[0], 1e-9)
            mean, worst = (a + weight * (b - a) for a, b in zip(left[1:], right[1:], strict=True))
            return mean, worst
    return None


# --- Results -------------------------------------------------------------------------------------


def study_model(bench: Bench, methods: list[Method]) -> dict[str, Any]:
    """Sweep every method, and run the default with the model's own threshold; ready for JSON."""
    curves = {}
    for method in methods:
        start = time.perf_counter()
        curves[method.name] = [asdict(point) for point in bench.sweep(method)]
        print(f"{bench.model}: {method.name}, {time.perf_counter() - start:.0f} s", flush=True)
    own = pipelines.demo_model(bench.model).transformer.load_config(
        pipelines.MODEL_DIR / bench.model
    )
    shipped = bench.measure(own.get("_dicache_threshold", math.nan), DiCacheConfig())
    return {"depths": bench.depths, "curves": curves, "shipped": asdict(shipped)}


def environment(command: str) -> dict[str, Any]:
    """Where the numbers come from."""
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "revision": revision,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "dicache": dicache.__version__,
        },
    }


def points_of(result: dict[str, Any]) -> dict[str, list[Point]]:
    """The curves of a model's stored result."""
    return {name: [Point(**point) for point in points] for name, points in result["curves"].items()}


def write_table(title: str, results: dict[str, Any], path: Path) -> None:
    """One section a model."""
    sections = [section(model, result) for model, result in results.items()]
    path.write_text(f"# {title}\n\n{INTRODUCTION}\n" + "\n".join(sections))


def section(model: str, result: dict[str, Any]) -> str:
    """A model's table, its shipped threshold, and how to reproduce both."""
    sibling, (own, deep) = SIBLINGS[model][0], result["depths"]
    columns = [(d, target) for d in (0, 1) for target in TARGETS]
    depths = (f"{own} blocks", f"{deep} blocks ({sibling})")
    lines = [
        f"## {model}",
        "",
        "| method | " + " | ".join(f"{t:.0f}x at {depths[d]}" for d, t in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    curves = points_of(result)
    best = {c: max(at_cost(p, *c) or (0.0, 0.0) for p in curves.values()) for c in columns}
    for name, points in curves.items():
        cells = [cell(points, column, best[column]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    shipped, context = Point(**result["shipped"]), result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"Threshold {shipped.setting:g} as shipped: {shipped.cost[0]:.2f}x at {depths[0]}, "
            f"{shipped.cost[1]:.2f}x at {depths[1]}: {shipped.mean:.1f} dB, worst sample "
            f"{min(shipped.psnr):.1f} dB.",
            "",
            f"`{context['command']}`: {result['steps']} steps, {len(shipped.psnr)} samples (seeds "
            f"from {result['first_seed']}), {context['machine']}, {versions}, revision "
            f"{context['revision']}, {context['date']}, {result['minutes']:.0f} minutes.",
            "",
        ]
    )


def cell(points: list[Point], column: tuple[int, float], best: tuple[float, float]) -> str:
    """Mean and worst PSNR of one method at one cost; the best mean is bold."""
    found = at_cost(points, *column)
    if found is None:
        reached = max(point.cost[column[0]] for point in points)
        return f"not reachable ({reached:.2f}x)" if reached < column[1] else "not measured"
    mean = f"**{found[0]:.1f}**" if found == best else f"{found[0]:.1f}"
    return f"{mean} ({found[1]:.1f})"


def write_plot(results: dict[str, Any], path: Path) -> None:
    """PSNR over cost: a column a model, a row a depth."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(
        2, len(results), figsize=(5 * len(results), 8), squeeze=False, layout="constrained"
    )
    names = dict.fromkeys(name for result in results.values() for name in result["curves"])
    colors = {name: matplotlib.colormaps["tab20"](index) for index, name in enumerate(names)}
    lines = {}
    for column, (model, result) in enumerate(results.items()):
        for depth, row in enumerate(axes):
            axis = row[column]
            for name, points in points_of(result).items():
                curve = sorted((point.cost[depth], point.mean) for point in points)
                x, y = zip(*curve, strict=True)
                (lines[name],) = axis.plot(x, y, color=colors[name], marker="o", markersize=3)
            for target in TARGETS:
                axis.axvline(target, color="0.7", linestyle=":")
            axis.set_title(f"{model}, cost at {result['depths'][depth]} blocks")
            axis.set_xlabel("block calls un-cached / cached")
            axis.set_ylabel("PSNR against un-cached, dB")
            axis.set_xlim(1.5, 4.0)
            axis.grid(alpha=0.3)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


@contextmanager
def workers(count: int) -> Iterator[Callable[..., Any]]:
    """A `map` over worker processes, or the plain one for a single job."""
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        yield pool.map


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=pipelines.DEMO_MODELS)
    parser.add_argument("--study", default="caches", choices=STUDIES)
    parser.add_argument("--seeds", type=int, help="number of samples")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 30, video 50)")
    parser.add_argument("--points", type=int, default=4, help="settings of every threshold")
    parser.add_argument("--only", nargs="+", help="methods whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study for every model and write its files."""
    args = parse(arguments)
    study = STUDIES[args.study]
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / f"{study.file}.json"
    given = sys.argv[1:] if arguments is None else arguments
    seeds = range(study.first_seed, study.first_seed + (args.seeds or study.num_seeds))
    with workers(args.jobs) as run:
        for model in args.model or pipelines.DEMO_MODELS:
            start = time.perf_counter()
            bench = Bench(model, args.steps or STEPS[model], seeds, run, args.points)
            methods = [m for m in study.methods(model) if wanted(m.name, args.only)]
            result = study_model(bench, methods) | {
                "environment": environment(" ".join(["python benchmarks/quality.py", *given])),
                "steps": bench.steps,
                "first_seed": seeds[0],
                "minutes": (time.perf_counter() - start) / 60,
            }
            # Read now, not earlier: another run may have added its model meanwhile.
            results = json.loads(stored.read_text()) if stored.exists() else {}
            results[model] = result
            results = {name: results[name] for name in pipelines.DEMO_MODELS if name in results}
            stored.write_text(json.dumps(results, indent=1) + "\n")
            write_table(study.title, results, stored.with_suffix(".md"))
            write_plot(results, stored.with_suffix(".png"))


def wanted(name: str, parts: list[str] | None) -> bool:
    """Whether `--only` leaves the method in."""
    return parts is None or any(part.lower() in name.lower() for part in parts)


if __name__ == "__main__":
    main()
