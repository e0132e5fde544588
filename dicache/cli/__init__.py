"""The `dicache` command: `demo`, `generate`, `tune`, `bench`, `compare` and `info`.

`main` turns whatever the user can put right into one line on stderr and exit code 2; a mistake of
ours keeps its traceback. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: Arguments without the program's name; `None` takes those of the process.
    """
    from .errors import InputError, extra_hint, plain_warnings

    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal gets "?" for what it lacks
    try:
        from .app import run
    except ModuleNotFoundError as error:
        return _complain(extra_hint(error))
    with plain_warnings():
        try:
            return run(arguments or ["--help"])
        except InputError as error:
            return _complain(str(error))
        except ModuleNotFoundError as error:
            return _complain(extra_hint(error))


def _complain(message: str) -> int:
    print(f"dicache: {message}", file=sys.stderr)
    return 2
