"""A folder of many pictures: a record of each, which of them are finished, and the manifest of all.

A picture is finished once its record says so, and every file is written under another name and then
renamed, the record last. So a process may be killed at any time, and processes may share the
folder, each with pictures of its own: what is half written is never taken for finished.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from dicache.demo.report import to_json

from .errors import InputError, one_line
from .files import make_folder
from .generate import write_output
from .prompts import Job

_PARTIAL = ".partial-"  # names of jobs begin with no dot


class Records:
    """The records of jobs in a folder, one file each.

    Args:
        folder: Of the pictures.
        settings: All that makes a picture beside its prompt and its seed.

    Raises:
        InputError: The folder cannot be written to; here, or wherever a record is written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = make_folder(folder)
        self._records = make_folder(folder / "records")
        self._settings = to_json(settings)
        # Not the process's number: containers that share a folder may have the same.
        self._partial = f"{_PARTIAL}{uuid.uuid4().hex[:8]}-"

    def remaining(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that are not finished: no record, another picture's, a failure's, or no picture."""
        return [job for job in jobs if not self._is_finished(job)]

    def replaced(self, jobs: Sequence[Job]) -> int:
        """How many of them have a picture of their name that was drawn with other settings."""
        return sum(
            bool(record.get("file")) and record["fingerprint"] != self._fingerprint(job)
            for job in jobs
            if (record := self._read(job)) is not None
        )

    def finish(self, job: Job, pictures: Tensor, facts: dict[str, Any]) -> str:
        """Write a picture or video, then its record; returns the file's name.

        Raises:
            OSError: It cannot be written. Nothing half-written is left.
            InputError: Its record cannot be written.
        """
        stem = self._partial + job.name
        try:
            partial = self.folder / write_output(self.folder, stem, pictures)
            file = partial.with_name(job.name + partial.name.removeprefix(stem))
            size = partial.stat().st_size
            self._path(job).unlink(missing_ok=True)  # it tells of a picture that goes now
            partial.replace(file)
        except BaseException:
            for left in self.folder.glob(self._partial + "*"):
                left.unlink(missing_ok=True)
            raise
        self._write(job, {"file": file.name, "bytes": size, "error": None, **facts})
        return file.name

    def fail(self, job: Job, error: str, facts: dict[str, Any]) -> None:
        """Write the record of a picture that could not be drawn."""
        self._write(job, {"file": None, "error": error, **facts})

    def write_manifest(self, jobs: Sequence[Job]) -> None:
        """Write the records of these jobs, as far as there are any, a line each."""
        records = ((job, self._read(job)) for job in jobs)
        lines = [
            to_json(record)
            for job, record in records
            if record is not None and record["fingerprint"] == self._fingerprint(job)
        ]
        self._write_whole(self.folder / "manifest.jsonl", "".join(line + "\n" for line in lines))

    def write_settings(self, more: dict[str, Any]) -> None:
        """Write the settings, and what else may be of use to people."""
        text = to_json({**json.loads(self._settings), **more}, indent=2)
        self._write_whole(self.folder / "settings.json", text + "\n")

    def clean(self) -> None:
        """Remove what killed processes left; for the only run in this folder."""
        for folder in (self.folder, self._records):
            for left in folder.glob(_PARTIAL + "*"):
                left.unlink(missing_ok=True)

    def _fingerprint(self, job: Job) -> str:
        text = json.dumps([self._settings, job.prompt, job.seed])
        return hashlib.sha256(text.encode()).hexdigest()

    def _is_finished(self, job: Job) -> bool:
        record = self._read(job)
        if record is None or not record.get("file"):
            return False
        if record["fingerprint"] != self._fingerprint(job):
            return False
        try:
            # A copy of the folder may have been broken off.
            return (self.folder / record["file"]).stat().st_size == record["bytes"]
        except OSError:
            return False

    def _path(self, job: Job) -> Path:
        return self._records / f"{job.name}.json"

    def _read(self, job: Job) -> dict[str, Any] | None:
        try:
            record = json.loads(self._path(job).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a machine that lost its power may leave anything
            return None
        return record if isinstance(record, dict) and "fingerprint" in record else None

    def _write(self, job: Job, facts: dict[str, Any]) -> None:
        about = {"name": job.name, "prompt": job.prompt, "seed": job.seed}
        record = {**about, **facts, "fingerprint": self._fingerprint(job)}
        self._write_whole(self._path(job), to_json(record) + "\n")

    def _write_whole(self, path: Path, text: str) -> None:
        partial = path.with_name(self._partial + path.name)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"{path} cannot be written: {one_line(error)}") from error


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. A process that is killed lets go of it.

    Raises:
        InputError: Another run has it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    with _open_lock(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--out {folder}: another run writes to it; wait for its end, or give another "
                f"folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def _open_lock(path: Path) -> TextIO:
    try:
        return open(path, "w")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {one_line(error)}") from error
