"""What setup.py builds, and that a machine without it says so and works all the same."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from dicache import DiCacheConfig, DiCacheSession, ops, workspace
from dicache.core.warning import DiCacheWarning

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

built = pytest.mark.skipif(
    os.environ.get("DICACHE_BUILD") == "0" or COMPILER is None,
    reason="nothing is compiled here: DICACHE_BUILD=0 or no C++ compiler",
)


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py in a copy of the sources, with this Python."""
    for name in ("csrc", "dicache", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "models", "__pycache__")
        if not (folder / name).exists():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "mkdocs.yml"):
        shutil.copy(ROOT / name, folder)
    clean = {key: value for key, value in os.environ.items() if key != "DICACHE_BUILD"}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def empty_the_sources(folder: Path) -> None:
    """For tests of what is built from what: compiled in a second, and of no use."""
    for path in (*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")):
        empty = folder / path.relative_to(ROOT)
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()


@built
def test_where_a_compiler_is_found_the_cpu_backend_is_there():
    assert ops.backend_status()["cpp"] == "available"


@built
def test_the_operators_library_needs_no_python():
    (library,) = (ROOT / "dicache").glob("_C.*so")
    symbols = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True)
    if symbols.returncode != 0:
        pytest.skip("no nm on this machine")
    undefined = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    # The stable ABI is a C interface: nothing of c10 or ATen in C++.
    assert not [name for name in undefined if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))]
    assert "aoti_torch_get_data_ptr" in undefined


@built
def test_build_facts_and_launch_plans():
    from dicache._build_info import build_facts, launch_plan

    facts = build_facts()
    assert facts["compiler"].startswith(("GCC", "clang"))
    assert facts["instruction_set"] in ("baseline", "AVX2", "AVX-512")
    plan = launch_plan("alignment_statistics", 1, 4096 * 3072, 132)
    assert plan["launches"] == 1
    assert plan["blocks"] == 4 * 132  # as many as are resident: 4 a multiprocessor
    for name in ("combine_residuals", "extrapolate_residuals"):
        assert launch_plan(name, 2, 4096 + 1, 132)["blocks"] == 2 * 2
    with pytest.raises(ValueError, match="combine_residuals"):
        launch_plan("combine", 1, 1, 1)


@built
@pytest.mark.parametrize("batch", [1, 3, 64, 700])
@pytest.mark.parametrize("size", [1, 3072, 4096 * 3072])
def test_a_workspace_is_large_enough_for_every_plan(batch, size, monkeypatch):
    from dicache._build_info import launch_plan

    x = torch.empty(batch, 1, device="meta")
    for processors in (1, 78, 132, 148):
        monkeypatch.setattr(workspace, "max_blocks", lambda device, count=processors: 4 * count)
        available = ops.make_workspace(x).numel()
        for name in ("probe_statistics", "alignment_statistics", "record_residuals"):
            assert launch_plan(name, batch, size, processors)["workspace_bytes"] <= available


