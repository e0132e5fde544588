"""`dicache info`: what is installed, what it can run on, and which models it knows."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import dicache
from dicache.driver.families import supported_families
from dicache.ops import backend_status, build_record

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton", "imageio-ffmpeg")

_FLUX = (1, 4096 * 3072)  # samples and elements of one, at 1024 x 1024


def print_info() -> None:
    """Print all tables."""
    console = Console()
    rows = {**versions(), "platform": platform.platform()}
    console.print(_two_columns("versions", "package", "version", rows))
    console.print(_two_columns("devices", "device", "what it is", devices()))
    console.print(_two_columns("backends", "backend", "status", backend_status()))
    console.print(_two_columns("build", "fact", "value", build()))
    console.print(_families_table())
    console.print(_two_columns("presets", "preset", "family, published threshold", _presets()))


def versions() -> dict[str, str]:
    """Versions of this package, Python, and the packages that change what a run does."""
    found = {"dicache": dicache.__version__, "python": platform.python_version()}
    return found | {name: _version_of(name) for name in _PACKAGES}


def processor() -> str:
    """The CPU's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def devices() -> dict[str, str]:
    """The devices that `dicache generate --device` accepts here."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{properties.name}, {memory}, compute capability {capability}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if torch.xpu.is_available():
        found["xpu"] = torch.xpu.get_device_name()
    return found


def build() -> dict[str, str]:
    """How the compiled backends were built and what they use here."""
    record = build_record()
    if not record:
        return {"compiled": "nothing"}
    rows = {"torch, at least": record["torch_stable_abi"], "CUDA": "not built"}
    if "_C_cuda" not in record["missing"]:
        rows["CUDA"] = f"{record['cuda']} for {record['cuda_architectures']}"
    try:
        from dicache._build_info import build_facts, launch_plan
    except ImportError as error:
        reason = record["missing"].get("_build_info", error)
        return {**rows, "compiler, launches": f"not known: {reason}"}
    facts = build_facts()
    rows["compiler"], rows["CPU instruction set"] = facts["compiler"], facts["instruction_set"]
    tasks = launch_plan("alignment_statistics", *_FLUX, 1)["cpu_tasks"]
    plans = {"cpu": f"{tasks} tasks on {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        processors = torch.cuda.get_device_properties(index).multi_processor_count
        plan = launch_plan("alignment_statistics", *_FLUX, processors)
        plans[f"cuda:{index}"] = f"1 launch, {plan['blocks']} blocks of {plan['threads']} threads"
    return rows | {f"FLUX statistics, {device}": plan for device, plan in plans.items()}


def _version_of(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "not installed"


def _table(title: str) -> Table:
    """Narrow enough for the longest class name on 80 characters; on fewer, names are folded."""
    table = Table(title=f"\n{title}", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.title_justify, table.title_style, table.header_style = "left", "bold", "dim"
    return table


def _two_columns(title: str, first: str, second: str, rows: dict[str, str]) -> Table:
    table = _table(title)
    table.add_column(first, overflow="fold")
    table.add_column(second, overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table


def _families_table() -> Table:
    table = _table("supported model families")
    table.add_column("family", overflow="fold")
    table.add_column("transformer", overflow="fold")
    table.add_column("threshold", justify="right")
    for family in supported_families():
        table.add_row(
            escape(family.name), escape(family.model_class), f"{family.default_threshold:g}"
        )
    return table


def _presets() -> dict[str, str]:
    """The published rules' thresholds, by their names; the first family of each."""
    found: dict[str, str] = {}
    for family in supported_families():
        if family.preset:
            found.setdefault(family.preset, f"{family.name}, {family.threshold:g}")
    return found
