"""Everything that only a GPU can tell, in one command, the most important parts first.

    python benchmarks/gpu.py --out DIR                  a machine with an NVIDIA GPU
    python benchmarks/gpu.py --out DIR --only times     some of the parts, or stages, by name
    python benchmarks/gpu.py --out DIR --dry-run        the same code on a CPU, at tiny sizes

Parts: build, tests, times (operators), pipelines (cached runs against ideal ones), sparse
(Sparse VideoGen at 720p), sanitizers, compiled (a pipeline under torch.compile).
Needs torch, diffusers, Triton, nvcc, ninja, pybind11 and pytest; no network, no weights, and
nothing is installed: the extensions are built in place. Every stage is a process with a time limit.
What is found is written as it comes, to gpu.json, gpu.md and gpu.log. The same command goes on
where an earlier one of the same sources on the same machine ended. The exit code is 0 if no stage
failed; a missed goal is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import report
from findings import BACKENDS
from stages import Outcome, Stage, run_stages

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 540.0
NO_GPU = "no CUDA device"
PARTS = ("build", "tests", "times", "pipelines", "sparse", "sanitizers", "compiled")
TOOLS = ("memcheck", "racecheck", "initcheck")
MODELS = {"flux": 120, "wan": 150, "hunyuan-video": 200}  # and the seconds that they may take
# A process each: an illegal memory access in one backend ends every CUDA call of its process.
TIMED = (["cuda"], ["triton"], ["published", "reference"], ["torch.compile"])
DRY_TIMED = (["cpp", "published", "reference"],)


class Planner:
    """The stages of a run, in order of importance; what cannot run here says so."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        given = os.environ.get("PYTHONPATH")
        # Stages import what lies here, installed or not.
        self.environment = {"PYTHONPATH": str(ROOT) + (os.pathsep + given if given else "")}
        if dry:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""  # also where a GPU is

    def facts(self) -> Stage:
        """What figures have to agree in to stand in one report."""
        return self._task("facts", "facts", ["facts"], 60)

    def stages(self) -> list[Stage]:
        """All others."""
        stages = [self._build(), self._task("backends", "build", ["backends"], 60), self._tests()]
        for names in DRY_TIMED if self.dry else TIMED:
            limit = 150 if "torch.compile" in names else 90
            stages.append(self._task(f"times {' '.join(names)}", "times", ["times", *names], limit))
        flux, *others = (
            self._task(model, "pipelines", ["compare", model], limit)
            for model, limit in MODELS.items()
        )
        stages += [flux, self._task("attention", "sparse", ["attention"], 130)]
        stages += [self._sanitizer(tool, backend) for tool in TOOLS for backend in BACKENDS]
        stages += [*others, self._task("steps", "sparse", ["steps"], 250)]
        compiled = ["compare", "flux", "compiled"]
        stages.append(self._task("flux compiled", "compiled", compiled, 150))
        return stages

    def _task(
        self,
        name: str,
        part: str,
        arguments: Sequence[str],
        limit_s: float,
        skip: str | None = None,
    ) -> Stage:
        command = [sys.executable, str(Path(__file__).with_name("tasks.py")), *arguments]
        command += ["--dry-run"] if self.dry else []
        return Stage(name, part, command, limit_s, self.environment, skip)

    def _missing(self, program: str) -> str | None:
        if self.dry:
            return NO_GPU
        return None if shutil.which(program) else f"{program} is not on the PATH"

    def _build(self) -> Stage:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        skip = NO_GPU if self.dry else None
        return Stage("build", "build", command, 240, {"DICACHE_BUILD": "cuda"}, skip)

    def _tests(self) -> Stage:
        files = [
            path
            for path in sorted((ROOT / "tests").glob("test_*.py"))
            if "pytest.mark.gpu" in path.read_text() and path.name != "test_gpu_script.py"
        ]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += map(str, files)
        skip = NO_GPU if self.dry else None
        return Stage("tests", "tests", command, 180, self.environment, skip)

    def _sanitizer(self, tool: str, backend: str) -> Stage:
        name, skip = f"{tool} {backend}", self._missing("compute-sanitizer")
        stage = self._task(name, "sanitizers", ["exercise", backend], 45, skip)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *stage.command]
        # Torch's caching allocator would hide reads beyond a tensor's end.
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(name, stage.part, command, stage.limit_s, environment, skip)


def note_tests(outcome: Outcome) -> None:
    """Keep the last line that pytest printed, its count: tests that skipped have not passed."""
    lines = outcome.log.strip().splitlines()
    if outcome.name == "tests" and lines:
        outcome.results.append({"kind": "tests", "counts": lines[-1]})


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--only", nargs="+", help=f"stages, or parts: {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds in all")
    args = parser.parse_args(arguments)
    if not args.dry_run and not has_gpu():
        parser.error(
            "torch sees no CUDA device. Run this on a machine with an NVIDIA GPU and a CUDA build "
            "of torch, or with --dry-run for the same code at tiny sizes on the CPU."
        )
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, and write the report after every stage."""
    args = parse(arguments)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/gpu.py", *given])
    planner = Planner(args.dry_run)
    stages = chosen(planner.stages(), args.only)

    def write(outcomes: list[Outcome]) -> None:
        outcome = outcomes[-1]
        note_tests(outcome)
        told = f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s"
        print(told, flush=True)
        with (out / "gpu.log").open("a") as log:
            log.write(f"===== {told} =====\n{outcome.log}\n")
        try:
            report.write(outcomes, out, command, args.dry_run)
        except Exception:  # a bad report does not end the measurements
            traceback.print_exc()

    (facts,) = run_stages([planner.facts()], args.budget, ROOT)
    earlier = report.read(out, args.dry_run)
    if not earlier or earlier[0].of_kind("facts") != facts.of_kind("facts"):
        earlier = []
    left = args.budget - facts.seconds
    outcomes = run_stages(stages, left, ROOT, write, [facts, *earlier[1:]])
    report.write(outcomes, out, command, args.dry_run)
    print((out / "gpu.md").read_text())
    return int(any(outcome.failed for outcome in outcomes))


def chosen(stages: Sequence[Stage], only: Sequence[str] | None) -> list[Stage]:
    """All stages, or those that are asked for, which may then take all the time that there is.

    Raises:
        SystemExit: There is no such part or stage.
    """
    if only is None:
        return list(stages)
    unknown = set(only) - {name for stage in stages for name in (stage.name, stage.part)}
    if unknown:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    found = [stage for stage in stages if {stage.name, stage.part} & set(only)]
    return [dataclasses.replace(stage, limit_s=math.inf) for stage in found]


if __name__ == "__main__":
    sys.exit(main())
