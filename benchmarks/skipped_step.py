"""Where the host time of a skipped step goes, part by part, beside diffusers' FirstBlockCache.

    python benchmarks/skipped_step.py [--rounds N]

A Flux of FLUX.1's 57 blocks and tiny width on one thread: the tensors take next to no time, so what
is left is Python, hooks and dispatch. The functions of a step are wrapped from outside with time
stamps; every nanosecond between the first stamp and the last belongs to one part, so the parts of a
step sum to the step. The model with its first block alone gets the stamps that apply to it. Beside
these run both without stamps, and the model with FirstBlockCache. All take turns, and the fastest
step of each counts, because other programs only ever add time. A round makes new models: where a
model lies in memory changes its times by a few percent.

Prints tables. Needs diffusers, and a minute of a quiet machine.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

from dicache import DiCacheConfig, RunStats, apply_dicache, get_stats, ops
from dicache.adapters.diffusers.attach import cache_on
from dicache.cli.info import processor, versions
from dicache.core.readback import Readback

STEPS, WARM_UP = 60, 5
SKIPS = DiCacheConfig(threshold=math.inf, retention_ratio=0, compute_last_step=False)
ROUNDS, TURNS = 12, 4
# In order of time, and what each part is of. cache_context is there before and after the call.
PARTS = {
    "cache_context": "pipeline",
    "take the call": "cache",
    "embeddings": "model",
    "open the step": "cache",
    "probe block": "model",
    "take x and p": "cache",
    "statistics": "cache",
    "numbers to the host": "cache",
    "gate": "cache",
    "pass through": "cache",
    "hand out": "cache",
    "combination": "cache",
    "head": "model",
    "close the step": "cache",
}
DICACHE, FIRST_BLOCK, PROBE_ALONE = "dicache", "FirstBlockCache", "probe alone"
STAMPED, STAMPED_ALONE = "dicache with time stamps", "probe alone with time stamps"

Parts = dict[str, int]


@dataclass(frozen=True)
class Measurement:
    """Nanoseconds of one skipped step.

    Attributes:
        parts: Those of the fastest step with time stamps, by the names of `PARTS`.
        alone: The same of the model with its first block alone.
        totals: The fastest step of each model, by its name.
    """

    parts: Parts
    alone: Parts
    totals: dict[str, int]

    def above_probe(self, name: str) -> int:
        """What a model takes longer than the one with its first block alone."""
        alone = STAMPED_ALONE if name in (STAMPED, STAMPED_ALONE) else PROBE_ALONE
        return self.totals[name] - self.totals[alone]


class TimeStamps:
    """Ends of parts, in the order in which they come."""

    def __init__(self) -> None:
        self._stamps: list[tuple[str, int]] = []

    def start(self) -> None:
        """Begin a step."""
        self._stamps = [("", time.perf_counter_ns())]

    def end(self, part: str) -> None:
        """The time since the last stamp belongs to `part`."""
        self._stamps.append((part, time.perf_counter_ns()))

    def around(self, call: Callable[..., Any], before: str, inside: str) -> Callable[..., Any]:
        """`call` with stamps: what led to it belongs to `before`, what it ends with to `inside`."""

        def stamped(*args: Any, **kwargs: Any) -> Any:
            self.end(before)
            output = call(*args, **kwargs)
            self.end(inside)
            return output

        return stamped

    def parts(self) -> Parts:
        """Nanoseconds by part since `start`."""
        found = dict.fromkeys(PARTS, 0)
        for (_, begin), (part, end) in zip(self._stamps, self._stamps[1:], strict=False):
            found[part] += end - begin
        return found

    def total(self) -> int:
        """Nanoseconds from the first stamp to the last."""
        return self._stamps[-1][1] - self._stamps[0][1]


# --- Models --------------------------------------------------------------------------------------


def make_model() -> Any:
    """FLUX.1's 57 blocks at width 8."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    ).eval()


