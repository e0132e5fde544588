"""Generate for a long time, with everything drawn at random, and check every run.

    python benchmarks/soak.py --runs 200 --seed 0          the shipped trained models
    python benchmarks/soak.py --runs 200 --seed 0 --tiny   models of random weights, much quicker

Model, size, steps, batch, seed, rules and the end of the run (as it should, stopped early by a
callback, or by an exception in a block, the scheduler or a callback) are drawn from `--seed` and
the number of the run. One pipeline a model serves all runs. After each of them

- every step of a run without an exception is in its statistics;
- the latents of the last finished step equal those of a fresh pipeline that is told the same
  decisions (`DiCacheConfig(schedule=...)`) and ends in the same way: nothing of an earlier run
  shows. Where every sample decides for itself, which no schedule can tell, the fresh pipeline
  decides by the same rules;
- no more tensors are alive than after the model's first run. Counted are storages, without those
  that diffusers' pipeline and scheduler keep of their last call. While a run that an exception
  ended holds its state, which the next run of its pipeline or `reset_dicache` frees, nothing is
  compared.

At the end the process may not have grown: the medians of its memory over the second and the last
quarter of the runs are compared. Ends with exit code 1 at the first violation, and with the command
that repeats it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dicache import (
    DiCacheConfig,
    DiCacheWarning,
    RunStats,
    apply_dicache,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from dicache.adapters.diffusers.attach import sessions
from dicache.core import sample
from dicache.core.rules import resolve
from dicache.demo import pipelines as demo
from dicache.driver.families import find_family

TOLERANCE = 1e-5  # relative to the largest latent
GROWTH = 48 * 2**20  # bytes that the memory of a process moves without a leak
FEWEST_RUNS = 40  # that say something about memory
LETTERS = {"compute": "C", "resume": "C", "reuse": "R"}
KEPT: dict[str, dict[str, Any]] = {
    "": {},
    " in host memory": {"cache_device": "cpu"},
    " in bf16": {"cache_dtype": torch.bfloat16},
    " in fp8 in host memory": {"cache_dtype": torch.float8_e4m3fn, "cache_device": "cpu"},
}
ENDS = ("whole", "whole", "whole", "stop", "block", "scheduler", "callback")


class PlannedError(Exception):
    """The exception that aborts a run on purpose."""


class ViolationError(Exception):
    """A check that failed."""


@dataclass(frozen=True)
class Plan:
    """One run, as it was drawn.

    Attributes:
        arguments: What the pipeline is called with, beside the callback.
        config: The rules; `None` keeps the cache of the run before.
        end: How the run ends; see `ENDS`.
        at: The step, or the call of the transformer, in which it does.
        block: Share of the blocks before the one that raises, for "block".
        resets: Whether `reset_dicache` follows an exception.
    """

    model: str
    arguments: dict[str, Any]
    config: DiCacheConfig | None
    end: str
    at: int
    block: float
    resets: bool
    title: str


@dataclass
class Outcome:
    """What is left of a run: latents of its last finished step, and how far it came."""

    latents: Tensor | None = None
    steps: int = 0
    calls: int = 0
    raised: bool = False


@dataclass
class Models:
    """Where pipelines and the arguments of a call come from."""

    names: tuple[str, ...]
    load: Callable[[str], Any]
    wrap: Callable[[str, nn.Module], Any]
    arguments: Callable[[str, random.Random], dict[str, Any]]
    most_steps: int


@dataclass
class Soak:
    """The pipelines of all runs, and what was seen of them.

    Attributes:
        plain: Un-cached transformers, to make fresh pipelines of.
        tensors: Storages alive after a model's first run that was checked.
        memory: Resident bytes after each run.
        held: Models whose last run was ended by an exception, and not reset.
        largest: Largest deviation so far.
        counts: Steps by action.
    """

    models: Models
    seed: int
    pipes: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    largest: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.models.names:
            pipe = self.pipes[name] = self.models.load(name)
            self.plain[name] = copy.deepcopy(pipe.transformer)
            apply_dicache(pipe)
            first = draw(self.models, self.seed, -1, name)  # fills what is filled once
            generate(pipe, replace(first, end="whole"))

    def run(self, number: int) -> str:
        """Run and check; returns the line to print.

        Raises:
            ViolationError: A check failed.
        """
        line, model = self.generate_and_check(draw(self.models, self.seed, number))
        tensors = "-" if self.held else self.check_tensors(model)  # what ran has gone by now
        self.memory.append(psutil.Process().memory_info().rss)
        return f"{number:4d}  {line}, tensors {tensors}, {self.memory[-1] / 2**20:.0f} MiB"

    def generate_and_check(self, plan: Plan) -> tuple[str, str]:
        """Run and compare; returns what to print, and the model's name."""
        pipe = self.pipes[plan.model]
        put_on_cache(pipe, plan.config)
        outcome = generate(pipe, plan)
        stats = get_stats(pipe)["transformer"]
        deviation = self.check(plan, pipe, stats, outcome)
        self.largest = max(self.largest, deviation)
        self.count(stats)
        self.held.discard(plan.model)
        if outcome.raised and plan.resets:
            reset_dicache(pipe)
        elif outcome.raised:
            self.held.add(plan.model)
        ended = "raised" if outcome.raised else "ended"
        schedule = " ".join(masks(stats).values())
        line = f"{plan.title}, {ended} after {outcome.steps}: {schedule}, off by {deviation:.0e}"
        return line, plan.model

    def check(self, plan: Plan, pipe: Any, stats: RunStats, outcome: Outcome) -> float:
        """Statistics and result; returns the deviation from the reference."""
        recorded = sum(len({each.step for each in steps}) for steps in stats.contexts.values())
        if not outcome.raised and recorded != outcome.calls:
            raise ViolationError(f"{outcome.calls} calls, and {recorded} of them in the statistics")
        config = sessions(pipe)["transformer"].config
        fresh = self.models.wrap(plan.model, copy.deepcopy(self.plain[plan.model]))
        if config.granularity == "batch":
            told = with_schedules(fresh, config, masks(stats))
        else:
            told = fresh
            apply_dicache(told, config)
        expected = generate(told, plan)
        if (outcome.steps, outcome.raised) != (expected.steps, expected.raised):
            raise ViolationError(
                f"the run {'raised' if outcome.raised else 'ended'} after {outcome.steps} steps, "
                f"the reference after {expected.steps}"
            )
        if masks(stats) != masks(get_stats(told)["transformer"]):
            raise ViolationError(f"the reference did not follow the schedule {masks(stats)}")
        if outcome.latents is None or expected.latents is None:
            return 0.0
        deviation = relative_deviation(outcome.latents, expected.latents)
        if not deviation <= TOLERANCE:
            raise ViolationError(f"the result deviates by {deviation:.1e} from a fresh pipeline's")
        return deviation

    def check_tensors(self, model: str) -> int:
        """The number of tensors alive, which may not have grown."""
        count = live_storages(list(self.pipes.values()))
        first = self.tensors.setdefault(model, count)
        if count > first:
            raise ViolationError(f"{count} tensors are alive, {first} were after the first run")
        return count

    def count(self, stats: RunStats) -> None:
        for action in ("computed", "resumed", "reused"):
            number = getattr(stats, f"num_{action}")
            self.counts[action] = self.counts.get(action, 0) + number


