"""`Calibration`: what a profile means for the runs of one model, under a user's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..config import DiCacheConfig
from ..error_rules import ERROR_RULES
from ..profile import Profile
from .extrapolation import Entries, Extrapolation
from .planner import Planner

_TOO_DEAR = 2.0  # times the expected error: 6 dB
_MOST_FITTING = 16  # other timesteps that are remembered: every resolution may have its own


class Plan:
    """Which steps of a context are computed, and what the probe should show at the others.

    Args:
        planner: Of the model.
        computed: Number of steps that are computed.
        extrapolation: Of the context.
        config: Says which misfit the probe has.
    """

    def __init__(
        self, planner: Planner, computed: int, extrapolation: Extrapolation, config: DiCacheConfig
    ) -> None:
        self.planner, self.computed = planner, computed
        self._extrapolation, self._config = extrapolation, config

    def reuses(self, step: int, entries: Entries, left: int) -> bool:
        """Whether this step is filled in, with that many computed ones to come."""
        planner = self.planner
        if step - planner.first < planner.lead(self.computed) or not planner.has(entries):
            return False
        return step < planner.next_computed(entries, left)

    def misfit(self, step: int, entries: Entries) -> float:
        """The probe's expected misfit at a step with these entries."""
        return _misfit(self._extrapolation, self._config, step, entries)

    def is_too_dear(self, before: Entries, left: int, after: Entries) -> bool:
        """Whether a computed step that was not planned for leaves too few of them."""
        rest = self.planner.rest(after, max(left - 1, 0))
        return rest > _TOO_DEAR * self.planner.rest(before, left)


class Calibration:
    """Extrapolations and plans of one model's contexts.

    Args:
        profile: Of the pipeline.
        model: The model's name in it.
        config: Whose targets are met.
        default_threshold: What `threshold=None` means for this model, whose cost is the default.

    Raises:
        ValueError: The targets cannot be had from this profile.

    Attributes:
        num_steps: Number N of steps of a run.
        computed: Number of steps that are planned to be computed; `None`: there is no plan, the
            threshold decides.
    """

    def __init__(
        self,
        profile: Profile,
        model: str,
        config: DiCacheConfig,
        default_threshold: float | None = None,
    ) -> None:
        self.profile, self.num_steps = profile, profile.num_steps
        self._model, self._config, self._default_threshold = model, config, default_threshold
        self._fitting: dict[tuple[float, ...], Calibration | None] = {}
        self._extrapolations = _extrapolations(profile, model)
        self.computed: int | None = None
        self._planner: Planner | None = None
        if config.threshold is None and config.schedule is None:
            with torch.device("cpu"):  # whatever the default one is
                planners = {name: planner_of(profile, name, config) for name in profile.models}
                shares = planned(profile, planners, config, default_threshold)
            self._planner, self.computed = planners[model], shares[model]

    def for_run(
        self, num_steps: int | None, timesteps: tuple[float, ...] | None
    ) -> Calibration | None:
        """This for such a run, or one with what was interpolated; `None` if it cannot tell.

        Args:
            num_steps: Number of steps of the run, if it is known.
            timesteps: Its timesteps, if they are known.
        """
        known = self.profile.timesteps
        if timesteps is None or known is None:
            return self if num_steps == self.num_steps else None
        if len(timesteps) == self.num_steps and _are_close(timesteps, known):
            return self
        if timesteps not in self._fitting:
            if len(self._fitting) >= _MOST_FITTING:
                self._fitting.clear()
            self._fitting[timesteps] = self._for_timesteps(timesteps)
        return self._fitting[timesteps]

    def _for_timesteps(self, timesteps: tuple[float, ...]) -> Calibration | None:
        profile = self.profile.resampled(timesteps)
        if profile is None:
            return None
        try:
            return Calibration(profile, self._model, self._config, self._default_threshold)
        except ValueError:  # the target cannot be had in so few steps; a run is no place to say so
            return None

    @property
    def contexts(self) -> list[str]:
        """Names of those that the profile knows."""
        return [*self._extrapolations]

    def extrapolation(self, context: str) -> Extrapolation | None:
        """Of a context; `None` if the profile does not know it."""
        return self._extrapolations.get(context)

    def plan(self, context: str) -> Plan | None:
        """Of a context; `None` if the threshold decides, or the profile does not know it."""
        extrapolation = self.extrapolation(context)
        if extrapolation is None or self._planner is None or self.computed is None:
            return None
        return Plan(self._planner, self.computed, extrapolation, self._config)


def _are_close(timesteps: tuple[float, ...], known: tuple[float, ...]) -> bool:
    """Whether they differ by less than a percent of the run, as rounding makes them."""
    tolerance = abs(known[0] - known[-1]) / 100
    return all(abs(a - b) <= tolerance for a, b in zip(timesteps, known, strict=True))


