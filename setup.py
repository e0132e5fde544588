"""Build script: the extension modules. Everything declarative is in pyproject.toml.

    csrc/cpu/     C++, any CPU        -> dicache._C           operators, torch's stable ABI
    csrc/cuda/    CUDA C++            -> dicache._C_cuda      operators, torch's stable ABI
    csrc/python/  C++ with pybind11   -> dicache._build_info  facts and launch plans, no torch
                                         dicache/_build.json  what was built, and why not the rest

    DICACHE_BUILD   unset: build what this machine can, and install without the rest
                    0: build nothing    cpu: all but CUDA    cuda: everything
                    Asked for by name, a module that cannot be built is an error.

A module that is missing costs speed, never function: `dicache.reference` runs everywhere. Install
with --no-build-isolation: the build needs the torch that will load it.

The operators know no Python, so they are for all versions of it. `_build_info` is for the one that
builds it, since pybind11 has no stable ABI. A wheel for all is asked for by setuptools' own option
(`bdist_wheel --py-limited-api=cp310`, as `make wheel` does) and leaves that module out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

BUILD = os.environ.get("DICACHE_BUILD", "")
ROOT = Path(__file__).resolve().parent
INCLUDE = [str(ROOT / "csrc"), str(ROOT / "csrc" / "include")]  # ninja runs in another folder
# The oldest torch that loads what is built here. 0x020b: torch 2.11.
STABLE_ABI = ("2.11", "0x020b000000000000")
# fmad, fp-contract: y and the recorded residuals are bitwise equal in every backend.
CXX = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
NVCC = ["-std=c++20", "-O3", "--fmad=false", "-lineinfo", "-DUSE_CUDA"]
NO_CUDA = (
    "there was no CUDA build of torch with nvcc and libcudart of its major version in CUDA_HOME"
)


def check_links() -> None:
    """A checkout without symbolic links would install, but without its Triton kernels."""
    if not (ROOT / "dicache" / "kernels" / "__init__.py").is_file():
        sys.exit(
            "dicache/kernels is no link to kernels/triton, so the Triton kernels would be missing. "
            "Check the repository out with symbolic links (git config core.symlinks true, then git "
            "checkout -- dicache/kernels; on Windows that takes the developer mode), or install "
            "from a source distribution, which has none."
        )


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


def cuda_version() -> str | None:
    """nvcc's version, if this torch can be extended with it. Torch alone also names bare folders.

    Not `torch.cuda.is_available()`: what is built on a machine without a GPU runs on one with it.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if torch.version.cuda is None or CUDA_HOME is None or not nvcc.exists():
        return None
    if not any(Path(CUDA_HOME).glob("lib*/libcudart*")):
        return None
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", printed)
    is_same_major = found is not None and found[1] == torch.version.cuda.split(".")[0]
    return f"{found[1]}.{found[2]}" if found is not None and is_same_major else None


def architectures(version: str) -> str:
    """Of TORCH_CUDA_ARCH_LIST, or those of the GPUs here, or the usual ones; names as numbers."""
    import torch
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") in ("", "native"):
        if torch.cuda.is_available():
            found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
            listed = ";".join(f"{major}.{minor}" for major, minor in sorted(found)) + "+PTX"
        else:
            is_new = tuple(map(int, version.split("."))) >= (12, 8)
            listed = "8.0;9.0;10.0+PTX" if is_new else "8.0;9.0+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = listed  # torch would raise where it sees no GPU
    found = dict.fromkeys(
        re.findall(r"code=(sm|compute)_(\d+)(\d)([af]?)", "".join(_get_cuda_arch_flags()))
    )
    return ";".join(
        f"{major}.{minor}{kind}" + ("+PTX" if code == "compute" else "")
        for code, major, minor, kind in found
    )


