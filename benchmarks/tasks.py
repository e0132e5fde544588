"""What the stages of gpu.py run, each in a process of its own: `python tasks.py TASK NAMES`."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import emit

ROOT = Path(__file__).resolve().parents[1]
# Modules are imported by those who need them: operators need no diffusers.
TASKS = {
    "facts": "tasks.facts",
    "backends": "tasks.backends",
    "exercise": "operators.exercise",
    "times": "operators.times",
    "compare": "pipelines.compare",
    "attention": "sparse_video.attention",
    "steps": "sparse_video.steps",
}


def facts(device: torch.device, dry: bool, names: Sequence[str]) -> None:
    """What figures have to agree in to stand in one report."""
    emit("facts", facts=known_facts(device))


def known_facts(device: torch.device) -> dict[str, str]:
    """Hardware, versions and revision."""
    from dicache.cli.info import devices, processor, versions

    smi = "nvidia-smi --query-gpu=driver_version,clocks.max.sm --format=csv,noheader"
    found = {
        "machine": f"{processor()}, {os.cpu_count()} CPU cores",
        **devices(),
        "driver, clock": _printed(smi.split()),
        "nvcc": _printed(["nvcc", "--version"]).rpartition("\n")[2],
        "cuda of torch": torch.version.cuda or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "revision": _printed(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "sources": _hash_of_sources(),
    }
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(0).L2_cache_size
        found["L2"] = f"{size / 2**20:.0f} MiB"
    return found


def backends(device: torch.device, dry: bool, names: Sequence[str]) -> None:
    """Which backends run, after the build."""
    from dicache.cli.info import build
    from dicache.ops import backend_status

    emit("backends", facts={**backend_status(), **build()})


def _printed(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else f"exit code {done.returncode}"


def _hash_of_sources() -> str:
    """Of what is measured and what measures: a revision says nothing of changed files."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "csrc", "dicache", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("names", nargs="*", help="implementations, or a model")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        torch.set_num_threads(1)
    module, _, function = TASKS[args.task].partition(".")
    task = getattr(importlib.import_module(module), function)
    task(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run, args.names)


if __name__ == "__main__":
    main()
