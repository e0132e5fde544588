"""Build, test, sanitize and time the operators on a machine with an NVIDIA GPU, in one command.

    python benchmarks/gpu.py --out DIR                    under 9 minutes
    python benchmarks/gpu.py --out DIR --prebuilt FILE    load-check a `_C` library built elsewhere
    python benchmarks/gpu.py --out DIR --dry-run          the same code on a CPU, under a minute

Needs torch, Triton, nvcc, ninja, pybind11 and pytest; no network, and nothing is installed: the
extensions are built in place. Every stage is a process with a time limit, and what is there when
time runs out is in the report: gpu.md, gpu.json, gpu.log (the stages' output) and gpu.png. The exit
code is 0 if no stage failed; a missed goal is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import gpu_report
from stages import Outcome, Stage, exit_code, has_gpu, importable, run_stages, tell

ROOT = Path(__file__).resolve().parents[1]
TASKS = str(Path(__file__).resolve().parent / "gpu_tasks.py")
BUDGET_SECONDS = 520.0
NO_GPU = "no CUDA device"
BACKENDS = gpu_report.BACKENDS
TOOLS = ("memcheck", "racecheck", "initcheck")


def plan(dry: bool, prebuilt: Path | None, scratch: Path) -> list[Stage]:
    """All stages in order; what cannot run here says so."""
    facts = Stage("environment", _task("environment"), 60, environment=importable(ROOT))
    status = Stage("backends", _task("backends"), 60, environment=importable(ROOT))
    return [
        facts,
        _build_stage(dry),
        status,
        _prebuilt_stage(prebuilt, scratch),
        _tests_stage(dry, scratch),
        *(_sanitizer_stage(tool, backend, dry) for backend in BACKENDS for tool in TOOLS),
        *(_dry_bench_stages() if dry else _bench_stages()),
        # Last, because nothing depends on it and the counters may be out of reach.
        *(_bytes_stage(backend, dry) for backend in BACKENDS),
    ]


def _bench_stages() -> list[Stage]:
    # A process each: an illegal memory access in one backend ends every CUDA call of its process.
    return [
        _bench_stage("bench", ["cuda"], 90, 50),
        _bench_stage("bench", ["triton"], 90, 50),
        _bench_stage("bench", ["published", "reference"], 90, 50),
        _bench_stage("bench", ["torch.compile"], 150, 0),
    ]


def _dry_bench_stages() -> list[Stage]:
    return [_bench_stage("dry-bench", ["cpp", "published", "reference"], 90, 50)]


def _bench_stage(task: str, names: list[str], limit_s: float, reserve_s: float) -> Stage:
    name = " ".join(["bench", *names])
    return Stage(name, _task(task, *names), limit_s, reserve_s, importable(ROOT))


def _bytes_stage(backend: str, dry: bool) -> Stage:
    skip = NO_GPU if dry else _missing("ncu")
    command = _task("count-bytes", backend)
    return Stage(f"bytes {backend}", command, 45, 15, importable(ROOT), skip)


def _task(*arguments: str) -> list[str]:
    return [sys.executable, TASKS, *arguments]


def _missing(program: str) -> str | None:
    return None if shutil.which(program) else f"{program} is not on the PATH"


def _build_stage(dry: bool) -> Stage:
    return Stage(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        180,
        environment={"DICACHE_BUILD": "cuda"},
        skip="dry run" if dry else None,
    )


def _prebuilt_stage(prebuilt: Path | None, scratch: Path) -> Stage:
    if prebuilt is None:
        return Stage("prebuilt", skip="no --prebuilt given")
    # The package without what was built here, and the given library in its place.
    copy = scratch / "prebuilt" / "dicache"
    ignored = shutil.ignore_patterns("_C*", "_build_info*", "__pycache__", "demo", "cli")
    shutil.copytree(ROOT / "dicache", copy, ignore=ignored)
    shutil.copyfile(prebuilt, copy / f"_C{prebuilt.suffix}")
    return Stage("prebuilt", _task("check-cpp"), 60, environment=importable(copy.parent))


def _tests_stage(dry: bool, scratch: Path) -> Stage:
    files = sorted((ROOT / "tests").glob("test_operators*.py"))
    files += sorted((ROOT / "tests").glob("test_triton*.py"))
    files.append(ROOT / "tests" / "test_session.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [f"--junitxml={scratch / 'tests.xml'}", *map(str, files)]
    environment = importable(ROOT)
    skip = NO_GPU if dry else None if files else "there is no test of the operators"
    return Stage("tests", command, 150, environment=environment, skip=skip)


def _sanitizer_stage(tool: str, backend: str, dry: bool) -> Stage:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    command += _task("exercise", backend)
    # Torch's caching allocator would hide reads beyond a tensor's end.
    environment = {**importable(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    skip = NO_GPU if dry else _missing("compute-sanitizer")
    return Stage(f"{tool} {backend}", command, 45, environment=environment, skip=skip)


def count_tests(outcomes: list[Outcome], report: Path) -> None:
    """Add passed, failed and skipped tests of each backend to the tests' outcome.

    A test belongs to the backend that its name or its file's names.
    """
    outcome = next((o for o in outcomes if o.name == "tests"), None)
    if outcome is None or outcome.results or not report.exists():
        return
    counts: dict[str, dict[str, int]] = {}
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{test.get('classname')} {test.get('name')}"
        backend = next((key for key in ("triton", "cuda") if key in name), "other")
        tags = {child.tag for child in test}
        result = "failed" if tags & {"failure", "error"} else "skipped" if tags else "passed"
        counts.setdefault(backend, {}).setdefault(result, 0)
        counts[backend][result] += 1
    for backend, numbers in counts.items():
        text = ", ".join(f"{number} {result}" for result, number in numbers.items())
        outcome.results.append({"kind": "tests", "backend": backend, "counts": text})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--prebuilt", type=Path, help="a _C library built with another torch")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds in all")
    args = parser.parse_args(arguments)
    if args.prebuilt is not None and not args.prebuilt.is_file():
        parser.error(f"--prebuilt {args.prebuilt}: there is no such file.")
    if not args.dry_run and not has_gpu():
        parser.error(
            "torch sees no CUDA device. Run this on a machine with an NVIDIA GPU and a CUDA build "
            "of torch, or with --dry-run for the same code at tiny sizes on the CPU."
        )
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages and write the report."""
    args = parse(arguments)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/gpu.py", *given])
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a dry run is one on a CPU also where a GPU is
    with tempfile.TemporaryDirectory() as scratch:

        def report(outcomes: list[Outcome]) -> None:
            count_tests(outcomes, Path(scratch) / "tests.xml")
            tell(outcomes[-1], lambda: gpu_report.write(outcomes, out, command, args.dry_run))

        stages = plan(args.dry_run, args.prebuilt, Path(scratch))
        outcomes = run_stages(stages, args.budget, ROOT, report)
    gpu_report.write(outcomes, out, command, args.dry_run)
    gpu_report.write_plot(outcomes, out / "gpu.png", args.dry_run)
    print((out / "gpu.md").read_text())
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
