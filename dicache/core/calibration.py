"""`Calibration`: what a profile means for the runs of one model, under a user's rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..config import DiCacheConfig
from ..profile import Profile
from .extrapolation import Entries, Extrapolation
from .planner import Planner

_TOO_DEAR = 2.0  # times the expected error: 6 dB


class Plan:
    """A planner, and how many steps of a run it may compute.

    Args:
        planner: Of the model.
        computed: Number of steps that are computed.
        misfit: The probe's expected misfit at a step with these entries.
    """

    def __init__(
        self, planner: Planner, computed: int, misfit: Callable[[int, Entries], float]
    ) -> None:
        self.planner, self.computed, self.misfit = planner, computed, misfit

    def reuses(self, step: int, entries: Entries, left: int) -> bool:
        """Whether this step is filled in, with that many computed ones to come."""
        planner = self.planner
        if step - planner.first < planner.lead(self.computed) or not planner.has(entries):
            return False
        return step < planner.next_computed(entries, left)

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
        self._relative_to_probe = config.error != "alignment"
        self._extrapolations = _extrapolations(profile, model)
        self.computed: int | None = None
        self._planner: Planner | None = None
        if config.threshold is not None or config.schedule is not None:
            return
        planners = {name: _planner(profile, name, config) for name in profile.models}
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
            profile = self.profile.resampled(timesteps)
            self._fitting[timesteps] = (
                None
                if profile is None
                else Calibration(profile, self._model, self._config, self._default_threshold)
            )
        return self._fitting[timesteps]

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
        known = extrapolation

        def misfit(step: int, entries: Entries) -> float:
            return known.misfit(step, entries, self._relative_to_probe)

        return Plan(self._planner, self.computed, misfit)


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
    least, most = 2 * len(planners), sum(each.num_steps for each in planners.values())
    if config.target_psnr is not None:
        if profile.gains is None or profile.peak is None:
            raise ValueError(
                f"target_psnr is {config.target_psnr} and this profile has no measured gains, so "
                f"nothing tells how far an error goes. Calibrate with gains=6 or more, or give a "
                f"target_speedup."
            )
        for total in range(least, most + 1):
            shares = divided(planners, total)
            square = sum(planners[name].square(computed) for name, computed in shares.items())
            if expected_psnr(profile, square) >= config.target_psnr:
                return shares
        return {name: each.num_steps for name, each in planners.items()}
    if config.target_speedup is not None:
        total = computed_for(profile, config.target_speedup)
    else:
        total = default_cost(profile, config, default_threshold)
    return divided(planners, max(least, min(total, most)))


def computed_for(profile: Profile, speedup: float) -> int:
    """Number of computed steps with which the share of block work is nearest to 1 / speedup."""
    first = next(iter(profile.models.values()))
    probe = first.probe_depth / first.identity.num_blocks
    steps = profile.num_steps
    return round(steps * (1 / speedup - probe) / (1 - probe))


def default_cost(profile: Profile, config: DiCacheConfig, threshold: float | None) -> int:
    """Number of steps that the rules without a plan would compute of the calibration's samples."""
    if threshold is None:
        raise ValueError(
            "A profile is given, but neither threshold, target_speedup nor target_psnr, and no "
            "family's default is known here. Give DiCacheConfig(target_speedup=...) a number."
        )
    total = 0
    for name in profile.models:
        extrapolation = next(iter(_extrapolations(profile, name).values()))
        retained = config.retained_steps(profile.num_steps)
        entries: Entries = ()
        accumulated = 0.0
        for step in range(extrapolation.first, extrapolation.end):
            is_last = step == profile.num_steps - 1
            if entries and step >= retained and not is_last:
                misfit = extrapolation.misfit(step, entries, relative_to_probe=True)
                accumulated += misfit * profile.step_size(step)
                if accumulated < threshold:
                    continue
            entries, accumulated = (step, *entries[:2]), 0.0
            total += 1
    return total


def divided(planners: Mapping[str, Planner], total: int) -> dict[str, int]:
    """How `total` computed steps are best divided among models, two or more for each."""
    best: dict[int, tuple[float, dict[str, int]]] = {0: (0.0, {})}
    for name, planner in planners.items():
        following: dict[int, tuple[float, dict[str, int]]] = {}
        for used, (cost, shares) in best.items():
            for computed in range(2, min(planner.num_steps, total - used) + 1):
                whole = cost + planner.cost(computed)
                if whole < following.get(used + computed, (math.inf,))[0]:
                    following[used + computed] = whole, {**shares, name: computed}
        best = following
    return best[total][1]


def expected_psnr(profile: Profile, square: float) -> float:
    """PSNR in dB of an expected mean square error."""
    assert profile.peak is not None  # measured with the gains
    return 10 * math.log10(profile.peak**2 / square) if square > 0 else math.inf


def _extrapolations(profile: Profile, model: str) -> dict[str, Extrapolation]:
    contexts = profile.models[model].contexts
    return {name: Extrapolation(moments) for name, moments in contexts.items()}


def _planner(profile: Profile, model: str, config: DiCacheConfig) -> Planner:
    contexts = [*_extrapolations(profile, model).values()]
    gains = profile.gains or [profile.step_size(step) for step in range(profile.num_steps)]
    first = contexts[0].first
    retained = max(0, config.retained_steps(profile.num_steps) - first)
    return Planner(contexts, gains[first : contexts[0].end], retained)
