"""The warning of this package, and the line that it is about."""

from __future__ import annotations

import sys
import warnings

_PACKAGE = __name__.partition(".")[0]


class DiCacheWarning(UserWarning):
    """The cache computed where it would rather have decided; the message says why."""


def warn_user(message: str) -> None:
    """Warn at the line outside of this package that asked for something, or called a model.

    Python shows a warning of one line once, unless its filters say otherwise.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DiCacheWarning, stacklevel=level + 1)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE
