"""One row per measured case, what follows from several rows, and their Markdown table."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch
import workloads
from workloads import Case

Row = dict[str, Any]


def make_row(
    case: Case, seconds: float, copy_rate: float, launches: int | None, sets: int, device: str
) -> Row:
    """A measured case, ready for JSON; rates in GB/s are 1e9 bytes a second."""
    rate = case.num_bytes / seconds / 1e9
    return {
        "operation": case.operation.name,
        "implementation": case.implementation,
        "size": case.size.name,
        "shape": list(case.size.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "microseconds": seconds * 1e6,
        "passes": case.passes,
        "bytes": case.num_bytes,
        "gb_per_s": rate,
        "copy_gb_per_s": copy_rate,
        "fraction_of_copy": rate / copy_rate,
        "launches": launches,
        "sets": sets,
        "device": device,
    }


def add_ratios(rows: list[Row]) -> None:
    """Add `over_reference` and `over_published`: how many times faster than those rows."""
    times = {
        (row["operation"], row["implementation"], row["size"]): row["microseconds"] for row in rows
    }
    for row in rows:
        own, size = row["microseconds"], row["size"]
        reference = times.get((row["operation"], "reference", size))
        published = times.get(("skipped_step", "published", size))
        if not row["operation"].startswith("skipped_step"):
            published = None  # an operator alone is not what the published sequence does
        row["over_reference"] = reference / own if reference else None
        row["over_published"] = published / own if published else None


def markdown(rows: list[Row]) -> str:
    """A table for every size."""
    sections = []
    for size in dict.fromkeys(row["size"] for row in rows):
        chosen = [row for row in rows if row["size"] == size]
        sections.append(f"### {_title(chosen[0])}\n\n{_table(chosen)}")
    return "\n\n".join(sections)


NOTES = """\
GB/s counts the passes of the column beside it, the fewest that the operation needs; for `published`
they are those that it makes. `copy` is torch's `copy_` at the same tensor size, bytes read plus
bytes written. `skipped_step` is probe_statistics and combine_residuals, `skipped_step_default` is
alignment_statistics and combine_residuals. Launches are kernels, copies and fills on a GPU, and
operators dispatched by Python on a CPU (views and allocations left out). What is empty was not
measured. Times are medians on a GPU and, as other programs disturb there, the fastest sample on a
CPU. The small size stays in the cache: it shows the cost of a call.
"""


def _title(row: Row) -> str:
    known = workloads.SIZES.get(row["size"])
    shape = " x ".join(map(str, row["shape"]))
    name = f"{row['size']}: " + (f"{known.description}, " if known else "")
    return f"{name}{shape} {row['dtype']}; copy {row['copy_gb_per_s']:.1f} GB/s"


def _table(rows: list[Row]) -> str:
    lines = [
        "| operation | implementation | time, us | passes | GB/s | of copy | launches "
        "| over reference | over published |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = list(dict.fromkeys(row["operation"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["operation"])):
        moved = row["passes"] > 0
        cells = [
            row["operation"],
            row["implementation"],
            f"{row['microseconds']:.1f}",
            str(row["passes"]) if moved else "",
            f"{row['gb_per_s']:.1f}" if moved else "",
            f"{row['fraction_of_copy']:.0%}" if moved else "",
            "" if row["launches"] is None else str(row["launches"]),
            _times(row["over_reference"]),
            _times(row["over_published"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def device_name(device: torch.device) -> str:
    """What a reader would call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
