"""The folder that a command writes its results to."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError, one_line


def make_folder(path: Path) -> Path:
    """Make a folder for results, before any work is done for them.

    Raises:
        InputError: There is a file of that name, or the folder cannot be made or written to.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; expected a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".dicache-write-test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try at the same time
    except OSError as error:
        raise InputError(f"--out {path} cannot be written to: {one_line(error)}") from error
    return path
