"""The first moves of a run's tokens: do they lead on, or does every step bring new noise?

A sampler without noise moves the tokens in nearly one direction for several steps. One that adds
new noise in every step takes the old noise away with the next move, so that two moves in a row
point against each other. Neighbouring steps are then unlike, and what is reused costs much more.
Nobody has to say so: the tokens show it, whoever adds the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# On three trained models, 4 to 30 steps: 0.85 or more with Euler, UniPC and DPM++, 0.4 down to -0.5
# with samplers that add noise.
_SMALLEST_COSINE = 0.4
# A two-stage scheduler corrects its move with a small one, in any direction (Heun: 0.2 of it).
_AS_LONG = (1 / 3, 3.0)


class FirstMoves:
    """Watches the tokens x of the first three steps of one branch."""

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []
        self._is_over = False

    @property
    def wants_tokens(self) -> bool:
        """Whether to `note` the step that runs."""
        return not self._is_over and len(self._tokens) < 3

    def note(self, tokens: Tensor) -> None:
        """A step began with tokens x, of which this is a sample [n]."""
        if self._tokens and self._tokens[0].shape != tokens.shape:
            self._tokens.clear()
        self._tokens.append(tokens)

    def ask(self) -> Tensor | None:
        """(cosine of the two moves, ratio of their lengths) on the device, once it is known."""
        if self._is_over or len(self._tokens) < 3:
            return None
        first, second, third = self._tokens
        self._tokens, self._is_over = [], True
        one, other = second - first, third - second
        length, other_length = torch.linalg.vector_norm(one), torch.linalg.vector_norm(other)
        cosine = torch.dot(one, other) / (length * other_length)
        return torch.stack([cosine, other_length / length])

    @staticmethod
    def are_noise(numbers: Sequence[float]) -> bool:
        """Whether the moves were of new noise, by the answer to `ask`."""
        cosine, ratio = numbers
        return cosine < _SMALLEST_COSINE and _AS_LONG[0] < ratio < _AS_LONG[1]