def planned(
    profile: Profile,
    planners: Mapping[str, Planner],
    config: DiCacheConfig,
    default_threshold: float | None,
) -> dict[str, int]:
    """Number of computed steps of every model of a profile.

    Raises:
        ValueError: The targets cannot be had from this profile.
    """
    divisions = divided(planners)
    if config.target_psnr is not None:
        if profile.gains is None or profile.peak is None:
            raise ValueError(
                f"target_psnr is {config.target_psnr} and this profile has no measured gains, so "
                f"nothing tells how far an error goes. Calibrate with gains=6 or more, or give a "
                f"target_speedup."
            )
        target = config.target_psnr  # the last division computes every step
        return next(
            shares
            for shares in divisions.values()
            if expected_psnr(profile, expected_square(planners, shares)) >= target
        )
    if config.target_speedup is not None:
        total = computed_for(profile, config.target_speedup, least=min(divisions))
    else:
        total = default_cost(profile, config, default_threshold)
    return divisions[min(max(total, min(divisions)), max(divisions))]


def computed_for(profile: Profile, speedup: float, least: int = 1) -> int:
    """Number of computed steps with which the share of block work is nearest to 1 / speedup.

    Raises:
        ValueError: Even with the least number of them the share is larger.
    """
    steps, probe = profile.num_steps, profile.probe_share
    computed = round(steps * (1 / speedup - probe) / (1 - probe))
    if computed < least:
        first, fastest = next(iter(profile.models.values())), profile.block_speedup(least)
        raise ValueError(
            f"target_speedup is {speedup}. Expected at most {math.floor(100 * fastest) / 100}: the "
            f"probe is {first.probe_depth} of {first.identity.num_blocks} blocks, and runs in "
            f"every one of {steps} steps."
        )
    return computed


def default_cost(profile: Profile, config: DiCacheConfig, threshold: float | None) -> int:
    """Number of steps that the rules without a plan would compute of the calibration's samples."""
    if threshold is None:
        raise ValueError(
            "A profile is given, but neither threshold, target_speedup nor target_psnr, and no "
            "family's default is known here. Give DiCacheConfig(target_speedup=...) a number."
        )
    retained = config.retained_steps(profile.num_steps)
    weighted = ERROR_RULES[config.error].weighted
    total = 0
    for name in profile.models:
        extrapolation = next(iter(_extrapolations(profile, name).values()))
        entries: Entries = ()
        accumulated = 0.0
        for step in range(extrapolation.first, extrapolation.end):
            is_last = config.compute_last_step and step == profile.num_steps - 1
            if entries and step >= retained and not is_last:
                size = profile.step_size(step) if weighted else 1.0
                accumulated += size * _misfit(extrapolation, config, step, entries)
                if accumulated < threshold:
                    continue
            entries, accumulated = (step, *entries[:2]), 0.0
            total += 1
    return total


def divided(planners: Mapping[str, Planner]) -> dict[int, dict[str, int]]:
    """How computed steps are best divided among models, two or more for each, by their number."""
    best: dict[int, tuple[float, dict[str, int]]] = {0: (0.0, {})}
    for name, planner in planners.items():
        following: dict[int, tuple[float, dict[str, int]]] = {}
        for used, (cost, shares) in best.items():
            for computed in range(2, planner.num_steps + 1):
                whole = cost + planner.cost(computed)
                if whole < following.get(used + computed, (math.inf,))[0]:
                    following[used + computed] = whole, {**shares, name: computed}
        best = following
    return {total: shares for total, (_, shares) in sorted(best.items())}


def expected_square(planners: Mapping[str, Planner], shares: Mapping[str, int]) -> float:
    """Expected mean square error of what a run returns, with so many computed steps a model."""
    return sum(planners[name].square(computed) for name, computed in shares.items())


def expected_psnr(profile: Profile, square: float) -> float:
    """PSNR in dB of an expected mean square error."""
    assert profile.peak is not None  # measured with the gains
    return 10 * math.log10(profile.peak**2 / square) if square > 0 else math.inf


def _extrapolations(profile: Profile, model: str) -> dict[str, Extrapolation]:
    contexts = profile.models[model].contexts
    return {name: Extrapolation(moments) for name, moments in contexts.items()}


def _misfit(
    extrapolation: Extrapolation, config: DiCacheConfig, step: int, entries: Entries
) -> float:
    relative_to_probe = ERROR_RULES[config.error].relative_to_probe
    return extrapolation.misfit(step, entries, relative_to_probe, config.gamma_range)


def planner_of(profile: Profile, model: str, config: DiCacheConfig) -> Planner:
    """The planner of one model of a profile."""
    contexts = [*_extrapolations(profile, model).values()]
    gains = profile.gains or assumed_gains(profile)
    first = contexts[0].first
    retained = max(0, config.retained_steps(profile.num_steps) - first)
    return Planner(contexts, gains[first : contexts[0].end], retained)


def assumed_gains(profile: Profile) -> list[float]:
    """How far errors are taken to go where nobody measured it: [N], relative to each other.

    By the step's size, and the less the earlier: steps to come undo a part of an error, and none
    comes behind the last one. The numbers make about the plans that measured gains make of three
    trained flow-matching models (docs/calibration.md).
    """
    steps, times = profile.num_steps, profile.timesteps
    left = [1 - step / steps for step in range(steps)]  # share of the run that is to come
    if times is not None and times[0] > times[-1] >= 0:
        left = [time / times[0] for time in times]
    gains = [profile.step_size(step) * (1 - 0.8 * left[step]) for step in range(steps)]
    gains[-1] *= 3
    return gains
