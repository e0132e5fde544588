"""Build the CUDA kernels for the CPU emulator and give their operators the usual signatures."""

from __future__ import annotations

import functools
import inspect
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from dicache import ops

ROOT = Path(__file__).parents[1]
_LIBRARIES = []  # the operators are gone when their library object is


def why_not() -> str | None:
    """Why the emulator cannot be built here; `None` if it can."""
    return "no g++" if shutil.which("g++") is None else None


def build(library: Path) -> None:
    """Compile tests/cuda_emulator, which includes the kernels of csrc/cuda."""
    emulator = ROOT / "tests" / "cuda_emulator"
    includes = [emulator, ROOT / "csrc", ROOT / "csrc" / "include", *include_paths()]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unknown-pragmas"]
    command += [f"-I{folder}" for folder in includes]
    command += [f"-L{folder}" for folder in library_paths()]
    command += [str(emulator / "emulator.cpp"), "-o", str(library)]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)


@functools.cache
def load() -> SimpleNamespace:
    """The operators of the emulated CUDA backend."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulator.so"
        build(path)
        library = torch.library.Library("dicache_emulated", "DEF")
        for schema in ops.SCHEMAS:
            library.define(schema)
        _LIBRARIES.append(library)
        torch.ops.load_library(path)
    namespace = torch.ops.dicache_emulated
    functions = {name: getattr(namespace, name) for name in ops.OPERATORS}
    for name in ops.OPERATORS:
        if f"{name}_out" in functions:
            both = functions[name], functions[f"{name}_out"]
            functions[name] = _with_out(*both, getattr(ops, name))
    return SimpleNamespace(**functions)


def _with_out(make: Callable, write: Callable, like: Callable) -> Callable:
    """Two operators as one function with an `out`, like the one of `dicache.ops`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(like).bind(*args, **kwargs)
        bound.apply_defaults()
        *given, out = bound.args
        if out is None:
            return make(*given)
        if not isinstance(out, ops.Results):
            write(*given, out)
            return out
        y = write(*given, *out)
        return (out.sums, out.result) if y is None else (out.sums, out.result, y)

    return call
