"""Groups of processes for tests: each runs `rank_worker.py`, and none outlives its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass
class Rank:
    """What became of one process.

    Attributes:
        code: Its exit code; negative is a signal.
        seen: What its checks saw, by name.
        errors: What it wrote to stderr.
    """

    code: int
    seen: dict[str, Any]
    errors: str


class Group:
    """Processes that share a store in a folder, and run checks by their names.

    Args:
        folder: An empty one.
        checks: Names, with an argument behind a colon.
        size: Number of processes.
        patience: How long one waits for another, in seconds.
    """

    def __init__(
        self, folder: Path, checks: list[str], size: int = 2, patience: float = 20.0
    ) -> None:
        self._folder = folder
        paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PATIENCE": str(patience),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self.processes = []
        for rank in range(size):
            command = [sys.executable, HERE / "rank_worker.py", rank, size, folder, *checks]
            with open(folder / f"{rank}.err", "wb") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [*map(str, command)], stdout=errors, stderr=errors, env=environment
                    )
                )

    def wait(self, timeout: float) -> list[Rank]:
        """What became of all of them; those that are not done in that time are killed."""
        try:
            for process in self.processes:
                process.wait(timeout)
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return [self._seen_by(rank) for rank in range(len(self.processes))]

    def _seen_by(self, rank: int) -> Rank:
        path = self._folder / f"{rank}.json"
        seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        errors = (self._folder / f"{rank}.err").read_text(encoding="utf-8", errors="replace")
        return Rank(self.processes[rank].returncode, seen, errors)
