"""Runs stages one after another in processes of their own, inside a limit each and a total budget.

A stage that fails, hangs or crashes does not stop the ones after it. What a stage has found out so
far is in its results file, one JSON object a line, so that a stage stopped half-way still counts.
A process that died of one of its cases (see cases.py) is followed by another one for the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOG_LIMIT = 1_000_000  # characters of one process's output that are kept
# What a stage prints when there is nothing for it to do here, before it leaves with this code.
SKIP_CODE = 77

Finding = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A command with a time limit.

    Attributes:
        name: Unique in a run.
        part: What it belongs to, for whoever wants only that.
        command: Program and arguments.
        limit_s: Seconds that it may take.
        environment: Added to this process's.
        skip: Why it is not run.
    """

    name: str
    part: str
    command: Sequence[str] = ()
    limit_s: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: str | None = None


@dataclass
class Outcome:
    """What became of a stage: passed, failed (...), timed out (...) or skipped: ..."""

    name: str
    status: str
    seconds: float = 0.0
    results: list[Finding] = field(default_factory=list)
    log: str = ""

    def of_kind(self, kind: str) -> list[Finding]:
        """What it found of one kind."""
        return [result for result in self.results if result["kind"] == kind]

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do in a later run."""
        return self.status == "passed" and not self.of_kind("left out")

    @property
    def failed(self) -> bool:
        """A goal that was missed is a finding, not a failure."""
        return self.status.startswith(("failed", "timed out"))


def run_stages(
    stages: Sequence[Stage],
    budget_s: float,
    folder: Path,
    report: Callable[[list[Outcome]], None] = lambda outcomes: None,
    earlier: Sequence[Outcome] = (),
) -> list[Outcome]:
    """Run the stages in `folder`; `report` gets all outcomes so far after every stage.

    Stages that an `earlier` run completed are not run again; in others, finished cases are not.
    """
    end = time.monotonic() + budget_s
    before = {outcome.name: outcome for outcome in earlier}
    outcomes = list(before.values())
    for stage in stages:
        known = before.get(stage.name)
        if known is not None and known.is_complete:
            continue
        ended = {result["case"] for result in known.of_kind("ended")} if known else set()
        kept = [result for result in known.results if result.get("case") in ended] if known else []
        outcome = _run(stage, min(stage.limit_s, end - time.monotonic()), folder, kept)
        outcomes = [each for each in outcomes if each.name != stage.name] + [outcome]
        report(outcomes)
    return outcomes


def _run(stage: Stage, allowed: float, folder: Path, kept: Sequence[Finding]) -> Outcome:
    outcome = Outcome(stage.name, f"skipped: {stage.skip}", results=list(kept))
    if stage.skip is not None:
        return outcome
    start = time.monotonic()
    outcome.status = "skipped: no time left in the budget"
    while (left := start + allowed - time.monotonic()) >= 1:
        tried = {result["case"] for result in outcome.of_kind("begun")}
        outcome.status, found, log = _run_process(stage, left, folder, sorted(tried))
        outcome.results += found
        outcome.log += log
        begun = {result["case"] for result in outcome.of_kind("begun")}
        if not outcome.status.startswith("failed") or begun == tried:
            break
    outcome.seconds = time.monotonic() - start
    _conclude(outcome)
    return outcome


def _conclude(outcome: Outcome) -> None:
    """Cases that a process died of are errors, and errors are failures of the stage."""
    ended = {each["case"] for kind in ("ended", "error") for each in outcome.of_kind(kind)}
    for case in dict.fromkeys(each["case"] for each in outcome.of_kind("begun")):
        if case not in ended:
            text = f"its process ended: {outcome.status}"
            outcome.results.append({"kind": "error", "case": case, "error": text})
    errors = len(outcome.of_kind("error"))
    if outcome.status == "passed" and errors:
        outcome.status = f"failed ({errors} cases)"


def _run_process(
    stage: Stage, allowed: float, folder: Path, tried: Sequence[str]
) -> tuple[str, list[Finding], str]:
    """Status, findings and output of one process."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as output:
        results = Path(scratch) / "results.jsonl"
        environment = {
            **os.environ,
            **stage.environment,
            "STAGE_RESULTS": str(results),
            "STAGE_SECONDS": f"{allowed:.1f}",
            "STAGE_TRIED": json.dumps(tried),
        }
        status = _wait(stage.command, allowed, folder, environment, output)
        output.seek(0)
        log = output.read().decode(errors="replace")
        return status, _read_results(results), _shortened(log)


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


def _read_results(path: Path) -> list[Finding]:
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
