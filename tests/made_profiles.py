"""Profiles of explicit vectors r_i and q_i, whose moments are computed here a second time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dicache.profile import Identity, ModelProfile, Moments, Profile


@dataclass(frozen=True)
class World:
    """Vectors of one context: x, q = p - x and r = y - x of every step, [n, elements]."""

    x: np.ndarray
    q: np.ndarray
    r: np.ndarray

    def moments(self, first: int = 0) -> Moments:
        size = self.x.shape[1]
        arrays = (self.r @ self.r.T, self.q @ self.q.T, self.r @ self.q.T)
        pp = ((self.x + self.q) ** 2).mean(1)
        return Moments(first, *(torch.from_numpy(each / size) for each in arrays), _own(pp))

    def tokens(self, step: int, shape: tuple[int, ...] = (1, -1, 8)) -> tuple[torch.Tensor, ...]:
        """x, p, y of a step, in fp32."""
        x, q, r = (torch.from_numpy(each[step]).reshape(shape) for each in (self.x, self.q, self.r))
        return x.float(), (x + q).float(), (x + r).float()

    def part(self, begin: int, end: int) -> World:
        return World(self.x[begin:end], self.q[begin:end], self.r[begin:end])


def world(num_steps: int, elements: int = 240, seed: int = 0, noise: float = 0.02) -> World:
    """Residuals that bend smoothly, and a probe that tells a part of it."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, num_steps)[:, None]
    bends = [t**0, t, np.sin(4 * t), np.cos(7 * t) * t]
    r = sum(bend * rng.normal(size=elements) for bend in bends)
    q = 0.3 * r + sum(0.1 * bend * rng.normal(size=elements) for bend in bends)
    r = r + noise * rng.normal(size=r.shape)
    q = q + 0.2 * noise * rng.normal(size=r.shape)
    x = (1 - t) * rng.normal(size=elements) + t * rng.normal(size=elements)
    return World(x, q, r)


def profile_of(
    contexts: dict[str, World], *, num_blocks: int = 20, first: int = 0, **fields: Any
) -> Profile:
    """A profile of one model; gains of 1 and a peak of 1, if nothing else is said."""
    moments = {name: each.moments(first) for name, each in contexts.items()}
    model = ModelProfile(Identity("Model", None, num_blocks), 1, moments)
    steps = first + len(next(iter(contexts.values())).x)
    given = {"gains": (1.0,) * steps, "peak": 1.0, **fields}
    return Profile({"transformer": model}, steps, **given)


def two_experts(one: World, boundary: int, **fields: Any) -> Profile:
    """A profile of two models, the second of which takes over at a step."""
    whole = profile_of({"cond": one}, **fields)
    parts = {"transformer": (0, boundary), "transformer_2": (boundary, len(one.x))}
    models = {
        name: replace(
            whole.models["transformer"], contexts={"cond": one.part(*span).moments(span[0])}
        )
        for name, span in parts.items()
    }
    return replace(whole, models=models)


def ridge(one: World, step: int, entries: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """Weights and their mean square error from the vectors themselves, by least squares."""
    a, b, c = (*entries, entries[-1], entries[-1])[:3]
    r, q = one.r, one.q
    differences = np.stack([r[a] - r[b], r[b] - r[c], q[step] - q[a]], axis=1)
    target, size = r[step] - r[a], len(r[a])
    used = np.flatnonzero((differences**2).mean(0) > 1e-20)
    weights = np.zeros(3)
    if len(used):
        columns = differences[:, used]
        penalty = np.diag(np.sqrt(1e-4 * (columns**2).mean(0)))
        left = np.concatenate([columns / np.sqrt(size), penalty])
        right = np.concatenate([target / np.sqrt(size), np.zeros(len(used))])
        weights[used] = np.linalg.lstsq(left, right, rcond=None)[0]
    return weights, float(((target - differences @ weights) ** 2).mean())


def _own(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