def judge_memory(memory: list[int]) -> str:
    """Compare the memory of early and late runs, in bytes; returns what to print.

    Raises:
        ViolationError: The process grew.
    """
    quarter = len(memory) // 4
    if len(memory) < FEWEST_RUNS:
        return f"{memory[-1] / 2**20:.0f} MiB, of too few runs to judge"
    early, late = memory[quarter : 2 * quarter], memory[-quarter:]
    grown = statistics.median(late) - statistics.median(early)
    text = (
        f"{statistics.median(early) / 2**20:.0f} MiB in the second quarter of the runs, "
        f"{statistics.median(late) / 2**20:.0f} MiB in the last"
    )
    if grown > GROWTH:
        raise ViolationError(f"the process grew: {text}")
    return text


def draw(models: Models, seed: int, number: int, model: str | None = None) -> Plan:
    """The plan of a run, of one model or a random one; it depends on the arguments alone."""
    dice = random.Random(f"{seed}/{number}")
    name = model or dice.choice(models.names)
    # A few numbers only: runs of equal length are the ones that are hard to tell apart.
    steps = dice.choice([n for n in (1, 2, 3, 5, 8, 12, 24) if n <= models.most_steps])
    arguments = models.arguments(name, dice)
    arguments |= {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    config, rules = draw_config(name, dice)
    keeps = dice.random() < 0.4
    end = dice.choice(ENDS)
    at = dice.randrange(steps)
    size = "x".join(
        str(arguments[key]) for key in ("width", "height", "num_frames") if key in arguments
    )
    batch = len(arguments["prompt_embeds"])
    title = (
        f"{name}, {size}, batch {batch}, {steps} steps, {'same rules' if keeps else rules}, {end}"
    )
    return Plan(
        model=name,
        arguments=arguments,
        config=None if keeps else config,
        end=end,
        at=at,
        block=dice.random(),
        resets=dice.random() < 0.7,
        title=title,
    )


def draw_config(name: str, dice: random.Random) -> tuple[DiCacheConfig, str]:
    """Rules and their name: the default or a published preset, and how their tensors are kept."""
    config, title = draw_rules(name, dice)
    (kept,) = dice.choices(list(KEPT), weights=(3, 1, 1, 1))
    return replace(config, **KEPT[kept]), title + kept


def draw_rules(name: str, dice: random.Random) -> tuple[DiCacheConfig, str]:
    """Rules with a random threshold."""
    threshold = 10 ** dice.uniform(-2.5, 0.3)
    kind = dice.choice(("default", "preset", "greedy"))
    if kind == "preset":
        preset = {"flux": ("flux", "flux-delta-minus"), "wan": ("wan2.1",)}.get(name, (name,))
        chosen = dice.choice(preset)
        return DiCacheConfig.preset(chosen, threshold=threshold), f"{chosen} {threshold:.2g}"
    if kind == "greedy":
        limit = dice.choice((None, 1, 3))
        config = DiCacheConfig(threshold=math.inf, max_consecutive_reuse=limit)
        return config, f"at most {limit} reused in a row"
    depth, cfg = dice.choice((1, 2)), dice.choice(("shared", "independent"))
    unit = dice.choice(("batch", "sample"))
    config = DiCacheConfig(threshold=threshold, probe_depth=depth, cfg=cfg, granularity=unit)
    return config, f"default {threshold:.2g} {cfg} a {unit}"


def put_on_cache(pipe: Any, config: DiCacheConfig | None) -> None:
    """Apply these rules; without any, keep the cache that is there."""
    if config is not None:
        remove_dicache(pipe)
        apply_dicache(pipe, config)


def generate(pipe: Any, plan: Plan) -> Outcome:
    """Call the pipeline as planned."""
    outcome = Outcome()

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        outcome.latents, outcome.steps = values["latents"].clone(), index + 1
        if plan.end == "callback" and index == plan.at:
            raise PlannedError
        pipe._interrupt = plan.end == "stop" and index == plan.at
        return {}

    def count(*_: Any) -> None:
        outcome.calls += 1

    counting = pipe.transformer.register_forward_pre_hook(count)
    arguments = {**plan.arguments, "generator": torch.Generator().manual_seed(plan.at)}
    try:
        with prepared_end(pipe, plan, outcome), warnings.catch_warnings():
            warnings.simplefilter("ignore", DiCacheWarning)  # of schedules shorter than the run
            pipe(**arguments, callback_on_step_end=callback)
    except PlannedError:
        outcome.raised = True
    finally:
        counting.remove()
    return outcome


@contextmanager
def prepared_end(pipe: Any, plan: Plan, outcome: Outcome) -> Iterator[None]:
    """Let a block or the scheduler raise when the plan says so.

    A block that is skipped then raises in the first call afterwards that computes it, if any.
    """
    with ExitStack() as undo:
        if plan.end == "block":
            family = find_family(pipe.transformer)
            assert family is not None
            blocks = [block for block, _ in family.blocks(pipe.transformer)]

            def stop(*_: Any) -> None:
                if outcome.calls > plan.at:
                    raise PlannedError

            raising = blocks[int(plan.block * len(blocks))]
            undo.callback(raising.register_forward_pre_hook(stop).remove)
        elif plan.end == "scheduler":
            steps, real = itertools.count(), pipe.scheduler.step

            def step(*args: Any, **kwargs: Any) -> Any:
                if next(steps) == plan.at:
                    raise PlannedError
                return real(*args, **kwargs)

            pipe.scheduler.step = step
            undo.callback(delattr, pipe.scheduler, "step")
        yield


def with_schedules(pipe: Any, config: DiCacheConfig, masks: dict[str, str]) -> Any:
    """Cache a pipeline with the same rules, but a given schedule for each context.

    A configuration has one schedule for all contexts, so the session gets each one's beside it.
    """
    config = replace(config, schedule="C", cfg="independent")
    apply_dicache(pipe, config)
    session = sessions(pipe)["transformer"]
    for name, schedule in masks.items():
        session.rules_of[name] = resolve(replace(config, schedule=schedule))
    return pipe


def masks(stats: RunStats) -> dict[str, str]:
    """What was computed and reused, by context and, where it has its own schedule, sample."""
    found: dict[str, str] = {}
    for name, steps in stats.contexts.items():
        for step in steps:
            key = name if step.sample is None else f"{name}[{step.sample}]"
            found[key] = found.get(key, "") + LETTERS[step.action]
    return found


def relative_deviation(latents: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where only one is not finite."""
    if torch.equal(latents, expected):
        return 0.0
    deviation = float((latents - expected).abs().max() / expected.abs().max())
    return deviation if math.isfinite(deviation) else math.inf


def live_storages(pipes: list[Any]) -> int:
    """Allocations that hold tensors, without those that pipelines and schedulers keep."""
    sample.places.cache_clear()  # one small tensor a size, kept for all models
    gc.collect()
    # Exact types: torch.compile leaves fake ones behind, which have no memory.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    kept = [tensors_of(vars(pipe), vars(pipe.scheduler)) for pipe in pipes]
    return len(storages(tensors) - storages(itertools.chain(*kept)))


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Addresses of the memory that these tensors lie in."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def tensors_of(*values: Any) -> Iterator[Tensor]:
    """The tensors in nested dictionaries, lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_of(*value.values())
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(*value)


def trained_models() -> Models:
    """The models that ship with the package, also at sizes that they were not trained for."""

    def arguments(name: str, dice: random.Random) -> dict[str, Any]:
        prompts = dice.sample(demo.default_prompts(name), dice.choice((1, 1, 2)))
        inputs = demo.pipeline_inputs(name, prompts, dice.randrange(1000), 1)
        if dice.random() < 0.5:  # else the size that it was trained for, with its own noise
            del inputs["latents"]
            inputs["height"], inputs["width"] = (dice.choice((64, 96, 128)) for _ in range(2))
            if "num_frames" in inputs:
                inputs["num_frames"] = dice.choice((1, 5, 9))
        if name == "wan" and dice.random() < 0.3:
            inputs["guidance_scale"] = 1.0
        return inputs

    load = demo.load_pipeline
    return Models(demo.DEMO_MODELS, load, demo.wrap_transformer, arguments, most_steps=24)


def tiny_models() -> Models:
    """The random models of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny_pipelines

    def arguments(name: str, dice: random.Random) -> dict[str, Any]:
        rows = ("flux", "flux-true-guidance") if name == "flux" else (name,)
        inputs = tiny_pipelines.PIPELINES[dice.choice(rows)].arguments()
        inputs["height"], inputs["width"] = (dice.choice((32, 64, 96)) for _ in range(2))
        if "num_frames" in inputs:
            inputs["num_frames"] = dice.choice((1, 5))
        batch = dice.choice((1, 1, 2))
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                inputs[key] = value.repeat(batch, *[1] * (value.ndim - 1))
        return inputs

    def wrap(name: str, transformer: nn.Module) -> Any:
        return tiny_pipelines.pipeline(name, transformer=transformer)

    names = ("flux", "hunyuan-video", "wan")
    return Models(names, tiny_pipelines.pipeline, wrap, arguments, most_steps=12)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="models of random weights")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    soak, number = Soak(tiny_models() if options.tiny else trained_models(), options.seed), 0
    try:
        with torch.no_grad():
            for number in range(options.runs):
                print(soak.run(number), flush=True)
        memory = judge_memory(soak.memory)
    except ViolationError as violation:
        tiny = " --tiny" if options.tiny else ""
        print(f"run {number}: {violation}")
        print(f"  {draw(soak.models, options.seed, number).title}")
        print(f"repeat: python benchmarks/soak.py --seed {options.seed} --runs {number + 1}{tiny}")
        return 1
    steps = ", ".join(f"{count} {action}" for action, count in soak.counts.items())
    print(f"{options.runs} runs, {steps}; largest deviation {soak.largest:.0e}; {memory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
