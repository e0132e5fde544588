"""Dense, sparse, DiCache and both: four runs of one prompt and seed, and the table of them.

Quality is against the dense run. Attention is counted by elements of its maps, as they were kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from dicache import DiCacheConfig, SparseVideoGenConfig, SparseVideoGenStats
from dicache.demo.runner import (
    Decode,
    Inputs,
    Run,
    Sample,
    run_cached,
    run_sparse,
    run_uncached,
)
from dicache.likeness import PSNR_CAP, Quality, quality

RUNS = ("dense", "sparse", "DiCache", "both")
NOTE = (
    "Means per run; PSNR, in dB, and SSIM against the dense run of the same seed. Density is the "
    "share of attention elements that is kept, over all blocks and steps that were computed, "
    "dense ones and text included; blocks that DiCache skips are not in it. Attention is what is "
    "left of the dense run's elements, these included; blocks are the evaluations of them."
)
_COLUMNS = ("run", "density", "attention", "blocks", "time", "PSNR", "worst", "SSIM")


@dataclass(frozen=True)
class FourRuns:
    """One prompt and seed, drawn by each of `RUNS`."""

    prompt: str
    seed: int
    runs: dict[str, Run]

    @property
    def cached(self) -> Sample:
        """The runs without and with DiCache, neither of them sparse."""
        return Sample(self.prompt, self.seed, self.runs["DiCache"], self.runs["dense"])

    def quality(self, name: str) -> Quality:
        """Likeness of a run's pictures to the dense run's."""
        return quality(self.runs[name].pictures, self.runs["dense"].pictures)

    @property
    def margin(self) -> float:
        """PSNR of both together minus that of the worse one alone, in dB."""
        alone = min(self.quality("sparse").psnr, self.quality("DiCache").psnr)
        return self.quality("both").psnr - alone


@dataclass(frozen=True)
class Row:
    """Means of one kind of run over samples; `worst_psnr` is the lowest of them."""

    name: str
    density: float
    attention: float
    block_calls: float
    seconds: float
    psnr: float
    worst_psnr: float
    ssim: float


def four_runs(
    pipe: Any,
    inputs: Inputs,
    decode: Decode,
    sparse: SparseVideoGenConfig,
    cache: DiCacheConfig | None = None,
) -> Iterator[tuple[str, Run]]:
    """Do the runs of `RUNS` in turn; the pipeline is then as it was."""
    yield "dense", run_uncached(pipe, inputs, decode)
    yield "sparse", run_sparse(pipe, sparse, lambda: run_uncached(pipe, inputs, decode))
    yield "DiCache", run_cached(pipe, inputs, decode, cache)
    yield "both", run_sparse(pipe, sparse, lambda: run_cached(pipe, inputs, decode, cache))


def density(run: Run) -> float:
    """Kept elements over elements of the attention that a run computed; 1 without sparsity."""
    records = [record for stats in run.sparse.values() for record in stats.records()]
    return SparseVideoGenStats({"all": records}).density


def rows(samples: Sequence[FourRuns]) -> list[Row]:
    """A row for each of `RUNS`, averaged over the samples."""
    return [_row(name, samples) for name in RUNS]


def _row(name: str, samples: Sequence[FourRuns]) -> Row:
    runs = [sample.runs[name] for sample in samples]
    calls = [_block_calls(sample, name) for sample in samples]
    shares = [
        count / _block_calls(sample, "dense") for count, sample in zip(calls, samples, strict=True)
    ]
    densities = [density(run) for run in runs]
    qualities = [sample.quality(name) for sample in samples]
    return Row(
        name,
        density=_mean(densities),
        attention=_mean([a * b for a, b in zip(densities, shares, strict=True)]),
        block_calls=_mean(calls),
        seconds=_mean([run.seconds for run in runs]),
        psnr=_mean([each.psnr for each in qualities]),
        worst_psnr=min(each.psnr for each in qualities),
        ssim=_mean([each.ssim for each in qualities]),
    )


def _block_calls(sample: FourRuns, name: str) -> int:
    """Block evaluations; a run without a cache makes all that the cached one would have made."""
    caches = sample.runs[name].caches.values()
    if caches:
        return sum(report.stats.block_calls for report in caches)
    return sum(report.block_calls_uncached for report in sample.runs["DiCache"].caches.values())


def sparse_table(model: str, samples: Sequence[FourRuns]) -> Table:
    """The table for a terminal."""
    table = Table(title=f"{model}: Sparse VideoGen and DiCache")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for row in rows(samples):
        table.add_row(*_cells(row))
    return table


def sparse_markdown(model: str, samples: Sequence[FourRuns]) -> str:
    """The same as Markdown, with what its columns mean and whether both together cost quality."""
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *(_cells(row) for row in rows(samples))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {model}\n\n{table}\n\n{NOTE} {margin_text(samples)}\n"


def margin_text(samples: Sequence[FourRuns]) -> str:
    """How far both together are from the worse of the two alone."""
    margins = [sample.margin for sample in samples]
    return (
        f"Both together against the worse one alone: {_mean(margins):+.1f} dB in the mean, "
        f"{min(margins):+.1f} dB in the worst of {len(samples)}."
    )


def sparse_to_dict(config: SparseVideoGenConfig, samples: Sequence[FourRuns]) -> dict[str, Any]:
    """Rules, rows, every sample's numbers and its heads, as plain data."""
    return {
        "config": asdict(config),
        "runs": {row.name: asdict(row) for row in rows(samples)},
        "samples": [_sample_to_dict(sample) for sample in samples],
    }


def _sample_to_dict(sample: FourRuns) -> dict[str, Any]:
    heads = {name: stats.temporal_shares() for name, stats in sample.runs["sparse"].sparse.items()}
    data = {"prompt": sample.prompt, "seed": sample.seed, "margin_db": sample.margin}
    runs = {row.name: asdict(row) for row in rows([sample])}
    return {**data, "runs": runs, "temporal_shares": heads}


def _cells(row: Row) -> tuple[str, ...]:
    def decibels(value: float) -> str:
        return "=" if value == PSNR_CAP else f"{value:.1f}"

    shares = f"{row.density:.3f}", f"{row.attention:.3f}"
    calls = f"{row.block_calls:.0f}", f"{row.seconds:.2f} s"
    likeness = decibels(row.psnr), decibels(row.worst_psnr), f"{row.ssim:.4f}"
    return row.name, *shares, *calls, *likeness


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
