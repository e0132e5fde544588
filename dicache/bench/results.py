"""Plain numbers of a comparison: points, the curve through them, and what a file keeps of both."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from dicache.likeness import METRICS

_NEAR = 0.01  # a cost that is missed by less counts as met


class Spread(NamedTuple):
    """Over the samples; the worst tenth of them begins at `tenth`."""

    mean: float
    tenth: float
    worst: float


@dataclass(frozen=True)
class Point:
    """All samples of one method at one setting.

    Attributes:
        setting: The method's.
        cost: Block work un-cached over cached, at the model's own and at its sibling's depth.
        seconds: Of a sample, on average.
        likeness: Every sample's, by metric.
    """

    setting: float
    cost: tuple[float, float]
    seconds: float
    likeness: dict[str, list[float]]

    def spread(self, metric: str) -> Spread:
        """Mean, 10th percentile (linear between samples) and worst."""
        sign = 1 if METRICS[metric][2] else -1
        values = sorted(sign * value for value in self.likeness[metric])  # worst first
        place = 0.1 * (len(values) - 1)
        low, share = int(place), place % 1
        tenth = values[low] + share * (values[min(low + 1, len(values) - 1)] - values[low])
        return Spread(sign * mean(values), sign * tenth, sign * values[0])


@dataclass
class Result:
    """One model's comparison.

    Attributes:
        model: The subject's name.
        steps: Of an un-cached run.
        depths: Blocks of the model and of its sibling; the same where it has none.
        sibling: The real model's name, if it stands for one.
        targets: Costs that were asked for.
        seeds: The first one and their number.
        seconds: Of an un-cached sample, on average.
        about: Machine, versions, command, calibration.
        curves: Points of every method, from dear to cheap.
        failures: Why a method has none.
        promises: Methods whose setting is a speed-up at the model's own depth.
    """

    model: str
    steps: int
    depths: tuple[int, int]
    sibling: str | None
    targets: tuple[float, ...]
    seeds: tuple[int, int]
    seconds: float
    about: dict[str, str]
    curves: dict[str, list[Point]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    promises: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Those that were measured."""
        points = [point for curve in self.curves.values() for point in curve]
        return [name for name in METRICS if points and name in points[0].likeness]

    def keep(self, before: Result) -> None:
        """Take over what an earlier run found, if it is of the same samples and versions."""
        mine, its = ((r.model, r.steps, r.depths, r.seeds) for r in (self, before))
        if mine != its or self.about.get("versions") != before.about.get("versions"):
            return
        self.curves = {**before.curves, **self.curves}
        self.failures = {**before.failures, **self.failures}
        self.promises = list(dict.fromkeys([*before.promises, *self.promises]))
        for key in ("command", "calibration"):
            facts = [r.about[key] for r in (before, self) if key in r.about]
            self.about[key] = "; ".join(dict.fromkeys(facts))

    def save(self, path: Path) -> None:
        """Everything, as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Result:
        """What `save` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("depths", "targets", "seeds"):
            data[key] = tuple(data[key])
        data["curves"] = {
            name: [Point(**{**point, "cost": tuple(point["cost"])}) for point in points]
            for name, points in data["curves"].items()
        }
        return cls(**data)

    def save_csv(self, path: Path) -> None:
        """A line a point."""
        spreads = [f"{metric}_{which}" for metric in self.metrics for which in Spread._fields]
        names = ["model", "method", "setting", "cost_own_depth", "cost_sibling_depth", "seconds"]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, *spreads])
            for name, points in self.curves.items():
                for point in points:
                    numbers = [point.setting, *point.cost, point.seconds]
                    for metric in self.metrics:
                        numbers += point.spread(metric)
                    writer.writerow([self.model, name, *(f"{number:.6g}" for number in numbers)])


def at_cost(points: Sequence[Point], depth: int, target: float, metric: str) -> Spread | None:
    """Likeness at a cost, linear in it between the two points around; `None` if there are none.

    Args:
        points: Of one method.
        depth: 0 for the model's own, 1 for its sibling's.
        target: The cost.
        metric: Which likeness.
    """
    curve = sorted((point.cost[depth], point.spread(metric)) for point in points)
    for (left, before), (right, after) in pairwise(curve):
        if left <= target <= right:
            share = (target - left) / max(right - left, 1e-9)
            return Spread(*(a + share * (b - a) for a, b in zip(before, after, strict=True)))
    if not curve:
        return None
    cost, spread = min(curve, key=lambda each: abs(each[0] - target))
    return spread if abs(cost - target) <= _NEAR * target else None
