"""The folder that a command writes its results to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import InputError, note, one_line

# What `demo` and `generate` call their files, without endings.
_RESULTS = {
    *("animation", "comparison", "dicache", "heads", "output"),
    *("schedule", "sparse", "stats", "uncached"),
}


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


def write_results(folder: Path, write: Callable[[Path], None]) -> list[str]:
    """Have a run's files written into a folder, all or none; returns their names.

    They are moved there once they are whole, so that a full disk spoils no file of an earlier run.
    What cannot be written there goes to a folder for temporary files, as hours of work may be in
    it. Files that an earlier run left, and this one does not replace, are told.

    Args:
        folder: Where they belong.
        write: Writes them into the folder that it is given; may be called twice.

    Raises:
        InputError: The folder cannot be written to.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".dicache-", dir=folder) as partial:
            write(Path(partial))
            files = sorted(Path(partial).iterdir())
            for file in files:
                file.replace(folder / file.name)
    except OSError as error:
        reason = f"--out {folder} cannot be written to: {one_line(error)}"
        raise InputError(f"{reason}; {write_elsewhere(write)}") from error
    names = [file.name for file in files]
    left = [
        path.name
        for path in sorted(folder.iterdir())
        if path.stem in _RESULTS and path.name not in names
    ]
    if left:
        note(f"{folder}: {', '.join(left)}: left from an earlier run")
    return names


def write_elsewhere(write: Callable[[Path], None]) -> str:
    """Have files that had no place written to a new folder for temporary ones; returns where."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="dicache-"))
    except OSError:
        return "nor is there a folder for temporary files"
    try:
        write(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return f"nor can {folder}: {one_line(error)}"
    return f"the files are in {folder}"
