"""What a module's forward is computing in right now: a note that one part leaves for another.

A part that changes what the blocks of a model compute in the middle of a run announces it here, so
that a cache does not mix residuals of both kinds: a trajectory between a step with full attention
and one with sparse attention predicts neither. Whoever announces does so before the blocks run, in
every call. A module of which nothing was announced has the phase `None`.
"""

from __future__ import annotations

from torch import nn

_NAME = "_dicache_phase"  # among the module's own attributes: a look at it costs next to nothing


def announce(module: nn.Module, phase: str) -> None:
    """Say that `module`'s forward computes in `phase` from now on, as in `"dense"`, `"sparse"`."""
    vars(module)[_NAME] = phase


def current(module: nn.Module) -> str | None:
    """The phase that was announced last, or `None`."""
    return vars(module).get(_NAME)


def forget(module: nn.Module) -> None:
    """Take the note away, as when the part that announced it is removed."""
    vars(module).pop(_NAME, None)
