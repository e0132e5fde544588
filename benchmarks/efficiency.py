"""How close is a cached run to one whose cache costs nothing? Real pipelines, random weights.

    python benchmarks/efficiency.py --out DIR                   FLUX.1, Wan 2.1 and HunyuanVideo
    python benchmarks/efficiency.py --out DIR --models flux     one of them
    python benchmarks/efficiency.py --out DIR --device cpu      the same code, tiny models, a minute

Needs torch and diffusers, and for the picture matplotlib; no network, no weights. The extensions
are used as they are: build them first (`python setup.py build_ext --inplace`). A model is measured
in a process of its own within `--budget` seconds, and what is there when time runs out is in the
report: efficiency.md, .json, .log and .png. The exit code is 0 if no stage failed, those that only
explore aside; a missed goal is a finding, not a failure.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import efficiency_report
from stages import Outcome, Stage, exit_code, importable, make_parser, parse, run_stages, tell

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
MODELS = ("flux", "wan", "hunyuan-video")
BUDGET_SECONDS = 540.0
EXPLORE = "explore"  # how the names of stages begin that only explore
GRAPH_SECONDS = 60.0
COMPILE_SECONDS = 120.0  # what has to be left for torch.compile
WORTH_ANOTHER_PROCESS = 60.0

Report = Callable[[Outcome], None]


def run_facts(environment: dict[str, str], report: Report) -> None:
    """Hardware, versions and backends."""
    for task in ("environment", "backends"):
        _run(Stage(task, _command("gpu_tasks.py", task), 60, environment=environment), 60, report)


def run_model(
    name: str, device: str, budget_s: float, environment: dict[str, str], report: Report
) -> None:
    """All measurements of a model, in another process where one took its own along."""
    end = time.monotonic() + budget_s
    reserve = GRAPH_SECONDS if device == "cuda" else 0.0
    tried: list[str] = []
    while True:
        label = f"{name} without {', '.join(tried)}" if tried else name
        command = _command("efficiency_tasks.py", "measure", name, "--device", device)
        command += ["--without", *tried] if tried else []
        left = end - time.monotonic() - reserve
        outcome = _run(Stage(label, command, left, environment=environment), left, report)
        begun = [row["implementation"] for row in outcome.results if row.get("kind") == "begun"]
        tried += begun
        left = end - time.monotonic() - reserve
        if outcome.passed or not begun or left < WORTH_ANOTHER_PROCESS:
            break
    for task, needed in (("graph", 0.0), ("compile", COMPILE_SECONDS)):
        left = end - time.monotonic()
        skip = None if device == "cuda" else "no CUDA device"
        if skip is None and left < needed:
            skip = f"less than {needed:.0f} s left"
        command = _command("efficiency_tasks.py", task, name, "--device", device)
        limit = GRAPH_SECONDS if task == "graph" else left
        stage = Stage(
            f"{EXPLORE} {name} {task}", command, limit, environment=environment, skip=skip
        )
        _run(stage, left, report)


def _run(stage: Stage, budget_s: float, report: Report) -> Outcome:
    (outcome,) = run_stages([stage], budget_s, ROOT)
    report(outcome)
    return outcome


def _command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(FOLDER / script), *arguments]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages and write the report."""
    parser = make_parser(__doc__.splitlines()[0], BUDGET_SECONDS, "a model")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parse(parser, arguments)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/efficiency.py", *given])
    tiny = args.device == "cpu"
    outcomes: list[Outcome] = []
    write = functools.partial(efficiency_report.write, outcomes, args.models, out, command, tiny)

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        tell(outcome, write)

    environment = importable(ROOT)
    if tiny:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # also where a GPU is
    run_facts(environment, report)
    for name in args.models:
        run_model(name, args.device, args.budget, environment, report)
    write()
    print((out / "efficiency.md").read_text())
    return exit_code([outcome for outcome in outcomes if not outcome.name.startswith(EXPLORE)])


if __name__ == "__main__":
    sys.exit(main())
