"""Inside a stage: findings are kept as they are made, and a case that fails costs its own row only.

Findings are JSON objects with a `kind`. Those of a case name it; between "begun" and "ended" stands
what it found. A later process of the stage does not try again what an earlier one has begun.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

_NO_LIMIT_SECONDS = 1e6


def emit(kind: str, **finding: Any) -> None:
    """Keep this finding, whatever happens next."""
    line = json.dumps({"kind": kind, **finding})
    print(line, flush=True)
    path = os.environ.get("STAGE_RESULTS")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


class Cases:
    """The cases of a stage, tried one after another while there is time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._end = time.monotonic() + float(os.environ.get("STAGE_SECONDS", _NO_LIMIT_SECONDS))
        self._tried = set(json.loads(os.environ.get("STAGE_TRIED", "[]")))

    def left(self) -> float:
        """Seconds of the stage's time that are left."""
        return self._end - time.monotonic()

    def is_new(self, case: str) -> bool:
        """Whether no earlier process has tried this case."""
        return case not in self._tried

    def attempt(
        self,
        case: str,
        measure: Callable[[], Iterable[dict[str, Any]]],
        needs_s: float = 10.0,
        optional: bool = False,
    ) -> None:
        """Measure, and keep each finding as it comes, if there is time for it.

        Args:
            case: Unique in the stage.
            measure: Gives findings, each with its kind, and raises where a result is wrong.
            needs_s: Seconds that have to be left.
            optional: A device need not be able to run it: a RuntimeError is no failure.

        Raises:
            RuntimeError: The case broke the device for this process, which then has to end.
        """
        if not self.is_new(case):
            return
        if self.left() < needs_s:
            emit("left out", case=case)
            return
        emit("begun", case=case)
        try:
            with torch.no_grad():
                for finding in measure():
                    emit(**finding, case=case)
        except Exception as error:  # one broken case must not hide the others
            text = f"{type(error).__name__}: {error}"[:2000]
            if optional and isinstance(error, RuntimeError):
                emit("absent", case=case, reason=text.partition("\n")[0])
                emit("ended", case=case)
            else:
                emit("error", case=case, error=text)
        else:
            emit("ended", case=case)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