def extensions() -> tuple[list[Extension], dict[str, Any]]:
    """The modules to build, and what _build.json says of them: facts, and reasons for what lacks.

    A file, since it is read where no module for this Python is, and before _C_cuda is loaded.
    """
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    common = {"depends": sources("csrc/**/*.h", "csrc/**/*.cuh"), "optional": not BUILD}

    def operators(kind: Callable[..., Extension], name: str, folder: str, **flags: list[str]):
        return kind(
            f"dicache.{name}",
            sources(f"csrc/{folder}/*.cpp", f"csrc/{folder}/*.cu"),
            include_dirs=[*INCLUDE],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI[1])],
            extra_compile_args=flags,
            py_limited_api=True,  # neither Python.h nor libtorch_python
            **common,
        )

    built = [operators(CppExtension, "_C", "cpu", cxx=CXX)]
    missing: dict[str, str] = {}
    record = {"torch_stable_abi": STABLE_ABI[0], "missing": missing}
    version = cuda_version() if BUILD in ("", "cuda") else None
    if version is not None:
        record |= {"cuda": version, "cuda_architectures": architectures(version)}
        flags = {"cxx": [*CXX, "-DUSE_CUDA"], "nvcc": NVCC}
        built.append(operators(CUDAExtension, "_C_cuda", "cuda", **flags))
    elif BUILD == "cuda":
        sys.exit(f"DICACHE_BUILD=cuda: {NO_CUDA}.")
    else:
        missing["_C_cuda"] = "DICACHE_BUILD was cpu" if BUILD else NO_CUDA
    try:
        import pybind11
    except ImportError as error:
        if BUILD:
            raise
        missing["_build_info"] = str(error)
        print(f"dicache: _build_info is not built, because {error}", file=sys.stderr)
        return built, record
    info = Extension(
        "dicache._build_info",
        ["csrc/python/build_info.cpp"],
        include_dirs=[*INCLUDE, pybind11.get_include()],
        extra_compile_args={"cxx": ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"]},
        language="c++",
        **common,
    )
    return [*built, info], record


def build_command(record: dict[str, Any]) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """torch's command; what is optional may fail, and says so, also in _build.json."""

        def finalize_options(self) -> None:
            super().finalize_options()
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None and wheel.py_limited_api:
                record["missing"]["_build_info"] = "this is a wheel for all versions of Python"
                self.extensions = [e for e in self.extensions if e.py_limited_api]

        def run(self) -> None:
            super().run()
            path = Path(self.get_ext_fullpath("dicache._C")).with_name("_build.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                self.warn(f"{extension.name} is not built, dicache works without it: {error}")
                record["missing"][extension.name.removeprefix("dicache.")] = str(error)

    return Build


def described() -> dict[str, Any]:
    """What an index shows: addresses, and README.md with links that lead there from an index, too.

    Both begin with `repo_url` in mkdocs.yml. As long as there is none, links become plain text and
    pictures are left out, as an index has no files beside the text.
    """
    found = re.search(r"^repo_url: *(\S+?)/?$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    home = found and found[1]

    def absolute(link: re.Match[str]) -> str:
        is_image, text, target = link.groups()
        if home:
            return f"{is_image}[{text}]({home}/{'raw' if is_image else 'blob'}/HEAD/{target})"
        return "" if is_image else text

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    addresses = {"Paper": "https://arxiv.org/abs/2508.17356"}
    if home:
        addresses |= {"Repository": home, "Issues": f"{home}/issues"}
        addresses |= {"Changelog": f"{home}/blob/HEAD/CHANGELOG.md"}
    return {
        "project_urls": addresses,
        "long_description": re.sub(r"(!?)\[([^\[\]]+)\]\(([^)#:\s][^):\s]*)\)", absolute, readme),
        "long_description_content_type": "text/markdown",
    }


check_links()
if BUILD not in ("", "0", "cpu", "cuda"):
    sys.exit(f"DICACHE_BUILD={BUILD!r}. Expected 0, cpu or cuda, or leave it unset.")
plan: dict[str, Any] = {}
try:
    if BUILD != "0":
        modules, record = extensions()
        plan = {"ext_modules": modules, "cmdclass": {"build_ext": build_command(record)}}
except ImportError as error:  # torch or pybind11: pip builds in isolation unless told otherwise
    if BUILD:
        sys.exit(
            f"DICACHE_BUILD={BUILD} needs torch and pybind11; use --no-build-isolation. {error}"
        )
    print(f"dicache: nothing is compiled, because {error}", file=sys.stderr)
setup(**plan, **described())
