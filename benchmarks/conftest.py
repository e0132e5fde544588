"""What pytest-benchmark does not know of the machine: versions, and which GPU there is."""

from __future__ import annotations

from typing import Any

from dicache.cli.info import devices, processor, versions


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark, whose JSON keeps it beside every run."""
    machine_info.update(versions=versions(), devices=devices(), processor=processor())
