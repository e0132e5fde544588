"""`Profile`: what an un-cached run teaches the cache about a model, as plain data in a JSON file.

`dicache.calibrate` makes one. It belongs to a model, a number of steps and a scheduler, holds no
weights and no pictures, and is 40 to 250 kB large.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = "dicache-profile-1"


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Second moments of one context's residuals over the steps of an un-cached run.

    With r_i = y - x and q_i = p - x at step i, over a fixed choice of elements of the hidden states
    and averaged over the samples of the calibration:

        rr[i, j] = mean(r_i r_j)    qq[i, j] = mean(q_i q_j)    rq[i, j] = mean(r_i q_j)

    Attributes:
        first: Index in the run of the first step; larger than 0 for a model that takes over.
        rr, qq, rq: [n, n], fp64.
        pp: [n], mean(p_i^2).
    """

    first: int
    rr: Tensor
    qq: Tensor
    rq: Tensor
    pp: Tensor

    @property
    def num_steps(self) -> int:
        """Number n of steps."""
        return len(self.pp)

    def at(self, places: Tensor) -> Moments:
        r"""Those of steps between the known ones: r and q are taken for cubic between neighbours.

        Args:
            places: fp64 [m], increasing, in steps counted from the first one.
        """
        weights = _cubic(places, self.num_steps)  # [m, n]
        rr, qq, rq = (weights @ each @ weights.T for each in (self.rr, self.qq, self.rq))
        return Moments(self.first, rr, qq, rq, weights @ self.pp)

    def __add__(self, other: Moments) -> Moments:
        """Those of the samples of both, as sums."""
        return Moments(
            self.first,
            *(mine + its for mine, its in zip(self._tensors(), other._tensors(), strict=True)),
        )

    def __truediv__(self, samples: float) -> Moments:
        """Sums over samples, as their mean."""
        return Moments(self.first, *(each / samples for each in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.rr, self.qq, self.rq, self.pp


class Identity(NamedTuple):
    """What tells a model from others: a fine-tuned or quantized one counts as the same.

    Attributes:
        model: Name of its class.
        fingerprint: Hash of its configuration; `None` if it has none.
        num_blocks: Number of its blocks.
    """

    model: str
    fingerprint: str | None
    num_blocks: int

    @classmethod
    def of(cls, model: Any, num_blocks: int) -> Identity:
        """That of a model, whose `config` is a mapping or none."""
        config = getattr(model, "config", None)
        fingerprint = None
        if isinstance(config, Mapping):
            told = {k: v for k, v in config.items() if k[0] != "_" and k != "quantization_config"}
            text = json.dumps(told, sort_keys=True, default=str)
            fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cls(type(model).__name__, fingerprint, num_blocks)

    def __str__(self) -> str:
        config = "" if self.fingerprint is None else f", configuration {self.fingerprint}"
        return f"{self.model} of {self.num_blocks} blocks{config}"


@dataclass(frozen=True, eq=False)
class ModelProfile:
    """What a profile knows of one model.

    Attributes:
        identity: Which model it is.
        probe_depth: Number of its blocks that form the probe.
        contexts: Moments of every context, by name.
    """

    identity: Identity
    probe_depth: int
    contexts: Mapping[str, Moments]


@dataclass(frozen=True, eq=False)
class Profile:
    r"""What the cache knows of a model in a run of N steps.

    Attributes:
        models: One or, for two experts, several models by their names in the pipeline.
        num_steps: Number N of steps of the run.
        timesteps: [N] of the runs, where somebody told them.
        gains: [N] how far an error in the tokens behind the last block goes: rms change of what the
            run returns over the rms error of r at that step, in all contexts at once. `None`: not
            measured (`core.calibration.assumed_gains`).
        peak: Range of what the runs return; a PSNR is relative to it.
        samples: Number of un-cached runs.
        elements: Number of elements of each sample that the moments are taken of.
        about: What else the profile belongs to, for people: versions, scheduler, guidance.

    Raises:
        ValueError: The parts do not belong together.
    """

    models: Mapping[str, ModelProfile]
    num_steps: int
    timesteps: tuple[float, ...] | None = None
    gains: tuple[float, ...] | None = None
    peak: float | None = None
    samples: int = 1
    elements: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.models or not all(each.contexts for each in self.models.values()):
            raise ValueError("The profile has no model, or one without contexts.")
        for name, model in self.models.items():
            spans = {(each.first, each.num_steps) for each in model.contexts.values()}
            first, count = min(spans)
            if len(spans) > 1 or count < 1 or not 0 <= first <= self.num_steps - count:
                raise ValueError(
                    f"The contexts of {name!r} have (first step, steps) {sorted(spans)} in a run "
                    f"of {self.num_steps}. Expected the same steps in all of them: guidance "
                    f"that pauses cannot be calibrated."
                )
        for kind, values in (("timesteps", self.timesteps), ("gains", self.gains)):
            if values is not None and not (
                len(values) == self.num_steps and all(map(math.isfinite, values))
            ):
                raise ValueError(f"{kind} are {values}. Expected {self.num_steps} finite numbers.")
        if min(self.gains or (0.0,)) < 0:
            raise ValueError(f"gains are {self.gains}. Expected numbers >= 0.")
        if self.peak is not None and not (self.peak > 0 and math.isfinite(self.peak)):
            raise ValueError(f"peak is {self.peak}. Expected None or a number > 0.")

    def block_speedup(self, computed: int) -> float:
        """Block work of an un-cached run over that of one with so many computed steps."""
        return block_speedup(self.num_steps, computed, self.probe_share)

    @property
    def probe_share(self) -> float:
        """Share of a model's blocks that form the probe."""
        first = next(iter(self.models.values()))
        return first.probe_depth / first.identity.num_blocks

    def step_size(self, step: int) -> float:
        """N (t_prev - t) / t_first, a step's size relative to the mean; 1 where it is unknown."""
        times = self.timesteps
        if times is None or step == 0 or not times[0]:
            return 1.0
        size = self.num_steps * (times[step - 1] - times[step]) / times[0]
        return size if size > 0 else 1.0

    def resampled(self, timesteps: tuple[float, ...]) -> Profile | None:
        """What this profile says of a run with other timesteps; `None` if it cannot tell.

        Moments and gains are smooth functions of the timestep, so those of steps between the known
        ones are interpolated. Steps outside of the known ones are not guessed at.
        """
        known = self.timesteps
        if known is None or len(known) < 4 or any(a <= b for a, b in pairwise(known)):
            return None
        if any(a <= b for a, b in pairwise(timesteps)) or not timesteps:
            return None
        reach = (known[0] - known[-1]) / (len(known) - 1) / 2
        if timesteps[0] > known[0] + reach or timesteps[-1] < known[-1] - 2 * reach:
            return None
        places = [_place(each, known) for each in timesteps]
        models = {}
        for name, each in self.models.items():
            if (fitting := _resampled(each, places)) is None:
                return None
            models[name] = fitting
        gains = None
        if self.gains is not None:
            gains = tuple(
                _between(self.gains, place) * size
                for place, size in zip(
                    places, _relative_sizes(timesteps, known, places), strict=True
                )
            )
        return replace(
            self, models=models, num_steps=len(timesteps), timesteps=timesteps, gains=gains
        )

    def name_of(self, name: str | None, identity: Identity, probe_depth: int) -> str:
        """The name under which this profile knows a model.

        Args:
            name: The model's in its pipeline; `None` if nobody knows it.
            identity: Which model it is.
            probe_depth: The configuration's.

        Raises:
            ValueError: The profile is of another model, or of several like this one, or was made
                with another probe.
        """
        alike = [key for key, each in self.models.items() if each.identity == identity]
        if name is not None:  # like models of one pipeline have nothing else to be told apart by
            alike = [key for key in alike if key == name]
        if len(alike) != 1:
            known = "; ".join(f"{key}: {each.identity}" for key, each in self.models.items())
            what = "does not know this model" if not alike else "knows several models like this one"
            raise ValueError(
                f"The profile {what}, {name or 'model'}: {identity}. It is of {known}. Expected "
                f"that of the model or pipeline that the cache is applied to: dicache.calibrate "
                f"makes one."
            )
        made_with = self.models[alike[0]].probe_depth
        if probe_depth != made_with:
            raise ValueError(
                f"probe_depth is {probe_depth} and the profile was made with {made_with}. Expected "
                f"the same probe."
            )
        return alike[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; a file that is there already is replaced when the new one is whole."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(self.to_dict()), encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is no profile, or one of another version.
            OSError: It cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}). Expected a profile.") from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dictionaries."""
        models = {
            name: {
                **each.identity._asdict(),
                "probe_depth": each.probe_depth,
                "contexts": {key: _moments_to_dict(m) for key, m in each.contexts.items()},
            }
            for name, each in self.models.items()
        }
        return {
            "format": FORMAT,
            "num_steps": self.num_steps,
            "timesteps": self.timesteps,
            "gains": self.gains,
            "peak": self.peak,
            "samples": self.samples,
            "elements": self.elements,
            "about": dict(self.about),
            "models": models,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """The inverse of `to_dict`.

        Raises:
            ValueError: The data is not that of a profile.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"the format is {found!r}. Expected {FORMAT!r}, as dicache.calibrate and `dicache "
                f"tune` of this version write it."
            )
        try:
            models = {
                name: ModelProfile(
                    Identity(each["model"], each["fingerprint"], each["num_blocks"]),
                    each["probe_depth"],
                    {key: _moments_from_dict(m) for key, m in each["contexts"].items()},
                )
                for name, each in data["models"].items()
            }
            timesteps, gains = data["timesteps"], data["gains"]
            return cls(
                models,
                data["num_steps"],
                None if timesteps is None else tuple(timesteps),
                None if gains is None else tuple(gains),
                data["peak"],
                data["samples"],
                data["elements"],
                data["about"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"it is not a whole profile ({type(error).__name__}: {error}). Expected what "
                f"dicache.calibrate made; make it again."
            ) from error

    def __repr__(self) -> str:
        names = ", ".join(each.identity.model for each in self.models.values())
        return f"Profile({names}, {self.num_steps} steps, {self.samples} samples)"


def _cubic(places: Tensor, count: int) -> Tensor:
    """Weights [m, count] of Lagrange's polynomials through the four points around each place."""
    width = min(4, count)
    first = (places.floor().long() - 1).clamp(0, count - width)
    weights = torch.zeros((len(places), count), dtype=torch.float64, device="cpu")
    for mine in range(width):
        weight = torch.ones_like(places)
        for other in range(width):
            if other != mine:
                weight = weight * (places - first - other) / (mine - other)
        weights.scatter_(1, (first + mine)[:, None], weight[:, None])
    return weights


def _moments_to_dict(moments: Moments) -> dict[str, Any]:
    tensors = {name: getattr(moments, name) for name in ("rr", "qq", "rq", "pp")}
    arrays = {name: _rounded(tensor.tolist()) for name, tensor in tensors.items()}
    return {"first": moments.first, **arrays}


def block_speedup(steps: int, computed: int, probe_share: float) -> float:
    """Block work of so many un-cached steps over that of a run with so many computed ones.

    The others run the probe's share of the blocks.
    """
    return steps / (computed + (steps - computed) * probe_share)


def _place(timestep: float, known: tuple[float, ...]) -> float:
    """Where a timestep lies among these, which fall: 0.5 is between the first and the second."""
    for index, (high, low) in enumerate(pairwise(known)):
        if timestep >= low:
            return max(0.0, index + (high - timestep) / (high - low))
    return float(len(known) - 1)


def _between(values: Sequence[float], place: float) -> float:
    """The geometric mean of two neighbours, weighed by how near they are."""
    index = min(int(place), len(values) - 2)
    share = place - index
    return values[index] ** (1 - share) * values[index + 1] ** share


def _relative_sizes(
    timesteps: tuple[float, ...], known: tuple[float, ...], places: list[float]
) -> list[float]:
    """The sizes of these steps over those of the known ones around them."""
    sizes = [1.0]
    for (before, now), place in zip(pairwise(timesteps), places[1:], strict=True):
        index = min(max(round(place), 1), len(known) - 1)
        sizes.append((before - now) / (known[index - 1] - known[index]))
    return sizes


def _resampled(model: ModelProfile, places: list[float]) -> ModelProfile | None:
    contexts = {}
    for name, moments in model.contexts.items():
        end = moments.first + moments.num_steps
        mine = [k for k, place in enumerate(places) if moments.first - 0.5 <= place < end - 0.5]
        if not mine:
            return None
        own = _tensor([places[k] - moments.first for k in mine])
        contexts[name] = replace(moments.at(own.clamp(min=0)), first=mine[0])
    return replace(model, contexts=contexts)


def _moments_from_dict(data: dict[str, Any]) -> Moments:
    count = len(data["pp"])
    found = []
    for name in ("rr", "qq", "rq", "pp"):
        array = _tensor(data[name])
        shape = (count,) if name == "pp" else (count, count)
        if array.shape != shape or not array.isfinite().all():
            raise ValueError(f"{name} are not {' x '.join(map(str, shape))} finite numbers")
        found.append(array)
    return Moments(int(data["first"]), *found)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")  # whatever the default device


def _rounded(value: Any) -> Any:
    """Ten digits: moments are differences of large numbers where steps are alike."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.10g}")
