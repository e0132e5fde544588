"""What to cache and when: `DiCacheConfig`, the published presets, and their validation.

A configuration is immutable and complete: a session never reads anything else to decide. Every
field is checked when the object is made, so a typo fails at once and not in the middle of a video.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from .error_rules import ERROR_RULES, ErrorName
from .profile import Profile

AUTO = "auto"  # a profile that the first run makes
# What a field may be, for type checkers and for `DiCacheConfig` itself.
Rounding = Literal["floor", "nearest", "next", "calls"]
Alignment = Literal["l1", "least_squares"]
Granularity = Literal["batch", "sample"]
Cfg = Literal["independent", "shared"]
Backend = Literal["auto", "reference", "cpp", "cuda", "triton"]
PresetName = Literal["flux", "flux-delta-minus", "hunyuan-video", "wan2.1"]


@dataclass(frozen=True)
class DiCacheConfig:
    r"""Rules of one DiCache run.

    `DiCacheConfig()` is this project's default: the probe verifies the trajectory (`error =
    "weighted_alignment"`, `alignment = "least_squares"`). `DiCacheConfig.preset(name)` gives the
    published rules of arXiv 2508.17356. Notation: x are the image or video tokens before block 0,
    p the same tokens after the first `probe_depth` blocks, y after the last block, q = p - x,
    r = y - x; t are timesteps, N their number.

    Args:
        threshold: A step is reused while the accumulated error stays below this value; >= 0, `inf`
            allowed. `None` takes the model family's own value when the cache is applied.
        reuse_at_threshold: Reuse also when the accumulated error equals the threshold.
        probe_depth: Number of leading blocks that form the probe, >= 1.
        retention_ratio: Share R of the N steps that is always computed at the start, 0 to 1.
        retention_rounding: How R N becomes a number of steps: `"floor"` is floor(R N), `"nearest"`
            floor(R N + 1/2), `"next"` floor(R N) + 1. `"calls"` counts as the published Wan script
            does, floor(2 R N) calls of two branches in turns: where that is odd, the second branch
            retains one step less than the first.
        compute_last_step: Always compute the last step, without asking the gate.
        error: What the gate accumulates. `"delta_y"`: mean|p - p_prev| / mean|p_prev|.
            `"delta_minus"`: |delta_y - delta_x|, delta_x being the same ratio of x. `"alignment"`:
            ||a - gamma d|| / ||q|| with a = q - q_old, d = q_new - q_old: how badly the trajectory
            predicts the probe. `"weighted_alignment"`: ||a - gamma d|| / ||p||, times the size of
            the step relative to the run's mean step, N (t_prev - t) / t_first; 1 where that is
            unknown. A misfit counts as much as it can change the picture.
        alignment: How gamma is solved. `"l1"`: mean|a| / mean|d| (the paper). `"least_squares"`:
            `<a, d> / <d, d>`.
        gamma_range: Bounds (low, high) that gamma is clipped to; `high` may be `None`.
        max_consecutive_reuse: After that many reused steps in a row the next one is computed;
            `None` sets no limit.
        schedule: A mask such as `"CCCRRC"`, one letter a step and context: `C` runs all blocks and
            records, `R` probes and reuses. It overrides threshold, retention, last step and
            limit. Steps beyond the mask are computed.
        num_inference_steps: Number N of steps of a run, where neither pipeline nor caller says it.
        granularity: `"batch"` takes one decision for the whole batch, `"sample"` one a sample: each
            has its own error, weights and schedule, as if it were generated alone.
        cfg: Classifier-free guidance. `"independent"`: every branch of a step decides for itself.
            `"shared"`: the branch that is called first decides for all, so that no step is reused
            in one branch only. The others still run their probe, for their weights, and compute
            where they must. Branches that lie in one batch decide by their mean error where every
            sample has its own decision, which then depends on its partner.
        backend: Which implementation of the operators to use; see `dicache.ops`.
        cache_dtype: What the cache keeps between steps is rounded to this dtype: `torch.bfloat16`,
            or, as an experiment, `torch.float8_e4m3fn` with a scale a token. `None` keeps the
            model's own. In both cases operators work on the model's dtypes.
        cache_device: `"cpu"` keeps it in host memory, page-locked where the model is on a GPU, and
            copies it back for the steps that need it. `None` keeps it where the model is.
        profile: What `dicache.calibrate` learned of this model, or the path of a file with it. A
            reused step is then filled in by weights of the three last computed steps that were
            fitted to the model, and which steps are computed is planned before the run, unless
            `threshold` or `schedule` is given. One tensor more is kept a context. Of the rules
            above a plan keeps `max_consecutive_reuse`, and the retained steps as far as they are
            no more than a quarter of the computed ones. `"auto"`: the first run of each model is
            computed and makes the profile of those that follow, as long as the cache stays on the
            model; a file of that name is `Path("auto")`.
        target_speedup: With a profile: block work of the un-cached run over that of the planned
            one, probes included. `None`, and no other target: what the rules without a profile
            would cost.
        target_psnr: With a profile whose gains are measured, not `"auto"`: the expected PSNR, in
            dB, of what the run returns, over the samples of the calibration.
        veto: With a plan: a step is computed all the same where the probe's misfit is more than
            this many times what the calibration saw. `None` follows the plan whatever the probe
            shows, and no step waits for the device.
        process_group: A `torch.distributed.ProcessGroup` of the ranks that run the model together
            and so have to decide as one: those that share a sequence, or the weights. `None` finds
            it where an adapter knows of it (diffusers' `enable_parallelism`, the original code,
            FSDP and DTensors), and else decides alone. Copies and pickles of a configuration that
            go to another process come without it.

    Raises:
        ValueError: A field has a value outside its range; the message names all three.
    """

    threshold: float | None = None
    reuse_at_threshold: bool = False
    probe_depth: int = 1
    retention_ratio: float = 0.1
    retention_rounding: Rounding = "floor"
    compute_last_step: bool = True
    error: ErrorName = "weighted_alignment"
    alignment: Alignment = "least_squares"
    gamma_range: tuple[float, float | None] = (0.0, 2.0)
    max_consecutive_reuse: int | None = None
    schedule: str | None = None
    num_inference_steps: int | None = None
    granularity: Granularity = "batch"
    cfg: Cfg = "shared"
    backend: Backend = "auto"
    cache_dtype: torch.dtype | None = None
    cache_device: Literal["cpu"] | None = None
    profile: Profile | str | os.PathLike[str] | None = None
    target_speedup: float | None = None
    target_psnr: float | None = None
    veto: float | None = 3.0
    process_group: Any = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            self._check("threshold", _is_number(self.threshold, 0), "None or a number >= 0")
        self._check_kind("reuse_at_threshold", bool, "True or False")
        self._check_kind("compute_last_step", bool, "True or False")
        self._check_count("probe_depth", optional=False)
        self._check_count("max_consecutive_reuse")
        self._check_count("num_inference_steps")
        ratio_ok = _is_number(self.retention_ratio, 0) and self.retention_ratio <= 1
        self._check("retention_ratio", ratio_ok, "a number from 0 to 1")
        self._check_choice("retention_rounding", get_args(Rounding))
        self._check_choice("error", get_args(ErrorName))
        self._check_choice("alignment", get_args(Alignment))
        self._check_choice("granularity", get_args(Granularity))
        self._check_choice("cfg", get_args(Cfg))
        self._check_choice("backend", get_args(Backend))
        dtypes = (None, torch.bfloat16, torch.float8_e4m3fn)
        expected = "None, torch.bfloat16 or torch.float8_e4m3fn"
        self._check("cache_dtype", self.cache_dtype in dtypes, expected)
        self._check("cache_device", self.cache_device in (None, "cpu"), "None or 'cpu'")
        self._check(
            "process_group",
            self.process_group is None or _is_process_group(self.process_group),
            "None or a torch.distributed.ProcessGroup, as torch.distributed.new_group gives one",
        )
        self._check_gamma_range()
        self._check_schedule()
        self._check_profile()
        if ERROR_RULES[self.error].verifies_alignment and self.alignment != "least_squares":
            raise ValueError(
                f"error={self.error!r} is the misfit of the least-squares gamma, but alignment is "
                f"{self.alignment!r}. Expected alignment='least_squares', or another error."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process_group": None}  # it is of this process

    def __deepcopy__(self, memo: object) -> DiCacheConfig:
        return self  # nothing can change it

    @classmethod
    def preset(cls, name: PresetName, **overrides: Any) -> DiCacheConfig:
        """The published decision rule `name`, with single fields replaced by `overrides`.

        Args:
            name: `"flux"`, `"flux-delta-minus"`, `"hunyuan-video"` or `"wan2.1"`.
            **overrides: Any field of `DiCacheConfig`.

        Raises:
            ValueError: There is no such preset or field.
        """
        if name not in _PRESETS:
            raise ValueError(f"Unknown preset {name!r}. Expected one of {', '.join(_PRESETS)}.")
        unknown = sorted(set(overrides) - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"Unknown field {unknown[0]!r} for a preset. Expected one of {known}.")
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def published_as(self) -> PresetName | None:
        """The preset all of whose rules, threshold included, are these; `None`: there is none."""
        for name, rules in _PRESETS.items():
            if all(getattr(self, field) == value for field, value in rules.items()):
                return name
        return None

    def retained_steps(self, num_inference_steps: int, follows: bool = False) -> int:
        """Number of leading steps that are always computed in a run of `num_inference_steps`.

        Args:
            num_inference_steps: N.
            follows: Whether it is a branch that is called after another one in every step.
        """
        steps = self.retention_ratio * num_inference_steps
        if self.retention_rounding == "calls":
            return (math.floor(2 * steps) + (0 if follows else 1)) // 2
        if self.retention_rounding == "next":
            return math.floor(steps) + 1
        return math.floor(steps + 0.5 if self.retention_rounding == "nearest" else steps)

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} is {getattr(self, name)!r}. Expected {expected}.")

    def _check_kind(self, name: str, kind: type, expected: str) -> None:
        self._check(name, isinstance(getattr(self, name), kind), expected)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        expected = "one of " + ", ".join(repr(choice) for choice in choices)
        self._check(name, getattr(self, name) in choices, expected)

    def _check_count(self, name: str, optional: bool = True) -> None:
        value = getattr(self, name)
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        expected = "None or an integer >= 1" if optional else "an integer >= 1"
        self._check(name, valid or (optional and value is None), expected)

    def _check_gamma_range(self) -> None:
        value = self.gamma_range
        expected = "(low, high) with 0 <= low <= high; high may be None"
        self._check("gamma_range", isinstance(value, (tuple, list)) and len(value) == 2, expected)
        low, high = value
        valid = _is_number(low, 0) and math.isfinite(low)
        valid = valid and (high is None or _is_number(high, low))
        self._check("gamma_range", valid, expected)
        object.__setattr__(self, "gamma_range", (low, high))  # a list would not be hashable

    def _check_profile(self) -> None:
        if self.profile != AUTO and isinstance(self.profile, (str, os.PathLike)):
            object.__setattr__(self, "profile", Profile.load(self.profile))
        self._check(
            "profile",
            self.profile in (None, AUTO) or isinstance(self.profile, Profile),
            "None, a Profile, the path of one, or 'auto'",
        )
        self._check(
            "target_speedup",
            self.target_speedup is None or _is_number(self.target_speedup, 1),
            "None or a number >= 1",
        )
        self._check(
            "target_psnr",
            self.target_psnr is None or _is_number(self.target_psnr, 0),
            "None or a number of dB >= 0",
        )
        self._check("veto", self.veto is None or _is_number(self.veto, 1), "None or a number >= 1")
        deciding = ("threshold", "schedule", "target_speedup", "target_psnr")
        given = [name for name in deciding if getattr(self, name) is not None]
        targets = [name for name in given if name.startswith("target")]
        if targets and self.profile is None:
            raise ValueError(
                f"{targets[0]} is {getattr(self, targets[0])} and there is no profile. Give "
                f"profile=..., which dicache.calibrate or `dicache tune` makes for your model."
            )
        if self.profile == AUTO and self.target_psnr is not None:
            raise ValueError(
                f"target_psnr is {self.target_psnr} and profile is 'auto', which takes no runs to "
                f"see how far an error goes. Expected a profile of dicache.calibrate's, or a "
                f"target_speedup."
            )
        if targets and len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given. Expected one of them.")
        verifies = ERROR_RULES[self.error].verifies_alignment
        if self.profile is not None and not verifies:
            raise ValueError(
                f"error is {self.error!r} and a profile is given, whose weights belong to the "
                f"misfit of the trajectory. Expected error='weighted_alignment' or 'alignment'."
            )

    def _check_schedule(self) -> None:
        if self.schedule is None:
            return
        valid = (
            isinstance(self.schedule, str) and self.schedule != "" and set(self.schedule) <= {*"CR"}
        )
        self._check("schedule", valid, "None or a mask of the letters C (compute) and R (reuse)")


def _is_process_group(value: object) -> bool:
    """Whether it is a group, of a torch that was built with them, and this process is in it."""
    return torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)


def _is_number(value: object, low: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= low


_PUBLISHED: dict[str, Any] = {
    "cfg": "independent",
    "error": "delta_y",
    "alignment": "l1",
    "gamma_range": (1.0, 1.5),
    "retention_ratio": 0.2,
    "compute_last_step": False,
}

_PRESETS: dict[PresetName, dict[str, Any]] = {
    "flux": {
        **_PUBLISHED,
        "threshold": 0.4,
        "retention_rounding": "next",
        "compute_last_step": True,
    },
    "flux-delta-minus": {
        **_PUBLISHED,
        "threshold": 0.08,
        "error": "delta_minus",
        "retention_ratio": 0.0,
        "retention_rounding": "next",
        "compute_last_step": True,
    },
    "hunyuan-video": {
        **_PUBLISHED,
        "threshold": 0.1,
        "reuse_at_threshold": True,
        "retention_rounding": "floor",
    },
    "wan2.1": {
        **_PUBLISHED,
        "threshold": 0.08,
        "retention_rounding": "nearest",
        "gamma_range": (1.0, 2.0),
    },
}

PRESETS = tuple(_PRESETS)  # their names
