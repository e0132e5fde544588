"""What gpu.py asks of the operators: are they right, and how long do they take?

python benchmarks/operators.py --out DIR      the times alone, on a CPU: operators_cpu.md and .json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import agreement
import findings
import report
import tasks
import timing
import torch
import workloads
from cases import Cases
from stages import SKIP_CODE, Finding, Outcome
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


# --- On a CPU ------------------------------------------------------------------------------------


def main() -> None:
    """Every case that does not take minutes, and the table of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default=",".join(workloads.SIZES))
    parser.add_argument("--rounds", type=int, default=2, help="of all cases, one after the other")
    given = parser.parse_args()
    device = torch.device("cpu")
    found: dict[str, list[Finding]] = {}
    with torch.no_grad():
        for size in [workloads.SIZES[n] for n in given.sizes.split(",")] * given.rounds:
            copy_rate = timing.copy_rate(size, device)
            for case in workloads.cases(device, [size]):
                if not case.is_slow_on_cpu:
                    row = measure(case, device, copy_rate, 1.0)
                    found.setdefault(case.name, []).append(row)
    rows = [_fastest(each) for each in found.values()]
    load = f"{os.getloadavg()[0]:.1f} at the end, this run included"
    about = tasks.known_facts(device) | {"load": load}
    table = report.TABLES[0].markdown(
        findings.Findings([Outcome("times", "passed", results=rows)], dry=False)
    )
    told = "`python benchmarks/operators.py`; on a busy machine times are no result."
    facts = "\n".join(f"- {name}: {fact}" for name, fact in about.items())
    parts = ["# Operators on a CPU", told, facts, table, _HOW_TO_READ]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "operators_cpu.md").write_text("\n\n".join(parts) + "\n")
    stored = json.dumps({"about": about, "rows": rows}, indent=1)
    (given.out / "operators_cpu.json").write_text(stored + "\n")


def _fastest(rounds: Sequence[Finding]) -> Finding:
    """A case's fastest round, beside the fastest copy: what else ran in between spoils the less."""
    best = min(rounds, key=lambda row: row["microseconds"])
    copy_rate = max(row["copy_gb_per_s"] for row in rounds)
    return best | {"copy_gb_per_s": copy_rate, "fraction_of_copy": best["gb_per_s"] / copy_rate}


_HOW_TO_READ = """GB/s counts the passes of the column beside it, the fewest that are needed;
for `published` they are those that it makes. `of copy`: of torch's `copy_` at the same tensor size,
bytes read plus bytes written. `skipped_step` is probe_statistics and combine_residuals,
`skipped_step_default` is alignment_statistics and combine_residuals, which `probe_and_combine` is
in one call. Launches are operators dispatched by Python (views and allocations left out). What is
empty was not measured. Times are the fastest sample's of all rounds. The small size stays in the
cache: it shows the cost of a call."""

if __name__ == "__main__":
    main()
