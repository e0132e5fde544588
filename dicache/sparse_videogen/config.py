"""How sparse, where and when: `SparseVideoGenConfig` and its validation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SparseVideoGenConfig:
    """Rules of Sparse VideoGen (arXiv 2502.01776) on one transformer.

    Args:
        density: Share of the attention's elements that a sparse layer keeps, above 0 and up to 1.
            Text, and Wan's first frame, are always kept and count. `None` takes the model family's
            value: 0.25 for HunyuanVideo, 0.30 for Wan.
        dense_steps: Share R of a run's N steps that keep full attention at the start, 0 to 1: the
            first floor(R N + 1/2). `None` takes the family's value: 0.10 and 0.20.
        dense_layers: Number of leading blocks that keep full attention in every step, >= 0. On a
            model with a cache, the blocks of its probe do in any case.
        profiling_rows: Number of query tokens that tell a head's kind in every sparse layer and
            step, >= 1; at most all tokens of the video.
        block_size: Tokens of the square blocks that attention is computed or skipped in: a
            multiple of 16, on a GPU of 128.
        keep_heads: Number of computed sparse steps that one profiling of a layer serves in each
            context, >= 1. Profiling takes less than 1 % of what a sparse layer's attention computes
            at 720p and 129 frames, so there is little to gain. Above 1 compiled models make a third
            graph a kind of block.
        num_inference_steps: Number N of steps of a run, where the pipeline does not say it.
        stats: Whether to keep what a run's attention did for `get_sparse_videogen_stats`. Neither
            this nor `keep_heads` above 1 is for compilation with CUDA graphs, which write over
            what a block leaves behind.

    Raises:
        ValueError: A field has a value outside its range; the message names all three.
    """

    density: float | None = None
    dense_steps: float | None = None
    dense_layers: int = 1
    profiling_rows: int = 64
    block_size: int = 128
    keep_heads: int = 1
    num_inference_steps: int | None = None
    stats: bool = False

    def __post_init__(self) -> None:
        density, steps = self.density, self.dense_steps
        valid = density is None or (_is_number(density) and 0 < density <= 1)
        self._check("density", valid, "None or a number above 0 and up to 1")
        valid = steps is None or (_is_number(steps) and 0 <= steps <= 1)
        self._check("dense_steps", valid, "None or a number from 0 to 1")
        self._check("dense_layers", _is_count(self.dense_layers, 0), "an integer >= 0")
        self._check("profiling_rows", _is_count(self.profiling_rows, 1), "an integer >= 1")
        valid = _is_count(self.block_size, 16) and self.block_size % 16 == 0
        self._check("block_size", valid, "a multiple of 16 (on a GPU of 128)")
        self._check("keep_heads", _is_count(self.keep_heads, 1), "an integer >= 1")
        valid = self.num_inference_steps is None or _is_count(self.num_inference_steps, 1)
        self._check("num_inference_steps", valid, "None or an integer >= 1")
        self._check("stats", isinstance(self.stats, bool), "True or False")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}. Expected {expected}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
