"""How fast is Sparse VideoGen, alone and with DiCache? HunyuanVideo at 720p, random weights.

    python benchmarks/sparse.py --out DIR                   a machine with a GPU, under 9 minutes
    python benchmarks/sparse.py --out DIR --device cpu      the same code at a tiny size, a minute

Attention alone, one block of each kind, and the steps of the whole model that 50 of {dense, sparse,
DiCache, both} are put together from. Needs torch and diffusers; no network, no weights. The
extensions are used as they are: build them first (`python setup.py build_ext --inplace`). Every
stage is a process with a time limit, and what is there when time runs out is in the report:
sparse.md, .json and .log. The exit code is 0 if no stage failed; a missed goal is a finding, not a
failure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import sparse_report
from stages import Outcome, Stage, exit_code, importable, make_parser, parse, run_stages, tell

FOLDER = Path(__file__).resolve().parent
BUDGET_SECONDS = 530.0


def plan(device: str, environment: dict[str, str]) -> list[Stage]:
    """All stages in order; the blocks are last, because no goal is about them."""

    def stage(name: str, limit_s: float, reserve_s: float = 0.0) -> Stage:
        command = [sys.executable, str(FOLDER / "sparse_tasks.py"), *name.split()]
        command += ["--device", device]
        return Stage(name, command, limit_s, reserve_s, environment)

    facts = [sys.executable, str(FOLDER / "gpu_tasks.py"), "environment"]
    found = [Stage("environment", facts, 60, environment=environment)]
    if device == "cpu":  # in one process: most of their time is that of imports
        return [*found, stage("attention stack blocks", 300)]
    return [*found, stage("attention", 130), stage("stack", 320, 240), stage("blocks", 200, 70)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages and write the report."""
    args = parse(make_parser(__doc__.splitlines()[0], BUDGET_SECONDS), arguments)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/sparse.py", *given])
    tiny = args.device == "cpu"

    def report(outcomes: list[Outcome]) -> None:
        tell(outcomes[-1], lambda: sparse_report.write(outcomes, out, command, tiny))

    environment = importable(FOLDER.parent)
    if tiny:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # also where a GPU is
    outcomes = run_stages(plan(args.device, environment), args.budget, FOLDER.parent, report)
    sparse_report.write(outcomes, out, command, tiny)
    print((out / "sparse.md").read_text())
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
