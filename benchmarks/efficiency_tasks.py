"""What the stages of efficiency.py run, each in a process: `python efficiency_tasks.py TASK MODEL`.

Every finding is emitted as it is made. A cache that fails costs its own row only; if it takes the
whole process along, what was begun is in the findings, and efficiency.py starts another process for
the rest.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import rows
import timing
import torch
from efficiency_caches import Cache, absent, caches, ideal, shortened, uncached
from efficiency_models import FULL, TINY
from efficiency_runs import COST_MASK, SHORT_MASK, Bench, Run, make_mask, step_costs
from stages import Deadline, emit

IDEAL_STEPS = 12
BASELINE_STEPS = 8  # of the un-cached run beside the short ones
FEWER_STEPS = (30, 20, 15, 10, 8)  # of a whole run, where those that are wanted take too long
SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the blocks, where all of them take too long
SECONDS_TO_SPARE = 15.0
NO_LIMIT_SECONDS = 1e6  # stands for no limit, and can be calculated with
SHORT_RUNS_RESERVE = 0.35  # share of the time that whole runs leave to the short ones
_GRAPH_CALLS = 12


# --- Plan ----------------------------------------------------------------------------------------


def short_seconds(full_s: float, ideal_s: float) -> float:
    """Time of the two short runs of one cache, from those of a full and of a skipped step."""
    masks = SHORT_MASK + COST_MASK
    return 1.2 * (masks.count("C") * full_s + masks.count("R") * ideal_s)


def plan_share(left_s: float, full_s: float, ideal_s: float, num_caches: int) -> float:
    """The largest share of the blocks with which the short runs fit into this time."""
    for share in SHARES:
        step = ideal_s + share * (full_s - ideal_s)
        if num_caches * short_seconds(step, ideal_s) + BASELINE_STEPS * step <= left_s:
            return share
    return SHARES[-1]


def plan_whole(
    wanted: int, left_s: float, full_s: float, ideal_s: float
) -> tuple[float, int] | None:
    """Share of the blocks and number of steps of an un-cached and a cached run that fit.

    Blocks are left out only where the fewest steps of the whole model do not fit.
    """
    for share in SHARES:
        step = ideal_s + share * (full_s - ideal_s)
        for steps in (wanted, *(fewer for fewer in FEWER_STEPS if fewer < wanted)):
            mask = "C" * steps + make_mask(steps)
            if 1.05 * (mask.count("C") * step + mask.count("R") * ideal_s) <= left_s:
                return share, steps
    return None


# --- Measure -------------------------------------------------------------------------------------


class Measurement:
    """All measurements of one model in this process.

    Args:
        name: Key of the model.
        device: A GPU takes the full size, a CPU the tiny one.
        without: Caches that another process has tried already.
    """

    def __init__(self, name: str, device: torch.device, without: Sequence[str] = ()) -> None:
        self.deadline = Deadline()
        self.name, self.device = name, device
        self.bench = make_bench(name, device)
        everything = caches(device)
        self.main = next(iter(everything))
        self.is_first = not without
        self.caches = {key: cache for key, cache in everything.items() if key not in without}
        self.full_ms = self.ideal_ms = 0.0

    def run(self) -> None:
        """The default backend first, in short and in whole runs, then everything else in short."""
        self._describe()
        self._estimate()
        left = self._left()
        share = plan_share(
            SHORT_RUNS_RESERVE * left, self.full_ms / 1e3, self.ideal_ms / 1e3, len(self.caches)
        )
        with shortened(self.bench.transformer, share):
            baseline = self.bench.run("C" * BASELINE_STEPS)
            if self.main in self.caches:
                self._begin(self.main, baseline)
        reserve = SHORT_RUNS_RESERVE * left
        if self.main in self.caches:
            for wanted in self.bench.model.steps:
                self._guarded(f"{wanted} steps", lambda w=wanted: self._whole(w, reserve))
        with shortened(self.bench.transformer, share):
            for key in self.caches:
                if key != self.main:
                    self._begin(key, baseline)

    def emit(self, kind: str, **finding: Any) -> None:
        """Emit a finding about this model."""
        emit({"kind": kind, "model": self.name, **finding})

    def _describe(self) -> None:
        model = self.bench.model
        mask = make_mask(model.steps[0])
        self.emit(
            "model",
            title=model.title,
            blocks=self.bench.num_blocks,
            contexts=model.contexts,
            mask=mask,
            short_mask=SHORT_MASK,
            device=rows.device_name(self.device),
            dtype=str(self.bench.transformer.dtype).removeprefix("torch."),
            diffusers=diffusers.__version__,
            cache_dit=_version("cache-dit"),
            default=self.main,
        )
        for key, reason in absent(self.device).items() if self.is_first else ():
            self.emit("absent", implementation=key, reason=reason)

    def _estimate(self) -> None:
        """A full step, cold runs left out, and the ideal skipped one."""
        with shortened(self.bench.transformer, 0):
            self.bench.run("CC")
            alone = self.bench.run("C" * IDEAL_STEPS)
            costs = self._costs("the ideal step", uncached)
        self.ideal_ms = alone.median_ms("C")
        self.full_ms = self.bench.run("CC").step_ms[-1]
        self.emit("ideal", ideal_ms=self.ideal_ms, ideal_call_ms=alone.median_call_ms("C"), **costs)

    def _begin(self, key: str, baseline: Run) -> None:
        """The short runs of one cache, if there is time."""
        full_s = baseline.median_ms("C") / 1e3
        if self._left() < short_seconds(full_s, self.ideal_ms / 1e3):
            self.emit("left out", implementation=key, reason="no time left")
            return
        self.emit("begun", implementation=key)
        costs = self._costs(key, self.caches[key])
        self._guarded(key, lambda: self._short(key, baseline, costs))

    def _costs(self, case: str, cache: Cache) -> dict[str, float]:
        """What a skipped step launches; nothing where that cannot be found out."""
        costs: dict[str, float] = {}
        self._guarded(f"launches, {case}", lambda: costs.update(step_costs(self.bench, cache)))
        return costs

    def _short(self, key: str, baseline: Run, costs: dict[str, float]) -> None:
        run = self.bench.run(SHORT_MASK, self.caches[key])
        self.emit(
            "row",
            implementation=key,
            blocks=self.bench.num_blocks,
            full_ms=baseline.median_ms("C"),
            ideal_ms=self.ideal_ms,
            **self._facts(run, baseline),
            **costs,
        )

    def _whole(self, wanted: int, reserve_s: float) -> None:
        plan = plan_whole(wanted, self._left() - reserve_s, self.full_ms / 1e3, self.ideal_ms / 1e3)
        if plan is None:
            self.emit("left out", implementation=f"{wanted} steps", reason="no time left")
            return
        share, steps = plan
        with shortened(self.bench.transformer, share):
            self._pair(wanted, steps, reserve_s)

    def _pair(self, wanted: int, steps: int, reserve_s: float) -> None:
        """An un-cached and a cached run; an ideal and the un-cached one again, if there is time."""
        mask = make_mask(steps)
        plain = [self.bench.run("C" * steps)]
        cached = self.bench.run(mask, self.caches[self.main])
        finding = {
            "implementation": self.main,
            "wanted_steps": wanted,
            "mask": mask,
            "blocks": self.bench.num_blocks,
            "full_ms": plain[0].median_ms("C"),
            "ideal_ms": self.ideal_ms,
            "loop_ms": cached.loop_ms,
            "uncached_loop_ms": [plain[0].loop_ms],
            **self._facts(cached, plain[0]),
        }
        self.emit("whole", **finding)
        if self._left() - reserve_s > 1.1 * cached.loop_ms / 1e3:
            finding["ideal_loop_ms"] = self.bench.run(mask, ideal).loop_ms
            self.emit("whole", **finding)
        if self._left() - reserve_s > 1.1 * plain[0].loop_ms / 1e3:
            plain.append(self.bench.run("C" * steps))  # a device that warms up slows down
            full = [ms for run in plain for ms in run.of_kind("C", run.step_ms)]
            finding["full_ms"] = statistics.median(full)
            finding["uncached_loop_ms"] = [run.loop_ms for run in plain]
            self.emit("whole", **finding)

    def _facts(self, run: Run, plain: Run) -> dict[str, Any]:
        skipped = [c for k, c in zip(run.mask, run.blocks, strict=True) if k == "R"]
        extra = None
        if run.peak_bytes is not None and plain.peak_bytes is not None:
            extra = run.peak_bytes - plain.peak_bytes
        return {
            "computed_ms": run.median_ms("C"),
            "skipped_ms": run.median_ms("R"),
            "skipped_call_ms": run.median_call_ms("R"),
            "blocks_in_a_skipped_call": max(max(counts) for counts in skipped),
            "deviation": self.bench.deviation(run),
            "extra_peak_bytes": extra,
            **run.held,
        }

    def _left(self) -> float:
        return min(self.deadline.left(), NO_LIMIT_SECONDS) - SECONDS_TO_SPARE

    def _guarded(self, case: str, measure: Callable[[], Any]) -> None:
        guarded(f"{self.name}: {case}", self.device, measure)


def make_bench(name: str, device: torch.device) -> Bench:
    """The model's pipeline: bf16 at full size on a GPU, fp32 and tiny on a CPU."""
    if device.type == "cuda":
        return Bench(FULL[name], device, torch.bfloat16)
    return Bench(TINY[name], device, torch.float32)


