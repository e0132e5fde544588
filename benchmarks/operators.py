"""What gpu.py asks of the operators: are they right, and how long do they take?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import agreement
import timing
import torch
import workloads
from cases import Cases
from stages import SKIP_CODE, Finding
from workloads import Case, Size

from dicache import ops

# The same code in seconds: the names say that these are not the models' sizes.
DRY_SIZES = {
    f"dry-{name}": Size(f"dry-{name}", shape, 8, "dry run")
    for name, shape in {"small": (1, 16, 8), "flux": (1, 96, 64)}.items()
}
# Odd numbers of elements: a scalar tail, samples that begin unaligned, and fewer than one block.
ODD_SIZES = tuple(
    Size(f"odd-{batch}x{tokens}x{width}", (batch, tokens, width), 8, "odd")
    for batch, tokens, width in ((1, 5, 33), (3, 77, 33), (2, 1021, 129))
)
SECONDS_TO_SPARE = 8.0  # the time that the longest case may take, compilation left out
COMPILE_SECONDS = 35.0


# --- Correctness ---------------------------------------------------------------------------------


def exercise(device: torch.device, dry: bool, names: Sequence[str]) -> None:
    """Every operator of the named backends twice at odd sizes, for compute-sanitizer to watch.

    Inputs are made on the CPU and copied, and results are compared with the reference there: torch
    launches nearly nothing beside the operators.
    """
    present = _present(device, names)
    for name, size in itertools.product(present, ODD_SIZES):
        for case in workloads.cases(device, [size], [name]):
            _exercise_case(case, device)


def _present(device: torch.device, names: Sequence[str]) -> list[str]:
    """Those that run here; a stage without any is neither passed nor failed."""
    found = [*workloads.backends(device), "published", "torch.compile"]
    present = [name for name in found if name in names]
    if not present:
        raise SystemExit(SKIP_CODE)
    return present


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
    if case.operation.name.endswith(
        "statistics"
    ):  # what finishes sums that were added up elsewhere
        backend = ops.resolve_backend(case.implementation, device)
        finish = getattr(backend, f"finish_{case.operation.name}")
        finished = finish(outputs[0], workloads.LOW, workloads.HIGH).cpu()
        agreement.compare(case, "result", finished, expected[1])
    for name in set(case.operation.arguments) - {"workspace"}:
        agreement.compare(case, name, tensors[name].cpu(), made[name])


# --- Times ---------------------------------------------------------------------------------------


def times(device: torch.device, dry: bool, names: Sequence[str]) -> None:
    """Every case of the named implementations, and on a GPU the host time of its launch."""
    names = _present(device, names)
    sizes = DRY_SIZES if dry else workloads.SIZES
    cases, seconds = Cases(device), 0.05 if dry else 0.25
    for size in sizes.values():
        copy_rate = timing.copy_rate(size, device)
        for case in workloads.cases(device, [size], names):
            is_compiled = case.implementation == "torch.compile"
            needed = COMPILE_SECONDS if is_compiled else SECONDS_TO_SPARE

            def measured(case: Case = case, copy_rate: float = copy_rate) -> Iterator[Finding]:
                yield measure(case, device, copy_rate, seconds)

            cases.attempt(case.name, measured, needed)
            if device.type == "cuda" and size is workloads.SMALL and not is_compiled:
                host = f"{case.name}, host"
                cases.attempt(host, lambda case=case: [measure_host(case, device)])


def measure(case: Case, device: torch.device, copy_rate: float, seconds: float) -> Finding:
    """Check a case, then its time and its launches. Rates are in GB/s, 1e9 bytes a second."""
    calls = timing.rotating_calls(case, device, agreement.check_case(case, device))
    each = timing.seconds_per_call(calls, device, seconds)
    launches = None  # dispatch modes do not see into compiled code
    if device.type == "cuda" or case.implementation != "torch.compile":
        launches = timing.count_launches(calls[0], device)
    return make_row(case, each, copy_rate) | {"launches": launches, "sets": len(calls)}


def make_row(case: Case, seconds: float, copy_rate: float) -> Finding:
    """What follows from the time of one call."""
    rate = case.num_bytes / seconds / 1e9
    return {
        "kind": "time",
        "operation": case.operation.name,
        "implementation": case.implementation,
        "size": case.size.name,
        "shape": list(case.size.shape),
        "microseconds": seconds * 1e6,
        "passes": case.passes,
        "gb_per_s": rate,
        "copy_gb_per_s": copy_rate,
        "fraction_of_copy": rate / copy_rate,
        "stated_launches": case.operation.launches,
    }


def measure_host(case: Case, device: torch.device) -> Finding:
    """Host time of a launch."""
    seconds = timing.host_seconds(timing.rotating_calls(case, device), device)
    return {
        "kind": "host",
        "operation": case.operation.name,
        "implementation": case.implementation,
        "microseconds": seconds * 1e6,
    }
