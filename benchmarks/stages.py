"""Runs stages one after another in processes of their own, inside a limit each and a total budget.

A stage that fails, hangs or crashes does not stop the ones after it. What a stage has found out so
far is in its results file, one JSON object a line, so that a stage stopped half-way still counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOG_LIMIT = 1_000_000  # characters of one stage's output that are kept
# What a stage prints when there is nothing for it to do here, before it leaves with this code.
SKIP_CODE = 77


def importable(folder: Path) -> dict[str, str]:
    """Environment in which a stage can import what lies in `folder`, installed or not."""
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(folder) + (os.pathsep + given if given else "")}


@dataclass(frozen=True)
class Stage:
    """A command with a time limit; `reserve_s` is what earlier stages have to leave for it."""

    name: str
    command: Sequence[str] = ()
    limit_s: float = 60.0
    reserve_s: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: str | None = None  # why it is not run


@dataclass
class Outcome:
    """What became of a stage: passed, failed (...), timed out (...) or skipped: ..."""

    name: str
    status: str
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""

    @property
    def passed(self) -> bool:
        """Ran to its end with exit code 0."""
        return self.status == "passed"


def make_parser(description: str, budget_s: float, per: str = "in all") -> argparse.ArgumentParser:
    """The options of a script that measures on a GPU and also runs tiny on a CPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=budget_s, help=f"seconds {per}")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and refuse a GPU that is not there."""
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not has_gpu():
        parser.error(
            "torch sees no CUDA device. Run this on a machine with an NVIDIA GPU and a CUDA build "
            "of torch, or with --device cpu for the same code at a tiny size."
        )
    return args


def run_stages(
    stages: Sequence[Stage],
    budget_s: float,
    folder: Path,
    report: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the stages in `folder`; `report` gets all outcomes so far after every stage."""
    end = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for index, stage in enumerate(stages):
        reserved = sum(later.reserve_s for later in stages[index + 1 :] if later.skip is None)
        allowed = min(stage.limit_s, end - time.monotonic() - reserved)
        outcomes.append(_run(stage, allowed, folder))
        report(outcomes)
    return outcomes


def tell(outcome: Outcome, write_report: Callable[[], None]) -> None:
    """Print what became of a stage and report; a bad report does not end the measurements."""
    print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
    try:
        write_report()
    except Exception:
        traceback.print_exc()


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if no stage failed; a goal that was missed is a finding, not a failure."""
    return int(any(o.status.startswith(("failed", "timed out")) for o in outcomes))


def results_of(outcomes: Sequence[Outcome], kind: str) -> list[dict[str, Any]]:
    """What stages emitted of one kind, without saying the kind again."""
    return [
        {key: value for key, value in result.items() if key != "kind"}
        for outcome in outcomes
        for result in outcome.results
        if result.get("kind") == kind
    ]


def verdict(measured: float | None, wanted: float, at_least: bool) -> str:
    """met, missed or not measured."""
    if measured is None:
        return "not measured"
    return "met" if (measured >= wanted if at_least else measured <= wanted) else "missed"


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def _run(stage: Stage, allowed: float, folder: Path) -> Outcome:
    if stage.skip is not None:
        return Outcome(stage.name, f"skipped: {stage.skip}")
    if allowed < 1:
        return Outcome(stage.name, "skipped: no time left in the budget")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.jsonl"
        environment = {
            **os.environ,
            **stage.environment,
            "STAGE_RESULTS": str(results),
            "STAGE_SECONDS": f"{allowed:.1f}",
        }
        with tempfile.TemporaryFile() as output:
            status = _wait(stage.command, allowed, folder, environment, output)
            output.seek(0)
            log = output.read().decode(errors="replace")
        found = _read_results(results)
    return Outcome(stage.name, status, time.monotonic() - start, found, _shortened(log))


def _wait(
    command: Sequence[str],
    allowed: float,
    folder: Path,
    environment: Mapping[str, str],
    output: Any,
) -> str:
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that compilers it started end with it
        )
    except OSError as error:
        return f"failed ({error})"
    try:
        code = process.wait(allowed)
    except subprocess.TimeoutExpired:
        return f"timed out ({allowed:.0f} s)"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code == SKIP_CODE:
        return "skipped: nothing for it to do here"
    return "passed" if code == 0 else f"failed (exit code {code})"


def _read_results(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a stage that was stopped
            found.append(json.loads(line))
    return found


def _shortened(log: str) -> str:
    if len(log) <= _LOG_LIMIT:
        return log
    half = _LOG_LIMIT // 2
    return f"{log[:half]}\n... {len(log) - _LOG_LIMIT} characters left out ...\n{log[-half:]}"


def emit(result: Mapping[str, Any]) -> None:
    """Inside a stage: keep this result, whatever happens next."""
    line = json.dumps(result)
    print(line, flush=True)
    path = os.environ.get("STAGE_RESULTS")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


class Deadline:
    """Inside a stage: how much of its time is left."""

    def __init__(self) -> None:
        self._end = time.monotonic() + float(os.environ.get("STAGE_SECONDS", "inf"))

    def left(self) -> float:
        """Seconds; infinite outside a stage."""
        return self._end - time.monotonic()
