"""What the stages of gpu.py run, each in a process of its own: `python gpu_tasks.py TASK NAMES`.

Needs torch, and no test or benchmark framework. Every finding is emitted as it is made.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import agreement
import rows
import timing
import torch
import workloads
from stages import SKIP_CODE, Deadline, emit
from workloads import Case, Size

import dicache
from dicache import ops

ROOT = Path(__file__).resolve().parents[1]
# The same code on a CPU, in seconds: the names say that these are not the models' sizes.
DRY_SIZES = {
    f"dry-{name}": Size(f"dry-{name}", shape, 8, "dry run")
    for name, shape in {"small": (1, 16, 8), "flux": (1, 96, 64)}.items()
}
# Odd numbers of elements: a scalar tail, samples that begin unaligned, and fewer than one block.
ODD_SIZES = tuple(
    Size(f"odd-{batch}x{tokens}x{width}", (batch, tokens, width), 8, "odd")
    for batch, tokens, width in ((1, 5, 33), (3, 77, 33), (2, 1021, 129))
)
COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
SECONDS_TO_SPARE = 8.0  # the time that the longest case may take, compilation left out
COMPILE_SECONDS = 35.0


# --- Facts ---------------------------------------------------------------------------------------


def environment() -> None:
    """Hardware and versions."""
    emit({"kind": "versions", "versions": rows.versions() | {"dicache": dicache.__version__}})
    smi = "nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv"
    facts = {
        "device": rows.device_name(_device()),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "cuda of torch": torch.version.cuda or "none",
        "nvidia-smi": _printed(smi.split()),
        "nvcc": _printed(["nvcc", "--version"]).rpartition("\n")[2],
        "revision": _printed(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["multiprocessors"] = str(properties.multi_processor_count)
        facts["L2"] = f"{properties.L2_cache_size / 2**20:.0f} MiB"
        facts["capability"] = f"{properties.major}.{properties.minor}"
    emit({"kind": "facts", "facts": facts})


def backend_status() -> None:
    """Which backends run, after the build."""
    emit({"kind": "backends", "status": ops.backend_status()})


def _printed(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else f"exit code {done.returncode}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- Correctness ---------------------------------------------------------------------------------


def check_cpp() -> None:
    """The CPU library of this interpreter's `dicache` loads, and computes what the reference does.

    With a library from elsewhere, PYTHONPATH names a copy of the package that holds it.
    """
    device = torch.device("cpu")
    emit({"kind": "library", "package": str(Path(ops.__file__).parent), **_versions_of_library()})
    status = ops.backend_status()["cpp"]
    if status != "available":
        raise SystemExit(f"the library does not load: {status}")
    for size in (*ODD_SIZES, workloads.SMALL):
        for case in workloads.cases(device, [size], ["cpp"]):
            agreement.check_case(case, device)
            emit({"kind": "checked", "case": case.name})


def _versions_of_library() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def exercise(names: list[str]) -> None:
    """Every operator of the named backends twice at odd sizes, for compute-sanitizer to watch.

    Inputs are made on the CPU and copied, and results are compared with the reference there: torch
    launches nearly nothing beside the operators.
    """
    device = _device()
    present = [name for name in workloads.backends(device) if name in names]
    if not present:
        raise SystemExit(SKIP_CODE)
    for name in present:
        for size in ODD_SIZES:
            for case in workloads.cases(device, [size], [name]):
                _exercise_case(case, device)
        emit({"kind": "exercised", "backend": name})


def _exercise_case(case: Case, device: torch.device) -> None:
    made = workloads.make_tensors(case, torch.device("cpu"), seed=3)
    tensors = {name: tensor.to(device, copy=True) for name, tensor in made.items()}
    if "workspace" in tensors:
        tensors["workspace"] = ops.make_workspace(tensors["x"])
    call = workloads.bind(case, tensors)
    judge = workloads.bind(dataclasses.replace(case, implementation="reference"), made)
    for _ in range(2):  # the second launch finds the workspace as the first one left it
        outputs, expected = call(), judge()
        for name, got, want in zip(case.operation.outputs, outputs, expected, strict=True):
            agreement.compare(case, name, got.cpu(), want)
    for name in set(case.operation.arguments) - {"workspace"}:
        agreement.compare(case, name, tensors[name].cpu(), made[name])


def traffic(names: list[str]) -> None:
    """Each operator once on tensors far larger than the cache, for a profiler to count bytes."""
    device = _device()
    for name in names:
        for operator in workloads.OPERATORS:
            case = Case(workloads.OPERATIONS[operator], name, workloads.HUNYUAN_VIDEO)
            workloads.bind(case, workloads.make_tensors(case, device))()
            timing.synchronize(device)


def count_bytes(names: list[str]) -> None:
    """DRAM bytes of one launch of every operator, by the hardware's counters."""
    present = [name for name in workloads.backends(_device()) if name in names]
    if not present:
        raise SystemExit(SKIP_CODE)
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none"]
    # The names of the operators' kernels, in csrc/cuda and in kernels/triton.
    command += ["--kernel-name", "regex:probe|alignment|combine|extrapolate|record"]
    command += ["--metrics", ",".join(COUNTERS), sys.executable, __file__, "traffic", *present]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:])
    launched = list(itertools.product(present, workloads.OPERATORS))
    counted = read_counters(done.stdout)
    if done.returncode or len(counted) != len(launched):
        raise SystemExit(f"{len(counted)} kernels counted, {len(launched)} launched")
    for (backend, operator), (kernel, counters) in zip(launched, counted, strict=True):
        for finding in passes_found(operator, counters):
            emit({"kind": "bytes", "implementation": backend, "kernel": kernel, **finding})


