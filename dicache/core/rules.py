"""`Rules`: a configuration with nothing left to find out, by which all below an adapter decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..config import AUTO, DiCacheConfig
from ..error_rules import ERROR_RULES, ErrorRule
from ..profile import Profile
from .calibration import Calibration


@dataclass(frozen=True)
class Rules:
    """`DiCacheConfig`, resolved once: a threshold and the row of its error for every model.

    Attributes:
        config: The configuration, with its threshold filled in.
        threshold: Of the accumulated error; infinite where a schedule overrides it.
        is_default: Whether the user left the threshold to us.
        error: The row of the error.
        gamma_range: Both bounds of gamma, the upper one maybe infinite.
        by_sample: Whether every sample of a batch has its own decision.
        shares_decisions: Whether branches of guidance decide as one.
        packs: Whether the cache's tensors are kept in another form than operators take.
        needs_num_steps: Whether a rule depends on the length of the run.
        counts_calls: Whether it matters to retention which branch of a step is called first.
        is_hopeful: Whether the errors decide, so that a run in which nothing was reused is news.
        calibration: What the configuration's profile means here, if it has one.
        learns: Whether the first run makes the profile.

    The other attributes are the configuration's.
    """

    config: DiCacheConfig
    threshold: float
    is_default: bool
    error: ErrorRule
    gamma_range: tuple[float, float]
    by_sample: bool
    shares_decisions: bool
    packs: bool
    needs_num_steps: bool
    counts_calls: bool
    is_hopeful: bool
    calibration: Calibration | None
    learns: bool
    veto: float | None
    reuse_at_threshold: bool
    compute_last_step: bool
    least_squares: bool
    max_consecutive_reuse: int | None
    schedule: str | None
    backend: str
    cache_dtype: torch.dtype | None
    cache_device: str | None


def resolve(
    config: DiCacheConfig, threshold: float | None = None, model: str | None = None
) -> Rules:
    """The rules that a configuration stands for.

    Args:
        config: What the user said.
        threshold: What `DiCacheConfig(threshold=None)` means here: a model family's own value.
        model: The name of the configuration's profile for this model; `None`: it has but one.

    Raises:
        ValueError: Neither gives a threshold, and there is no schedule or target; or the profile
            cannot give what is asked of it.
    """
    calibration = None
    if isinstance(config.profile, Profile):
        name = next(iter(config.profile.models)) if model is None else model
        calibration = Calibration(config.profile, name, config, threshold)
    is_default = config.threshold is None and config.schedule is None
    learns = config.profile == AUTO
    has_plan = is_default and (learns or calibration is not None)
    needs_threshold = is_default and (not has_plan or (learns and config.target_speedup is None))
    if needs_threshold and threshold is None:
        raise ValueError(
            "threshold is None, which stands for a model family's own value, and no model is "
            "known here. Give DiCacheConfig(threshold=...) a number."
        )
    if config.threshold is None and not has_plan:
        config = replace(config, threshold=threshold)
    low, high = config.gamma_range
    return Rules(
        config=config,
        threshold=_threshold(config, threshold if has_plan else config.threshold),
        is_default=is_default,
        error=ERROR_RULES[config.error],
        gamma_range=(float(low), math.inf if high is None else float(high)),
        by_sample=config.granularity == "sample",
        # A schedule is each context's own.
        shares_decisions=config.cfg == "shared" and config.schedule is None,
        packs=config.cache_dtype is not None or config.cache_device is not None,
        needs_num_steps=config.schedule is None
        and (config.retention_ratio > 0 or config.compute_last_step),
        counts_calls=config.retention_rounding == "calls",
        is_hopeful=config.schedule is None and config.threshold != 0 and config.retention_ratio < 1,
        calibration=calibration,
        learns=learns,
        veto=config.veto,
        reuse_at_threshold=config.reuse_at_threshold,
        compute_last_step=config.compute_last_step,
        least_squares=config.alignment == "least_squares",
        max_consecutive_reuse=config.max_consecutive_reuse,
        schedule=config.schedule,
        backend=config.backend,
        cache_dtype=config.cache_dtype,
        cache_device=config.cache_device,
    )


def _threshold(config: DiCacheConfig, threshold: float | None) -> float:
    """Infinite under a schedule. Beside a plan it decides in runs that the plan is not for."""
    if config.schedule is not None:
        return math.inf
    return 0.0 if threshold is None else threshold