def test_a_source_distribution_carries_every_source(tmp_path):
    """Also those that this machine cannot compile."""
    done = run_setup(tmp_path, "-q", "sdist", DICACHE_BUILD="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= names
    assert {"dicache/kernels/probe.py", "dicache/py.typed", "dicache/_build_info.pyi"} <= names


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0;9.0;10.0+PTX", (9, 0), True),
        ("8.0;9.0;10.0+PTX", (8, 6), True),
        ("8.0;9.0;10.0+PTX", (12, 0), True),
        ("8.0;9.0;10.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (10, 0), False),
        ("9.0", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("native", (9, 0), True),  # of an older build: nobody can tell
        ("8.6", (8, 0), False),
    ],
)
def test_a_gpu_that_the_build_does_not_cover_is_left_to_triton(built, capability, runs):
    assert ops._covers(built, capability) is runs


@pytest.mark.parametrize(
    ("listed", "built"),
    [
        ("9.0", "9.0"),
        ("8.0 9.0a;10.0+PTX", "10.0;10.0+PTX;8.0;9.0a"),
        ("Hopper", "9.0;9.0+PTX"),
        ("native", "8.0;9.0;10.0;10.0+PTX"),
        (None, "8.0;9.0;10.0;10.0+PTX"),
    ],
)
def test_architectures_are_remembered_as_numbers(monkeypatch, listed, built):
    """Whatever words the build was told; `native` on a machine without a GPU is the usual ones."""
    source = (ROOT / "setup.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    setup = {"os": os, "re": re}
    exec(ast.unparse(functions["architectures"]), setup)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if listed is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert sorted(setup["architectures"]("13.0").split(";")) == sorted(built.split(";"))


def test_build_can_be_switched_off(tmp_path):
    done = run_setup(tmp_path, "build_ext", "--inplace", DICACHE_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "dicache").glob("*.so"))


def test_a_wrong_switch_is_an_error(tmp_path):
    done = run_setup(tmp_path, "build_ext", DICACHE_BUILD="gpu")
    assert done.returncode != 0
    assert "DICACHE_BUILD='gpu'" in done.stderr and "cuda" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can build CUDA extensions")
def test_what_is_asked_for_by_name_and_cannot_be_built_is_an_error(tmp_path):
    done = run_setup(tmp_path, "build_ext", DICACHE_BUILD="cuda")
    assert done.returncode != 0
    assert "CUDA build of torch" in done.stderr


def test_without_a_compiler_the_package_is_built_all_the_same(tmp_path):
    missing = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = run_setup(tmp_path, "build_ext", "--inplace", **missing)
    assert done.returncode == 0, done.stderr
    assert "_C is not built" in done.stdout + done.stderr
    record = json.loads((tmp_path / "dicache" / "_build.json").read_text())
    assert record["missing"]["_C"] and record["missing"]["_build_info"]
    done = run_setup(tmp_path, "build_ext", "--inplace", DICACHE_BUILD="cpu", **missing)
    assert done.returncode != 0


def test_why_a_module_is_not_there_is_told_by_its_build(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    assert "as where pip builds in isolation" in ops._load("_C")
    record = tmp_path / "_build.json"
    record.write_text(json.dumps({"missing": {"_C": "the compiler crashed"}}))
    assert "not built: the compiler crashed. DICACHE_BUILD=cpu pip install" in ops._load("_C")
    record.write_text("{")  # an import that fails for want of a reason would be worse
    assert "as where pip builds in isolation" in ops._load("_C")


def test_without_compiled_modules_the_reference_runs_and_says_why(tmp_path):
    run_setup(tmp_path, "--version", DICACHE_BUILD="0")  # copies the sources
    program = (
        "import torch; from dicache import ops; print(ops.backend_status());"
        "x = torch.ones(1, 2, 3); w = torch.zeros(2, 1, 2, 3);"
        "print(ops.combine_residuals(x, w, torch.zeros(1, dtype=torch.int32), torch.ones(1)).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "as where pip builds in isolation" in done.stdout and "DICACHE_BUILD=cpu" in done.stdout
    assert "tensor(6.)" in done.stdout


def test_what_commands_read_is_built_along(tmp_path):
    built = tmp_path / "built"
    done = run_setup(tmp_path, "-q", "build_py", "--build-lib", str(built), DICACHE_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert (built / "dicache" / "cli" / "families.json").is_file()


# --- the folder kernels/ -------------------------------------------------------------------------


def test_a_checkout_without_symbolic_links_is_told_so_instead_of_built(tmp_path):
    """As git leaves it where links are switched off: a file with the target's path in it."""
    assert run_setup(tmp_path, "--version", DICACHE_BUILD="0").returncode == 0
    link = tmp_path / "dicache" / "kernels"
    if link.is_symlink():
        link.unlink()
    else:  # these tests run in a source distribution, which has a folder there
        shutil.rmtree(link)
    link.write_text("../kernels/triton")
    done = run_setup(tmp_path, "--version", DICACHE_BUILD="0")
    assert done.returncode != 0
    assert "core.symlinks" in done.stderr and "Traceback" not in done.stderr


def test_a_source_distribution_without_links_can_be_built(tmp_path):
    sources, packed, unpacked = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    sources.mkdir()
    done = run_setup(sources, "-q", "sdist", "-d", str(packed), DICACHE_BUILD="0")
    assert done.returncode == 0, done.stderr
    (archive,) = packed.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    assert not (folder / "dicache" / "kernels").is_symlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=folder,
        env={**os.environ, "DICACHE_BUILD": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("installed", [False, True], ids=["alone", "with Hugging Face's"])
def test_the_roots_folder_kernels_is_no_package_to_others(installed, tmp_path):
    """`python -c` and `python -m` put the working directory first on the path."""
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = object()")
    looks = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin)"
    done = subprocess.run(
        [sys.executable, "-c", looks],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    found = str(tmp_path / "kernels" / "__init__.py") if installed else "None"
    assert done.stdout.strip() == found, done.stderr


def test_diffusers_imports_from_the_roots_folder():
    pytest.importorskip("diffusers")
    done = subprocess.run(
        [sys.executable, "-c", "from diffusers import FluxPipeline; print('imported')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "imported", done.stderr


def test_an_installation_that_compiled_nothing_says_so_where_it_costs(monkeypatch):
    """Once a place, with the reason and the command; not where plain PyTorch was asked for."""
    monkeypatch.setitem(
        ops._load_error, "_C", "dicache._C was not built; DICACHE_BUILD=cpu pip ..."
    )
    x = torch.randn(1, 4, 8)

    def run(backend):
        session = DiCacheSession(DiCacheConfig(threshold=0.1, backend=backend))
        with session.step("cond", timestep=1.0, num_inference_steps=2) as step:
            step.record(x, x + 1, x + 2)

    with pytest.warns(DiCacheWarning, match=r"plain PyTorch on this cpu device.*DICACHE_BUILD=cpu"):
        run("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("reference")
    monkeypatch.setitem(ops._load_error, "_C", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("auto")


@built
def test_the_operators_are_built_where_there_is_no_pybind11(tmp_path):
    """It is for the introspection module alone."""
    empty_the_sources(tmp_path)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "pybind11.py").write_text("raise ImportError('no pybind11')")
    done = run_setup(tmp_path, "-q", "build_ext", "--inplace", PYTHONPATH=str(tmp_path / "hidden"))
    assert "_build_info is not built, because no pybind11" in done.stderr
    assert (tmp_path / "dicache" / "_C.abi3.so").is_file()
    record = json.loads((tmp_path / "dicache" / "_build.json").read_text())
    assert record["missing"]["_build_info"] == "no pybind11" and "_C" not in record["missing"]


@built
@pytest.mark.parametrize("is_for_all", [True, False])
def test_a_wheels_tag_tells_which_pythons_it_is_for(is_for_all, tmp_path):
    """A module of one version is in no wheel for all, and in every other one."""
    empty_the_sources(tmp_path)
    options = ["--py-limited-api=cp310"] if is_for_all else []
    done = run_setup(tmp_path, "-q", "bdist_wheel", *options, DICACHE_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        libraries = {Path(name).name for name in wheel.namelist() if name.endswith(".so")}
        record = json.loads(wheel.read("dicache/_build.json"))
    this = "cp{}{}".format(*sys.version_info)
    assert path.name.split("-")[2:4] == (["cp310", "abi3"] if is_for_all else [this, this])
    assert "_C.abi3.so" in libraries and record["torch_stable_abi"] == "2.11"
    assert len(libraries) == (1 if is_for_all else 2), libraries
    reason = record["missing"].get("_build_info")
    assert reason == ("this is a wheel for all versions of Python" if is_for_all else None)


@pytest.mark.parametrize("cuda", [True, False])
def test_a_wheel_for_all_versions_of_python_says_what_it_knows(cuda, monkeypatch):
    info = pytest.importorskip("dicache.cli.info")
    reasons = {"_build_info": "this is a wheel for all"} | ({} if cuda else {"_C_cuda": "no nvcc"})
    record = {"torch_stable_abi": "2.11", "cuda": "13.0", "cuda_architectures": "9.0"}
    monkeypatch.setattr(info, "build_record", lambda: record | {"missing": reasons})
    monkeypatch.setitem(sys.modules, "dicache._build_info", None)
    assert info.build() == {
        "torch, at least": "2.11",
        "CUDA": "13.0 for 9.0" if cuda else "not built",
        "compiler, launches": "not known: this is a wheel for all",
    }
