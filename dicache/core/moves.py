"""The first moves of a run's tokens: do they lead on, or does every step bring new noise?

A sampler without noise moves the tokens in nearly one direction for several steps. One that adds
new noise in every step takes the old noise away with the next move, so that two moves in a row
point against each other. Neighbouring steps are then unlike, and what is reused costs much more.
Nobody has to say so: the tokens show it, whoever adds the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Of the tokens' norm; below it the moves may be no more than what bf16 rounds.
_SMALLEST_MOVE = 0.02
# On three trained models, 4 to 30 steps: 0.85 or more with Euler, UniPC and DPM++, 0.4 down to -0.5
# with samplers that add noise.
_SMALLEST_COSINE = 0.4
# A two-stage scheduler corrects its move with a small one, in any direction (Heun: 0.2 of it).
_AS_LONG = (1 / 3, 3.0)


class FirstMoves:
    """Watches the tokens x of the first three steps of one branch.

    Attributes:
        are_wanted: Whether to `note` the tokens of the step that runs.
        are_due: Whether to `ask`.
    """

    def __init__(self) -> None:
        self.are_wanted, self.are_due = True, False
        self._tokens: list[Tensor] = []

    def note(self, tokens: Tensor) -> None:
        """A step began with tokens x, of which this is a sample [n]."""
        if self._tokens and self._tokens[0].shape != tokens.shape:
            self._tokens.clear()
        self._tokens.append(tokens)
        self.are_due = len(self._tokens) == 3
        self.are_wanted = not self.are_due

    def ask(self) -> Tensor:
        """Inner products of both moves and the last tokens, [3, 3] on the device."""
        tokens = torch.stack(self._tokens)
        self._tokens, self.are_due = [], False
        vectors = torch.cat([tokens.diff(dim=0), tokens[2:]])
        return (vectors[:, None] * vectors).sum(dim=-1)  # no matmul: autocast would round it

    @staticmethod
    def are_noise(numbers: Sequence[Sequence[float]]) -> bool:
        """Whether the moves were of new noise, by the answer to `ask`; NaN is none."""
        (first, product, _), (_, second, _), (_, _, tokens) = numbers
        if not min(first, second) > _SMALLEST_MOVE**2 * tokens:
            return False
        is_as_long = _AS_LONG[0] ** 2 < second / first < _AS_LONG[1] ** 2
        return is_as_long and product < _SMALLEST_COSINE * math.sqrt(first * second)
