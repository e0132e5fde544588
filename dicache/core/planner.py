r"""Which steps to compute: planned before a run, from what the moments say that it will cost.

A reused step T moves what the run returns by G_T e_T: e_T is the expected rms error of r^ and G_T
how far it goes (`Profile.gains`). Neighbouring steps err in nearly one direction, so their shares
are added, as lengths. e_T depends on the three last computed steps alone, so dynamic programming
over them finds the best schedule for every number of computed steps at once, and the best rest of
one from any state.

How errors go far scatters most between samples at the start of a run, where a picture is laid out,
and a few samples do not show it. So the first steps are computed whatever the sum says: those that
are retained, but no more than a quarter of the computed ones, and two at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .extrapolation import Entries, Extrapolation

_WIDEST = 8  # gaps between entries that are told apart; wider ones count as this one


class Planner:
    """The best schedules of one model's part of a run, for every number of computed steps.

    Args:
        contexts: Extrapolations of the model's contexts, which are computed and reused as one.
        gains: [n] how far an error goes, of this model's steps.
        retained: Number of this model's leading steps that the rules retain.

    Attributes:
        first: Index in the run of the first step of this model.
        num_steps: Number n of its steps.
    """

    def __init__(
        self, contexts: Sequence[Extrapolation], gains: Sequence[float], retained: int = 0
    ) -> None:
        self._contexts, self._gains, self._retained = contexts, gains, retained
        self.first = contexts[0].first
        self.num_steps = n = len(gains)
        costs = _gap_costs(contexts, torch.tensor(gains, dtype=torch.float64))
        # value[a, g1, g2, k]: least cost from the computed step a on, with k steps left to compute;
        # the two entries before a lie g1 and g1 + g2 steps behind it (0: there is none).
        width = _WIDEST + 1
        value = torch.full((n, width, width, n + 1), math.inf, dtype=torch.float64)
        choice = torch.full((n, width, width, n + 1), n, dtype=torch.int64)
        for a in range(n - 1, -1, -1):
            best = costs[a, :, :, n, None].repeat(1, 1, n + 1)  # nothing else is computed
            taken = torch.full_like(best, n, dtype=torch.int64)
            for following in range(a + 1, n):
                gap = min(following - a, _WIDEST)
                then = value[following, gap, :, :-1]  # its gap before is this state's g1
                cost = costs[a, :, :, following, None] + then[:, None, :]
                better = cost < best[..., 1:]
                best[..., 1:] = torch.where(better, cost, best[..., 1:])
                taken[..., 1:] = torch.where(better, following, taken[..., 1:])
            value[a], choice[a] = best, taken
        self._value, self._choice = value, choice

    def lead(self, computed: int) -> int:
        """Number of leading steps that are computed in any case, of so many computed ones."""
        return max(2, min(self._retained, computed // 4))

    def cost(self, computed: int) -> float:
        """The sum of G_T e_T in the best schedule with this many computed steps, >= 2."""
        lead = self.lead(computed)
        entries = tuple(self.first + step for step in range(lead - 1, max(lead - 4, -1), -1))
        return self.rest(entries, computed - lead)

    def square(self, computed: int) -> float:
        """Expected mean square error of the best schedule with this many computed steps, >= 2.

        The errors of all steps are known to their directions, so this is the square of their sum.
        """
        mask = self.schedule(computed)
        return sum(context.square(mask, self._gains) for context in self._contexts)

    def has(self, entries: Entries) -> bool:
        """Whether these are steps of this model."""
        return all(0 <= each - self.first < self.num_steps for each in entries)

    def rest(self, entries: Entries, left: int) -> float:
        """The sum of G_T e_T in the best rest of a run, `left` steps being computed."""
        return float(self._value[self._state(entries, left)])

    def next_computed(self, entries: Entries, left: int) -> int:
        """The step that is computed next, with `left` of them; the run's end if there is none."""
        return int(self._choice[self._state(entries, left)]) + self.first

    def schedule(self, computed: int) -> str:
        """The best schedule with this many computed steps, as a mask such as `"CCRC"`."""
        entries: Entries = ()
        mask, left, lead = "", computed, self.lead(computed)
        for step in range(self.first, self.first + self.num_steps):
            if len(mask) >= lead and step < self.next_computed(entries, left):
                mask += "R"
            else:
                mask += "C"
                entries, left = (step, *entries[:2]), max(left - 1, 0)
        return mask

    def _state(self, entries: Entries, left: int) -> tuple[int, int, int, int]:
        a, *older = entries
        gaps = [min(new - old, _WIDEST) for new, old in zip(entries, older, strict=False)]
        g1, g2 = (*gaps, 0, 0)[:2]
        return a - self.first, g1, g2, max(0, min(left, self.num_steps))


def _gap_costs(contexts: Sequence[Extrapolation], gains: Tensor) -> Tensor:
    """costs[a, g1, g2, m]: of reusing all steps between the computed ones a and m."""
    n, width = len(gains), _WIDEST + 1
    a, g1, g2, t = torch.meshgrid(
        torch.arange(n), torch.arange(width), torch.arange(width), torch.arange(n), indexing="ij"
    )
    # States that no run comes to, with entries before the first step, stand for the nearest one.
    b = (a - g1).clamp(min=0)
    c = torch.where(g1 > 0, b - g2, b).clamp(min=0)
    is_reused = t > a
    index = [each[is_reused] for each in (t, a, b, c)]
    square = torch.zeros(len(index[0]), dtype=torch.float64)
    for context in contexts:
        square += context.solve(*index)[1]
    damage = torch.zeros(a.shape, dtype=torch.float64)
    damage[is_reused] = gains[index[0]] * square.sqrt()
    costs = torch.zeros((n, width, width, n + 1), dtype=torch.float64)
    costs[..., 1:] = damage.cumsum(dim=-1)  # over t; nothing before a
    return costs
