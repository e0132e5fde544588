"""Many drawn generations in one process: none shows in a later one, and none leaks.

Model, size, steps, batch, rules and the end of a run (as it should, stopped early by a callback, or
by an exception in a block, the scheduler or a callback) are drawn from the run's number. One
pipeline a model serves all runs. After each of them every step of a run without an exception is in
its statistics, the last finished step's latents equal a fresh pipeline's that is told the same
decisions, and no more tensors are alive than after the model's first run. `make fuzz` draws more.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fuzzing import FACTOR
from tiny_pipelines import PIPELINES, pipeline
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
from dicache.core.step import Step
from dicache.driver.families import find_family

MODELS = ("flux", "hunyuan-video", "wan")
TOLERANCE = 1e-5  # relative to the largest latent
LETTERS = {"compute": "C", "resume": "C", "reuse": "R"}
KEPT: dict[str, dict[str, Any]] = {
    "": {},
    " in host memory": {"cache_device": "cpu"},
    " in bf16": {"cache_dtype": torch.bfloat16},
    " in fp8 in host memory": {"cache_dtype": torch.float8_e4m3fn, "cache_device": "cpu"},
}
ENDS = ("whole", "whole", "whole", "stop", "block", "scheduler", "callback")
RUNS = 16 * max(FACTOR, 1)
SEED = random.randrange(10**6) if FACTOR else 1


class PlannedError(Exception):
    """The exception that aborts a run on purpose."""


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


# --- Drawing -------------------------------------------------------------------------------------


def draw(number: int | str, model: str | None = None) -> Plan:
    """The plan of a run, of one model or a random one; it depends on the arguments alone."""
    dice = random.Random(f"soak {SEED} {number}")
    name = model or dice.choice(MODELS)
    # A few numbers only: runs of equal length are the ones that are hard to tell apart.
    steps = dice.choice((1, 2, 3, 5, 8, 12))
    arguments = draw_arguments(name, dice)
    arguments |= {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    config, rules = draw_config(name, dice)
    keeps = dice.random() < 0.4
    end = dice.choice(ENDS)
    batch = f"batch {len(arguments['prompt_embeds'])}"
    told = f"{name}, {batch}, {steps} steps, {'same rules' if keeps else rules}, {end}"
    return Plan(
        model=name,
        arguments=arguments,
        config=None if keeps else config,
        end=end,
        at=dice.randrange(steps),
        block=dice.random(),
        resets=dice.random() < 0.7,
        title=f"seed {SEED}, run {number}: {told}",
    )


def draw_arguments(name: str, dice: random.Random) -> dict[str, Any]:
    """Of a call: its size, its batch, with or without guidance."""
    inputs = PIPELINES[dice.choice(("flux", "flux-true-guidance")) if name == "flux" else name]
    arguments = inputs.arguments()
    arguments["height"], arguments["width"] = (dice.choice((32, 64, 96)) for _ in range(2))
    if "num_frames" in arguments:
        arguments["num_frames"] = dice.choice((1, 5))
    batch = dice.choice((1, 1, 2))
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[key] = value.repeat(batch, *[1] * (value.ndim - 1))
    return arguments


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
        return DiCacheConfig.preset(dice.choice(preset), threshold=threshold), "preset"
    if kind == "greedy":
        limit = dice.choice((None, 1, 3))
        return DiCacheConfig(threshold=math.inf, max_consecutive_reuse=limit), "reused in a row"
    depth, cfg = dice.choice((1, 2)), dice.choice(("shared", "independent"))
    unit = dice.choice(("batch", "sample"))
    config = DiCacheConfig(threshold=threshold, probe_depth=depth, cfg=cfg, granularity=unit)
    return config, f"default {cfg} a {unit}"


# --- Running -------------------------------------------------------------------------------------


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

    arguments = {**plan.arguments, "generator": torch.Generator().manual_seed(plan.at)}
    counting = pipe.transformer.register_forward_pre_hook(count)
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


class Soak:
    """The pipelines of all runs, and what was seen of them.

    Attributes:
        plain: Un-cached transformers, to make fresh pipelines of.
        tensors: Storages alive after a model's first run that was checked.
        held: Models whose last run was ended by an exception, and not reset: while one holds its
            state, tensors are not compared.
        counts: Steps by action.
        titles: What was run.
    """

    def __init__(self) -> None:
        self.pipes = {name: pipeline(name) for name in MODELS}
        self.plain = {name: copy.deepcopy(p.transformer) for name, p in self.pipes.items()}
        self.tensors: dict[str, int] = {}
        self.held: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.titles: list[str] = []
        for name, pipe in self.pipes.items():
            apply_dicache(pipe)
            generate(pipe, replace(draw("the first", name), end="whole"))  # what is filled once

    def run(self, number: int) -> None:
        """Run and check."""
        model = self.generate_and_check(draw(number))
        if not self.held:  # what was drawn has gone by now
            count = live_storages(list(self.pipes.values()))
            first = self.tensors.setdefault(model, count)
            assert count <= first, f"{self.titles[-1]}: {count} tensors are alive"

    def generate_and_check(self, plan: Plan) -> str:
        """The model that ran."""
        pipe = self.pipes[plan.model]
        if plan.config is not None:
            remove_dicache(pipe)
            apply_dicache(pipe, plan.config)
        outcome = generate(pipe, plan)
        stats = get_stats(pipe)["transformer"]
        self.check(plan, pipe, stats, outcome)
        self.titles.append(f"{plan.title}, {'raised' if outcome.raised else 'ended'}")
        for action in ("computed", "resumed", "reused"):
            self.counts[action] += getattr(stats, f"num_{action}")
        self.held.discard(plan.model)
        if outcome.raised and plan.resets:
            reset_dicache(pipe)
        elif outcome.raised:
            self.held.add(plan.model)
        return plan.model

    def check(self, plan: Plan, pipe: Any, stats: RunStats, outcome: Outcome) -> None:
        """Statistics, and the result against a fresh pipeline's.

        Where every sample decides for itself, which no schedule can tell, the fresh one decides by
        the same rules.
        """
        recorded = sum(len({each.step for each in steps}) for steps in stats.contexts.values())
        if not outcome.raised:
            assert recorded == outcome.calls, f"{plan.title}: steps are not in the statistics"
        config = sessions(pipe)["transformer"].config
        fresh = pipeline(plan.model, transformer=copy.deepcopy(self.plain[plan.model]))
        if config.granularity == "batch":
            put_on_schedules(fresh, config, masks(stats))
        else:
            apply_dicache(fresh, config)
        expected = generate(fresh, plan)
        assert (outcome.steps, outcome.raised) == (expected.steps, expected.raised), plan.title
        followed = masks(get_stats(fresh)["transformer"])
        assert masks(stats) == followed, f"{plan.title}: the fresh one did not follow the schedule"
        if outcome.latents is None or expected.latents is None:
            return
        scale = expected.latents.abs().max()
        same = torch.equal(outcome.latents, expected.latents) or bool(
            (outcome.latents - expected.latents).abs().max() <= TOLERANCE * scale
        )
        assert same, f"{plan.title}: the result deviates from a fresh pipeline's"


def put_on_schedules(pipe: Any, config: DiCacheConfig, schedules: dict[str, str]) -> None:
    """Cache a pipeline with the same rules, but a given schedule for each context.

    A configuration has one schedule for all contexts, so the session gets each one's beside it.
    """
    config = replace(config, schedule="C", cfg="independent")
    apply_dicache(pipe, config)
    session = sessions(pipe)["transformer"]
    for name, schedule in schedules.items():
        session.rules_of[name] = resolve(replace(config, schedule=schedule))


def masks(stats: RunStats) -> dict[str, str]:
    """What was computed and reused, by context and, where it has its own schedule, sample."""
    found: dict[str, str] = {}
    for name, steps in stats.contexts.items():
        for step in steps:
            key = name if step.sample is None else f"{name}[{step.sample}]"
            found[key] = found.get(key, "") + LETTERS[step.action]
    return found


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


# --- Tests ---------------------------------------------------------------------------------------


def soak() -> Soak:
    """All runs."""
    soak = Soak()
    for number in range(RUNS):
        soak.run(number)
    return soak


@pytest.mark.hypothesis  # so that `make fuzz` runs it
def test_no_run_shows_in_a_later_one_and_none_leaks() -> None:
    """Among them every model, every end and every kind of rules, or they would say little."""
    ran = soak()
    told = "\n".join(ran.titles)
    for word in (*MODELS, *ENDS, "raised", "batch 2", "default", "same rules", "reused in a row"):
        assert word in told
    for word in ("a sample", "in fp8", "in bf16", "preset"):
        assert word in told
    assert min(ran.counts.values()) > 10 and len(ran.counts) == 3
    assert set(ran.tensors) == set(MODELS)


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, record = [], Step.record

    def keep(self: Step, y: Tensor) -> Tensor:
        kept.append(y.mean())  # small: it is the number of tensors that counts
        return record(self, y)

    monkeypatch.setattr(Step, "record", keep)
    with pytest.raises(AssertionError, match="tensors are alive"):
        soak()


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some reused steps, not the same ones in a run and its reference, mix their tokens up."""
    count, reuse = itertools.count(), Step.reuse

    def spoil(self: Step, *args: Any) -> Tensor:
        y = reuse(self, *args)
        return y.flip(1) if next(count) % 7 == 0 else y

    monkeypatch.setattr(Step, "reuse", spoil)
    with pytest.raises(AssertionError, match="deviates"):
        soak()


def test_steps_that_are_not_in_the_statistics_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own lack is seen where it ended as it should, otherwise that of its reference is."""
    count, record = itertools.count(), Step.record

    def forget(self: Step, y: Tensor) -> Tensor:
        return y if next(count) == 100 else record(self, y)

    monkeypatch.setattr(Step, "record", forget)
    with pytest.raises(AssertionError, match=r"not in the statistics|did not follow the schedule"):
        soak()
