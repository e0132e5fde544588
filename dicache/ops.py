"""The caching path as functions: which implementation of the operators runs, and which could.

Engine writers import this module. Every backend implements the functions of `dicache.reference`
with the same signatures; that module is their documentation (formulas, shapes, dtypes).
`"auto"` takes the fastest backend that is built and runs on the tensors' device. Today there is
one backend, the plain PyTorch reference; compiled ones register here.
"""

from __future__ import annotations

from types import ModuleType

from . import reference
from .reference import (
    alignment_statistics,
    combine_residuals,
    finish_alignment_statistics,
    finish_probe_statistics,
    probe_statistics,
    record_residuals,
)

__all__ = [
    "alignment_statistics",
    "backend_status",
    "combine_residuals",
    "finish_alignment_statistics",
    "finish_probe_statistics",
    "probe_statistics",
    "record_residuals",
    "resolve_backend",
]

_BACKENDS: dict[str, ModuleType] = {"reference": reference}
_ABSENT = {
    "cpp": "no compiled CPU operators in this version",
    "cuda": "no compiled CUDA operators in this version",
    "triton": "no Triton operators in this version",
}


def backend_status() -> dict[str, str]:
    """For every backend name `"available"`, or the reason why it is not."""
    return {**dict.fromkeys(_BACKENDS, "available"), **_ABSENT}


def resolve_backend(name: str) -> ModuleType:
    """The module that implements the operators for `name` (see `DiCacheConfig.backend`).

    Raises:
        ValueError: The backend is not there; the message says why and what is.
    """
    if name == "auto":
        return reference
    if name not in _BACKENDS:
        reason = _ABSENT.get(name, "there is no backend of this name")
        available = ", ".join(("auto", *_BACKENDS))
        raise ValueError(f"backend={name!r} cannot be used: {reason}. Available: {available}.")
    return _BACKENDS[name]
