"""Build script: the extension modules. Everything declarative is in pyproject.toml.

    csrc/cpu/     C++, any CPU        -> dicache._C           operators, torch's stable ABI
    csrc/cuda/    CUDA C++            -> dicache._C_cuda      operators, torch's stable ABI
    csrc/python/  C++ with pybind11   -> dicache._build_info  facts and launch plans, no torch

    DICACHE_BUILD   unset: build what this machine can, and install without the rest
                    0: build nothing    cpu: all but CUDA    cuda: everything
                    Asked for by name, a module that cannot be built is an error.

A module that is missing costs speed, never function: `dicache.reference` runs everywhere. Install
with --no-build-isolation: the build needs the torch that will load it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

BUILD = os.environ.get("DICACHE_BUILD", "")
ROOT = Path(__file__).resolve().parent
INCLUDE = [str(ROOT / "csrc"), str(ROOT / "csrc" / "include")]  # ninja runs in another folder
# The oldest torch that loads what is built here. 0x020b: torch 2.11.
STABLE_ABI = ("2.11", "0x020b000000000000")
# fmad, fp-contract: y and the recorded residuals are bitwise equal in every backend.
CXX = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
NVCC = ["-std=c++20", "-O3", "--fmad=false", "-lineinfo", "-DUSE_CUDA"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


def cuda_home() -> str | None:
    """Where nvcc and libcudart lie, if torch is a CUDA build; torch alone also names bare folders.

    Not `torch.cuda.is_available()`: what is built on a machine without a GPU runs on one with it.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None or CUDA_HOME is None:
        return None
    has_runtime = any(Path(CUDA_HOME).glob("lib*/libcudart*"))
    return CUDA_HOME if has_runtime and (Path(CUDA_HOME) / "bin" / "nvcc").exists() else None


def cuda_version(home: str) -> str:
    printed = subprocess.check_output([f"{home}/bin/nvcc", "--version"], text=True)
    found = re.search(r"release (\S+),", printed)
    return found.group(1) if found else "unknown"


def extensions() -> list[Extension]:
    import pybind11
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    abi = [("TORCH_TARGET_VERSION", STABLE_ABI[1])]
    common = {"depends": sources("csrc/**/*.h", "csrc/**/*.cuh"), "optional": not BUILD}
    built = [
        CppExtension(
            "dicache._C",
            sources("csrc/cpu/*.cpp"),
            include_dirs=[*INCLUDE],
            define_macros=abi,
            extra_compile_args={"cxx": CXX},
            py_limited_api=True,  # neither Python.h nor libtorch_python
            **common,
        )
    ]
    facts = [("DICACHE_TORCH_ABI", f'"{STABLE_ABI[0]}"')]
    home = cuda_home() if BUILD in ("", "cuda") else None
    if home is None and BUILD == "cuda":
        sys.exit("DICACHE_BUILD=cuda needs a CUDA build of torch, nvcc and libcudart (CUDA_HOME).")
    if home is not None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        facts.append(("DICACHE_CUDA_VERSION", f'"{cuda_version(home)}"'))
        facts.append(("DICACHE_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
        built.append(
            CUDAExtension(
                "dicache._C_cuda",
                sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
                include_dirs=[*INCLUDE],
                define_macros=abi,
                extra_compile_args={"cxx": [*CXX, "-DUSE_CUDA"], "nvcc": NVCC},
                py_limited_api=True,
                **common,
            )
        )
    info = Extension(
        "dicache._build_info",
        ["csrc/python/build_info.cpp"],
        include_dirs=[*INCLUDE, pybind11.get_include()],
        define_macros=facts,
        extra_compile_args={"cxx": ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"]},
        language="c++",
        **common,
    )
    return [*built, info]


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """torch's command; what is optional may fail, and says so."""

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                self.warn(f"{extension.name} is not built, dicache works without it: {error}")

    return Build


if BUILD not in ("", "0", "cpu", "cuda"):
    sys.exit(f"DICACHE_BUILD={BUILD!r}. Expected 0, cpu or cuda, or leave it unset.")
try:
    plan = {} if BUILD == "0" else {"ext_modules": extensions()}
    plan = plan and {**plan, "cmdclass": {"build_ext": build_command()}}
except ImportError as error:  # torch or pybind11: pip builds in isolation unless told otherwise
    if BUILD:
        sys.exit(
            f"DICACHE_BUILD={BUILD} needs torch and pybind11; use --no-build-isolation. {error}"
        )
    print(f"dicache: nothing is compiled, because {error}", file=sys.stderr)
    plan = {}
setup(**plan)
