"""After a saved run of bench_ops.py: its rows as one compact table, in Markdown and JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_TABLE = pytest.StashKey[str]()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Called by pytest-benchmark when it saves a run."""
    infos = [entry["extra_info"] for entry in output_json["benchmarks"]]
    if not any("kind" in info for info in infos):
        return
    table, stored = _report(infos, output_json)
    folder = Path(config.rootpath) / ".benchmarks"
    folder.mkdir(exist_ok=True)
    (folder / "bench_ops.md").write_text(table)
    (folder / "bench_ops.json").write_text(json.dumps(stored, indent=1) + "\n")
    config.stash[_TABLE] = table


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table below pytest-benchmark's own."""
    if _TABLE in config.stash:
        terminalreporter.write_line("")
        terminalreporter.write_line(config.stash[_TABLE])


def _report(infos: list[dict[str, Any]], run: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    import bench_ops
    import rows

    timed = [info for info in infos if info.get("kind") == "time"]
    host = [info for info in infos if info.get("kind") == "host"]
    rows.add_ratios(timed)
    first = (timed or host)[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = ["# Operator microbenchmarks", "", f"{first['device']}; {versions}; {run['datetime']}"]
    busy = os.getloadavg()[0]
    lines += ["", f"Load at the end: {busy:.1f} on {os.cpu_count()} cores, this run included."]
    if not bench_ops.EVERYTHING:
        left_out = "; ".join(
            f"{size}: {', '.join(names)}" for size, names in bench_ops.SLOW_ON_CPU.items()
        )
        lines += ["", f"Left out on a CPU (DICACHE_BENCH=all runs them): {left_out}."]
    lines += ["", rows.markdown(timed), "", rows.NOTES]
    if host:
        lines += ["| host time of a launch | implementation | us |", "|---|---|--:|"]
        lines += [
            f"| {row['operation']} | {row['implementation']} | {row['microseconds']:.1f} |"
            for row in host
        ]
    stored = {"versions": first["versions"], "datetime": run["datetime"], "rows": timed}
    return "\n".join(lines) + "\n", stored | {"host": host}
