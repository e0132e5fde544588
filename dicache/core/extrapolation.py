r"""How a calibrated cache fills a step in, and how far off that will be: small linear systems.

At step T with the computed steps a > b > c, newest first,

    r^ = r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (q_T - q_a)

w is the ridge solution that the moments of an un-cached run give. With fewer entries the older ones
stand for themselves: b = a makes the first difference zero, and its weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..profile import Moments

_RIDGE = 1e-4  # of the diagonal: neighbouring steps are nearly alike
_NOISE = 1e-9  # of r^2 and q^2: moments have ten digits, and differences of steps fewer
_TINY = 1e-30

Entries = tuple[int, ...]  # indices in the run of the last computed steps, newest first


class Extrapolation:
    """Weights and expected errors of one context, by the step and its entries.

    Args:
        moments: Of the context, over all steps that its model takes.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self.first = moments.first
        self.end = moments.first + moments.num_steps
        self._solved: dict[tuple[int, Entries], tuple[tuple[float, ...], float]] = {}

    def knows(self, step: int, entries: Entries) -> bool:
        """Whether the moments have this step and these entries."""
        return bool(entries) and all(self.first <= each < self.end for each in (step, *entries))

    def weights(self, step: int, entries: Entries) -> tuple[float, ...]:
        """(w1, w2, w3) of a step that is filled in from one to three entries."""
        return self._solution(step, entries)[0]

    def error(self, step: int, entries: Entries) -> float:
        """Expected mean square error of r^, in the units of r^2."""
        return self._solution(step, entries)[1]

    def misfit(
        self,
        step: int,
        entries: Entries,
        relative_to_probe: bool,
        gamma_range: tuple[float, float | None] = (0.0, None),
    ) -> float:
        """What `ops.alignment_statistics` is expected to give as error."""
        qq, pp = self._moments.qq, self._moments.pp
        t, a, b = (each - self.first for each in (step, *_filled(entries)[:2]))
        aa = qq[t, t] - 2 * qq[t, b] + qq[b, b]
        ad = qq[t, a] - qq[t, b] - qq[a, b] + qq[b, b]
        dd = qq[a, a] - 2 * qq[a, b] + qq[b, b]
        gamma = (ad / dd if dd > 0 else torch.ones_like(ad)).clamp(*gamma_range)
        square = aa - 2 * gamma * ad + gamma * gamma * dd
        size = pp[t] if relative_to_probe else qq[t, t]
        return float((square.clamp(min=0) / size.clamp(min=_TINY)).sqrt())

    def _solution(self, step: int, entries: Entries) -> tuple[tuple[float, ...], float]:
        key = (step, entries)
        known = self._solved.get(key)
        if known is None:
            index = _indices(step, entries) - self.first
            weights, errors = self.solve(*index.unbind(dim=1))
            known = self._solved[key] = tuple(weights[0].tolist()), float(errors[0])
        return known

    def square(self, mask: str, gains: Sequence[float]) -> float:
        r"""Mean square of sum_T G_T (r^_T - r_T) over the reused steps of a schedule.

        Args:
            mask: Of all steps of this context, beginning with a computed one.
            gains: G of these steps.
        """
        moments = self._moments
        total = torch.zeros(2 * len(mask), dtype=torch.float64)  # of every r, then of every q
        entries: Entries = ()
        for index, (letter, gain) in enumerate(zip(mask, gains, strict=True)):
            if letter == "C":
                entries = (self.first + index, *entries[:2])
                continue
            w1, w2, w3 = self.weights(self.first + index, entries)
            a, b, c = (each - self.first for each in _filled(entries))
            terms = ((a, 1 + w1), (b, w2 - w1), (c, -w2), (index, -1.0))
            for place, factor in (*terms, (len(mask) + index, w3), (len(mask) + a, -w3)):
                total[place] += gain * factor
        rows = torch.cat([moments.rr, moments.rq], 1), torch.cat([moments.rq.T, moments.qq], 1)
        return max(0.0, float(total @ torch.cat(rows) @ total))

    def error_of(self, step: int, entries: Entries, weights: Sequence[float]) -> float:
        """Mean square error of r^ with these weights."""
        index = _indices(step, entries) - self.first
        matrix, target, uu = self._system(*index.unbind(dim=1))
        w = torch.tensor([weights], dtype=torch.float64, device="cpu")
        return max(0.0, float(_error(matrix, target, uu, w)))

    def solve(self, t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [M, 3] and expected mean square errors [M] of many steps at once.

        Args:
            t, a, b, c: int64 [M], steps and entries counted from the moments' first one.
        """
        matrix, target, uu = self._system(t, a, b, c)
        rr, qq = self._moments.rr.diagonal(), self._moments.qq.diagonal()
        noise = _NOISE * torch.stack([rr[a], rr[b], qq[a]], dim=-1)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        ridge = torch.diag_embed(_RIDGE * diagonal + noise + _TINY)
        weights = torch.linalg.solve(matrix + ridge, target)
        return weights, _error(matrix, target, uu, weights).clamp(min=0)

    def _system(self, t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inner products of the differences [M, 3, 3], with r_T - r_a [M, 3], and of that [M]."""
        rr, qq, rq = self._moments.rr, self._moments.qq, self._moments.rq
        v11 = rr[a, a] - 2 * rr[a, b] + rr[b, b]
        v22 = rr[b, b] - 2 * rr[b, c] + rr[c, c]
        v33 = qq[t, t] - 2 * qq[t, a] + qq[a, a]
        v12 = rr[a, b] - rr[a, c] - rr[b, b] + rr[b, c]
        v13 = rq[a, t] - rq[a, a] - rq[b, t] + rq[b, a]
        v23 = rq[b, t] - rq[b, a] - rq[c, t] + rq[c, a]
        u1 = rr[t, a] - rr[t, b] - rr[a, a] + rr[a, b]
        u2 = rr[t, b] - rr[t, c] - rr[a, b] + rr[a, c]
        u3 = rq[t, t] - rq[t, a] - rq[a, t] + rq[a, a]
        uu = rr[t, t] - 2 * rr[t, a] + rr[a, a]
        rows = [[v11, v12, v13], [v12, v22, v23], [v13, v23, v33]]
        matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        return matrix, torch.stack([u1, u2, u3], dim=-1), uu


def _error(matrix: Tensor, target: Tensor, uu: Tensor, weights: Tensor) -> Tensor:
    fitted = (weights[:, None, :] @ matrix @ weights[:, :, None]).flatten()
    return uu - 2 * (weights * target).sum(dim=-1) + fitted


def _indices(step: int, entries: Entries) -> Tensor:
    return torch.tensor([[step, *_filled(entries)]], device="cpu")  # whatever the default device


def _filled(entries: Entries) -> tuple[int, int, int]:
    """Three entries; those that are missing are the oldest one that is there."""
    oldest = entries[-1]
    a, b, c = (*entries, oldest, oldest)[:3]
    return a, b, c