def guarded(case: str, device: torch.device, measure: Callable[[], Any]) -> bool:
    """Measure; an error becomes a finding, and the answer `False`.

    Raises:
        RuntimeError: The error broke the device for this process, which then has to end.
    """
    passed = True
    try:
        measure()
    except Exception as error:  # one broken case must not hide the others
        passed = False
        emit({"kind": "error", "case": case, "error": f"{type(error).__name__}: {error}"[:2000]})
    gc.collect()
    timing.synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return passed


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- Explore -------------------------------------------------------------------------------------


def explore_graph(name: str, device: torch.device) -> None:
    """The probe block of one step, launched kernel by kernel and as a replayed CUDA graph."""
    bench = make_bench(name, device)
    call = _first_block_call(bench)
    with torch.no_grad():
        finding = {
            "eager_ms": _device_ms(call),
            "eager_host_ms": _host_ms(call),
            "launches": timing.count_launches(call, device),
        }
        emit({"kind": "graph", "model": name, **finding})
        graph = _captured(call)
        finding["graph_ms"] = _device_ms(graph.replay)
        finding["graph_host_ms"] = _host_ms(graph.replay)
        emit({"kind": "graph", "model": name, **finding})


def _first_block_call(bench: Bench) -> Callable[[], Any]:
    """The first block's call of one step, on the tensors that it was given there."""
    bench.stop_counting()
    block, _ = bench.family.blocks(bench.transformer)[0]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with shortened(bench.transformer, 0):
        bench.run("C")
    handle.remove()
    args, kwargs = seen[0]
    return lambda: block(*args, **kwargs)


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries take their workspaces before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _device_ms(call: Callable[[], Any]) -> float:
    """Median of single calls that queue up behind each other, the first ones left out."""
    times = timing.call_seconds(call, torch.device("cuda"), 3 + _GRAPH_CALLS)
    return statistics.median(times[3 + _GRAPH_CALLS // 4 :]) * 1e3


def _host_ms(call: Callable[[], Any]) -> float:
    """Median time until a call returns to Python, its work still ahead."""
    times = []
    for _ in range(_GRAPH_CALLS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def explore_compile(name: str, device: torch.device) -> None:
    """Blocks under torch.compile, without and with dicache."""
    deadline = Deadline()
    bench = make_bench(name, device)
    bench.stop_counting()  # a counter inside of compiled code would change it
    transformer = bench.transformer
    with shortened(transformer, 0):
        bench.run("CC")
        ideal_s = bench.run("CC").step_ms[-1] / 1e3
    full_s = bench.run("CC").step_ms[-1] / 1e3
    share = plan_share(0.4 * deadline.left(), full_s, ideal_s, 2)
    with shortened(transformer, share):
        eager = bench.run("C" * BASELINE_STEPS)
        begin = time.monotonic()
        transformer.compile_repeated_blocks(fullgraph=True)
        bench.run("CC")
        seconds = time.monotonic() - begin
        finding: dict[str, Any] = {
            "kind": "compiled",
            "model": name,
            "blocks": bench.num_blocks,
            "eager_full_ms": eager.median_ms("C"),
            "compile_seconds": seconds,
        }
        finding["full_ms"] = bench.run("C" * BASELINE_STEPS).median_ms("C")
        emit(finding)
        with shortened(transformer, 0):
            finding["ideal_ms"] = bench.run("C" * BASELINE_STEPS).median_ms("C")
        key, cache = next(iter(caches(device).items()))
        bench.run("CCR", cache)
        cached = bench.run(SHORT_MASK, cache)
        if cached.held["reused_steps"] != SHORT_MASK.count("R"):
            raise RuntimeError(f"{cached.held['reused_steps']} steps were reused")
        finding["implementation"] = key
        finding["computed_ms"] = cached.median_ms("C")
        finding["skipped_ms"] = cached.median_ms("R")
        emit(finding)


# --- Command line --------------------------------------------------------------------------------


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("measure", "graph", "compile"))
    parser.add_argument("model", choices=FULL)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--without", nargs="*", default=[], help="caches not to measure")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if args.task == "measure":
        Measurement(args.model, device, args.without).run()
        return
    explore = explore_graph if args.task == "graph" else explore_compile
    guarded(f"{args.model}: {args.task}", device, lambda: explore(args.model, device))


if __name__ == "__main__":
    main()
