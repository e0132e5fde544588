"""How the command line speaks about trouble: one line each, written for the person who reads it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dicache import DiCacheWarning

# What the extra `cli` brings, by import name, and what torch never brings along.
_EXTRAS = {
    "PIL",
    "accelerate",
    "diffusers",
    "imageio",
    "matplotlib",
    "numpy",
    "rich",
    "safetensors",
    "torchmetrics",
    "transformers",
    "typer",
}
_LONGEST_LINE = 400


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line to print."""


def one_line(error: BaseException | str) -> str:
    """An error's message without line breaks, cut where it becomes a page."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 3] + "..."


def note(text: str) -> None:
    """Tell what may surprise, on stderr; the command goes on."""
    print(f"dicache: warning: {text}", file=sys.stderr)


def extra_hint(error: ModuleNotFoundError) -> str:
    """Which extra to install for the module that is missing.

    Raises:
        ModuleNotFoundError: The module belongs to none; `error` itself.
    """
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        raise error
    return f"the command line needs {package}, which is not installed: pip install 'dicache[cli]'"


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of this package as one line, once, without file and source line."""
    usual = warnings.showwarning
    told = set()

    def show(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, DiCacheWarning):
            if str(message) not in told:  # a command puts the cache on several times
                note(one_line(str(message)))
            told.add(str(message))
        else:
            usual(message, category, *place, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DiCacheWarning)
        warnings.showwarning = show
        yield