def make_inputs() -> dict[str, Any]:
    """One call's arguments but for the timestep; the text embedding stays the same object."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 8, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }


def make_models(stamps: TimeStamps) -> dict[str, Any]:
    """A model of each kind; two of them end the parts of `stamps`."""
    names = (STAMPED, DICACHE, FIRST_BLOCK, PROBE_ALONE, STAMPED_ALONE)
    models = {name: make_model() for name in names}
    for name in (STAMPED, DICACHE):
        apply_dicache(models[name], SKIPS)
    models[FIRST_BLOCK].enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for name in (PROBE_ALONE, STAMPED_ALONE):
        models[name].transformer_blocks = models[name].transformer_blocks[:1]
        models[name].single_transformer_blocks = nn.ModuleList()
    _stamp_cached(models[STAMPED], stamps)
    _stamp_alone(models[STAMPED_ALONE], stamps)
    return models


def _stamp_cached(model: Any, stamps: TimeStamps) -> None:
    cache = cache_on(model)
    assert cache is not None
    hook, driver = model._diffusers_hook.get_hook("dicache"), cache.model
    hook.fn_ref.forward = stamps.around(hook.fn_ref.forward, "take the call", "head")
    for name, before, inside in (
        ("enter_blocks", "embeddings", "open the step"),
        ("after_probe", "probe block", "gate"),
        ("reuse", "pass through", "hand out"),
    ):
        setattr(driver, name, stamps.around(getattr(driver, name), before, inside))


def _stamp_alone(model: Any, stamps: TimeStamps) -> None:
    model.forward = stamps.around(model.forward, "take the call", "head")
    block = model.transformer_blocks[0]
    block.forward = stamps.around(block.forward, "embeddings", "probe block")


@contextmanager
def _stamped_functions(stamps: TimeStamps) -> Iterator[None]:
    """Stamps around the wait, and around the operators of trajectories that are made meanwhile."""
    resolve = ops.resolve_backend

    def resolve_stamped(*args: Any) -> Any:
        backend = resolve(*args)
        operators = {name: getattr(backend, name) for name in ops.MEMORY_PASSES}
        for name, before, inside in (
            ("alignment_statistics", "take x and p", "statistics"),
            ("combine_residuals", "hand out", "combination"),
        ):
            operators[name] = stamps.around(operators[name], before, inside)
        return SimpleNamespace(**operators)

    host = "numbers to the host"
    with (
        mock.patch("dicache.core.trajectory.resolve_backend", resolve_stamped),
        mock.patch.object(Readback, "wait", stamps.around(Readback.wait, host, host)),
    ):
        yield


# --- Runs ----------------------------------------------------------------------------------------


def run_with_stamps(
    model: Any, inputs: dict[str, Any], stamps: TimeStamps
) -> list[tuple[int, Parts]]:
    """Total and parts of every skipped step of one run, but for the first ones."""
    found = []
    for step in range(STEPS):
        timestep = torch.tensor([1.0 - step / 200])
        stamps.start()
        with model.cache_context("cond"):
            stamps.end("cache_context")
            model(timestep=timestep, **inputs)
            stamps.end("close the step")
        stamps.end("cache_context")
        found.append((stamps.total(), stamps.parts()))
    return found[WARM_UP:]


def run_plain(model: Any, inputs: dict[str, Any]) -> list[float]:
    """Seconds of every step of one run but for the first ones, which compute."""
    seconds = []
    for step in range(STEPS):
        timestep = torch.tensor([1.0 - step / 200])
        start = time.perf_counter()
        with model.cache_context("cond"):
            model(timestep=timestep, **inputs)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def measure(rounds: int) -> Measurement:
    """The fastest steps of `rounds` sets of models."""
    stamps, inputs = TimeStamps(), make_inputs()
    steps: dict[str, list[tuple[int, Parts]]] = {STAMPED: [], STAMPED_ALONE: []}
    seconds: dict[str, list[float]] = {DICACHE: [], FIRST_BLOCK: [], PROBE_ALONE: []}
    for _ in range(rounds):
        models = make_models(stamps)
        for _ in range(TURNS):
            for name, found in steps.items():
                patches: AbstractContextManager[None] = nullcontext()
                if name == STAMPED:
                    patches = _stamped_functions(stamps)
                with patches:
                    found += run_with_stamps(models[name], inputs, stamps)
            for name, times in seconds.items():
                times += run_plain(models[name], inputs)
        for name in (STAMPED, DICACHE):
            stats = get_stats(models[name])
            assert isinstance(stats, RunStats) and stats.num_reused == STEPS - 1
    fastest = {name: min(found, key=lambda step: step[0]) for name, found in steps.items()}
    totals = {name: total for name, (total, _) in fastest.items()}
    totals |= {name: round(min(times) * 1e9) for name, times in seconds.items()}
    return Measurement(fastest[STAMPED][1], fastest[STAMPED_ALONE][1], totals)


# --- Tables -------------------------------------------------------------------------------------


def environment() -> str:
    """Hardware and versions, in a line."""
    found = versions()
    told = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "diffusers"))
    return f"{processor()}, one thread of {os.cpu_count()}; {told}"


def table(found: Measurement) -> str:
    """The measurement in Markdown."""
    lines = ["| part | of the | us | probe alone, us |", "|---|---|--:|--:|"]
    for name, owner in PARTS.items():
        alone = _us(found.alone[name]) if found.alone[name] else ""
        lines.append(f"| {name} | {owner} | {_us(found.parts[name])} | {alone} |")
    sums = (sum(found.parts.values()), sum(found.alone.values()))
    lines.append(f"| sum | | {_us(sums[0])} | {_us(sums[1])} |")
    lines += ["", "| fastest step | us | above the probe, us |", "|---|--:|--:|"]
    for name in sorted(found.totals):
        lines.append(f"| {name} | {_us(found.totals[name])} | {_us(found.above_probe(name))} |")
    ratio = found.above_probe(DICACHE) / found.above_probe(FIRST_BLOCK)
    lines += ["", f"dicache adds {ratio:.2f} of what FirstBlockCache adds."]
    return "\n".join(lines)


def _us(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e3:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of 60 steps a model")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure(options.rounds)
    torch.set_num_threads(threads)
    print(f"{environment()}; {options.rounds} rounds\n\n{table(found)}")


if __name__ == "__main__":
    main()