def passes_found(operator: str, counters: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Stated and counted passes of one launch at the HunyuanVideo size, reads and writes."""
    tensor_bytes = workloads.HUNYUAN_VIDEO.tensor_bytes()
    stated = ops.MEMORY_PASSES[operator]
    for direction, passes, counter in zip(("read", "written"), stated, COUNTERS, strict=True):
        yield {
            "operation": operator,
            "direction": direction,
            "stated_passes": passes,
            "counted_passes": counters[counter] / tensor_bytes,
        }


def read_counters(printed: str) -> list[tuple[str, dict[str, float]]]:
    """Kernels and their metrics, in order of launch, from what `ncu --csv` printed."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for record in csv.DictReader(lines[start:]):
        if not (record.get("ID") or "").isdigit():
            continue
        _, counters = kernels.setdefault(record["ID"], (record["Kernel Name"], {}))
        counters[record["Metric Name"]] = float(record["Metric Value"].replace(",", ""))
    return list(kernels.values())


# --- Times ---------------------------------------------------------------------------------------


def bench(sizes: dict[str, Size], seconds: float, names: list[str]) -> None:
    """Copies, host times and every case of the named implementations, until the time is used up."""
    device, deadline = _device(), Deadline()
    emit({"kind": "backends", "status": ops.backend_status()})
    if not {*workloads.backends(device), "published", "torch.compile"} & set(names):
        raise SystemExit(SKIP_CODE)
    rates = {}
    for size in sizes.values():
        rates[size.name] = timing.copy_rate(size, device)
        emit({"kind": "copy", "size": size.name, "gb_per_s": rates[size.name]})
    if device.type == "cuda":
        hosted = [name for name in names if name != "torch.compile"]
        for case in workloads.cases(device, [workloads.SMALL], hosted):
            _guarded(case, lambda case=case: measure_host(case, device))
    needed = COMPILE_SECONDS if "torch.compile" in names else SECONDS_TO_SPARE
    for case in workloads.cases(device, list(sizes.values()), names):
        if deadline.left() < needed:
            emit({"kind": "left out", "case": case.name, "reason": "no time left"})
            continue
        _guarded(case, lambda case=case: measure(case, device, rates[case.size.name], seconds))


def _guarded(case: Case, measure: Callable[[], dict[str, Any]]) -> None:
    try:
        with torch.no_grad():
            emit(measure())
    except Exception as error:  # one broken case must not hide the others
        emit({"kind": "error", "case": case.name, "error": f"{type(error).__name__}: {error}"})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(case: Case, device: torch.device, copy_rate: float, seconds: float) -> dict[str, Any]:
    """Check a case, then its time and its launches."""
    calls = timing.rotating_calls(case, device, agreement.check_case(case, device))
    each = timing.seconds_per_call(calls, device, seconds)
    launches = timing.case_launches(case, device, calls[0])
    name = rows.device_name(device)
    row = rows.make_row(case, each, copy_rate, launches, len(calls), name)
    return row | {"kind": "row", "stated_launches": case.operation.launches}


def measure_host(case: Case, device: torch.device) -> dict[str, Any]:
    """Host time of a launch."""
    seconds = timing.host_seconds(timing.rotating_calls(case, device), device)
    return {
        "kind": "host",
        "operation": case.operation.name,
        "implementation": case.implementation,
        "microseconds": seconds * 1e6,
    }


TASKS: dict[str, Callable[[list[str]], None]] = {
    "environment": lambda names: environment(),
    "backends": lambda names: backend_status(),
    "check-cpp": lambda names: check_cpp(),
    "exercise": exercise,
    "traffic": traffic,
    "count-bytes": count_bytes,
    "bench": functools.partial(bench, workloads.SIZES, 0.25),
    "dry-bench": functools.partial(bench, DRY_SIZES, 0.05),  # the same code, other sizes
}


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("names", nargs="*", help="backends, published or torch.compile")
    args = parser.parse_args()
    TASKS[args.task](args.names)


if __name__ == "__main__":
    main()
