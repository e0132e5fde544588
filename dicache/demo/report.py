"""What a set of runs showed, as a table for the terminal and as plain data for a JSON file.

One `Summary` is one column of the table: means over the samples of one model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from dicache import DiCacheConfig, Profile
from dicache.demo.runner import CacheReport, Run, Sample


@dataclass(frozen=True)
class Summary:
    """Means over the samples of one model; quality and un-cached time only where compared."""

    name: str
    size: str
    frames: int
    samples: int
    steps: str
    computed: float
    resumed: float
    reused: float
    block_calls_uncached: float
    block_calls: float
    seconds: float
    seconds_uncached: float | None
    psnr: float | None
    ssim: float | None
    cache_bytes: int
    cache_tensors: int

    @property
    def fewer_blocks(self) -> float:
        """Factor by which the cache lowers the number of block evaluations."""
        return self.block_calls_uncached / self.block_calls

    @property
    def speedup(self) -> float | None:
        """Wall-clock time without the cache over time with it."""
        return None if self.seconds_uncached is None else self.seconds_uncached / self.seconds


def summarize(name: str, samples: Sequence[Sample]) -> Summary:
    """Average what the samples of model `name` showed; sizes are those of the largest run."""
    runs = [sample.cached for sample in samples]
    reports = [list(run.caches.values()) for run in runs]
    qualities = [quality for sample in samples if (quality := sample.quality) is not None]
    plain = [sample.uncached.seconds for sample in samples if sample.uncached is not None]

    def mean(value: Callable[[CacheReport], int]) -> float:
        return _mean([sum(value(report) for report in caches) for caches in reports])

    return Summary(
        name=name,
        size="{1} x {0}".format(*runs[0].pictures.shape[-2:]),
        frames=len(runs[0].pictures) if runs[0].pictures.ndim == 4 else 1,
        samples=len(samples),
        steps=_describe_steps(runs[0]),
        computed=mean(lambda report: report.stats.num_computed),
        resumed=mean(lambda report: report.stats.num_resumed),
        reused=mean(lambda report: report.stats.num_reused),
        block_calls_uncached=mean(lambda report: report.block_calls_uncached),
        block_calls=mean(lambda report: report.stats.block_calls),
        seconds=_mean([run.seconds for run in runs]),
        seconds_uncached=_mean(plain) if plain else None,
        psnr=_mean([quality.psnr for quality in qualities]) if qualities else None,
        ssim=_mean([quality.ssim for quality in qualities]) if qualities else None,
        cache_bytes=max(sum(r.stats.cache_bytes for r in caches) for caches in reports),
        cache_tensors=max(sum(r.stats.cache_tensors for r in caches) for caches in reports),
    )


_ROWS: tuple[tuple[str, Callable[[Summary], str | None]], ...] = (
    ("picture size, pixels", lambda s: s.size),
    ("frames", lambda s: str(s.frames) if s.frames > 1 else None),
    ("prompts", lambda s: str(s.samples)),
    ("steps x branches", lambda s: s.steps),
    ("  computed (all blocks)", lambda s: number_text(s.computed)),
    ("  resumed (probe, then rest)", lambda s: number_text(s.resumed)),
    ("  reused (probe only)", lambda s: number_text(s.reused)),
    ("block calls, un-cached", lambda s: number_text(s.block_calls_uncached)),
    ("block calls, DiCache", lambda s: number_text(s.block_calls)),
    ("[bold]fewer block calls[/bold]", lambda s: f"[bold]{s.fewer_blocks:.2f}x[/bold]"),
    ("time, un-cached", lambda s: _unit(s.seconds_uncached, ".2f", " s")),
    ("time, DiCache", lambda s: _unit(s.seconds, ".2f", " s")),
    ("[bold]wall-clock speed-up[/bold]", lambda s: _bold(_unit(s.speedup, ".2f", "x"))),
    ("[bold]PSNR[/bold]", lambda s: _bold(_unit(s.psnr, ".1f", " dB"))),
    ("[bold]SSIM[/bold]", lambda s: _bold(_unit(s.ssim, ".4f", ""))),
    ("cache memory", lambda s: format_bytes(s.cache_bytes)),
    ("  tensors held", lambda s: str(s.cache_tensors)),
)
_RULES_AFTER = {"steps x branches", "  reused (probe only)", "[bold]fewer block calls[/bold]"}
_RULES_AFTER |= {"[bold]wall-clock speed-up[/bold]", "[bold]SSIM[/bold]"}


def comparison_table(summaries: Sequence[Summary]) -> Table:
    """One column a model, one row a quantity; rows that no model has are left out."""
    title = "DiCache against the same runs without it"
    if all(summary.psnr is None for summary in summaries):
        title = "DiCache"
    table = Table(title=title)
    table.add_column("mean per run")
    for summary in summaries:
        table.add_column(summary.name, justify="right", no_wrap=True)
    for label, value in _ROWS:
        cells = [value(summary) for summary in summaries]
        if any(cell is not None for cell in cells):
            texts = [cell or "-" for cell in cells]
            table.add_row(label, *texts, end_section=label in _RULES_AFTER)
    return table


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """A sample's timings, likeness, rules and statistics, without its pictures."""
    quality, uncached = sample.quality, sample.uncached
    caches = {
        name: {
            "config": config_to_dict(report.config),
            "blocks": report.num_blocks,
            "block_calls_uncached": report.block_calls_uncached,
            "stats": report.stats.to_dict(),
        }
        for name, report in sample.cached.caches.items()
    }
    return {
        "prompt": sample.prompt,
        "seed": sample.seed,
        "seconds": sample.cached.seconds,
        "seconds_uncached": None if uncached is None else uncached.seconds,
        "psnr_db": None if quality is None else quality.psnr,
        "ssim": None if quality is None else quality.ssim,
        "transformers": caches,
    }


def config_to_dict(config: DiCacheConfig) -> dict[str, Any]:
    """A configuration; a profile, which is in a file of its own, by what it is called."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    del values["process_group"]  # of one process
    profile = values["profile"]
    return {**values, "profile": repr(profile) if isinstance(profile, Profile) else profile}


def summary_to_dict(summary: Summary) -> dict[str, Any]:
    """All fields and factors of a summary."""
    factors = {"fewer_blocks": summary.fewer_blocks, "speedup": summary.speedup}
    return {**asdict(summary), **factors}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write what `to_json` makes of the data."""
    path.write_text(to_json(data, indent=2) + "\n", encoding="utf-8")


def to_json(data: dict[str, Any], indent: int | None = None) -> str:
    """Data as JSON; infinity and NaN, which JSON lacks, become strings."""
    return json.dumps(_plain(data), indent=indent, allow_nan=False)


def format_bytes(count: float) -> str:
    """A size in B, kB, MB or GB (powers of 1000), three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data


def _describe_steps(run: Run) -> str:
    """Steps and contexts, "50 x 2"; transformers that share a run (Wan 2.2) add up."""
    steps: dict[str, int] = {}
    for report in run.caches.values():
        for name, records in report.stats.contexts.items():
            steps[name] = steps.get(name, 0) + len({record.step for record in records})
    counts = " or ".join(str(count) for count in sorted(set(steps.values())))
    return f"{counts} x {len(steps)}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def number_text(value: float) -> str:
    """With one digit behind the point where it is no whole number."""
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _unit(value: float | None, digits: str, unit: str) -> str | None:
    return None if value is None else f"{value:{digits}}{unit}"


def _bold(text: str | None) -> str | None:
    return None if text is None else f"[bold]{text}[/bold]"
