"""What tokens meet behind the probe, which does not see it: is it still that of the trajectory?

Residuals of a ControlNet begin, end, fade, change their sign or their picture in the middle of a
run; prompts are exchanged by callbacks. Of both a sample of elements is looked at on the device,
and what it tells is read along with the decision, so that looking costs no wait.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sample import rows_of

_OTHER_PROMPT = 0.1  # of the norm; a few words of a padded prompt move it by 0.2
# Of the larger norm. On a trained Flux a ControlNet's residuals move by 0.04 to 0.07 a call in 30
# steps, by 0.2 in 8 and 0.4 in 4; one that is scaled by 0.75 moves by 0.25, one that ends by 1.
_MOVES = 0.24
_TIMES_THE_LAST = 2.0  # a run of few steps moves as far in every call
_MOVES_AT_ONCE = 0.6  # where nobody knows how far the last call moved
_LARGEST_RATIO = 1.25  # of norms, now and in an entry


class _Call:
    """What was added in one call.

    Attributes:
        numbers: [norms, moves] of all rows; on the device until it is read.
        is_judged: Whether it is known what its moves say, or does not matter any more.
    """

    __slots__ = ("is_judged", "numbers")

    def __init__(self, numbers: Tensor) -> None:
        self.numbers: Any = numbers
        self.is_judged = False


class Added:
    """Watches what is added to the tokens in the calls of one branch.

    Between two calls it moves a little, as the tokens do. More than that is a change, and so is a
    norm that has drifted away from those of the trajectory's entries.

    Attributes:
        is_watching: Whether the last call added something.
    """

    def __init__(self) -> None:
        self.is_watching = False
        self._last: tuple[Tensor, ...] = ()  # samples of the last call
        self._calls: list[_Call] = []  # the last two, and before them those that nobody read yet
        self._entries: list[_Call] = []  # those of the trajectory's entries, the older one first

    def note(self, samples: tuple[Tensor, ...]) -> None:
        """A call adds this.

        Args:
            samples: [rows, n] of each thing that is added; of another number or of other shapes
                than before they are other things.
        """
        if [*map(_kind_of, samples)] != [*map(_kind_of, self._last)]:
            self.clear()
        if samples:
            self._calls.append(_Call(_look_at(samples, self._last or samples)))
        self._last, self.is_watching = samples, bool(samples)
        self._trim()

    def ask(self) -> Tensor | None:
        """What has to be read to know more, [calls, 2, all rows]; `None` without entries."""
        if not self._entries:
            return None
        # Something is: the call that runs was looked at on the device just now.
        return torch.stack([each.numbers for each in self._to_read()])

    def has_changed(self, numbers: Sequence[Any], only_ends: bool = False) -> bool:
        """Whether what is added now is unlike that of an entry, or jumped since the older one.

        NaN is no change: what it spoils is noticed elsewhere.

        Args:
            numbers: The answer to `ask`.
            only_ends: Whether it matters only that something begins or ends.
        """
        for call, read in zip(self._to_read(), numbers, strict=True):
            call.numbers = read
        ratio = math.inf if only_ends else _LARGEST_RATIO
        now = self._calls[-1].numbers[0]
        changed = any(_differ(each.numbers[0], now, ratio) for each in self._entries)
        for place, call in enumerate(self._calls):
            if not call.is_judged and not only_ends:
                changed |= _jumps([each.numbers for each in self._calls[: place + 1][-3:]])
            call.is_judged = True
        self._trim()
        return changed

    def note_entry(self) -> None:
        """The last call becomes the trajectory's newest entry."""
        if not self._calls:
            return
        self._entries = [*self._entries[-1:], self._calls[-1]]
        for call in self._calls:  # up to the older entry: how it got there does not matter
            call.is_judged = True
            if call is self._entries[0]:
                break
        self._trim()

    def drop_entries(self) -> None:
        """There are no entries any more."""
        self._entries.clear()
        self._trim()

    def clear(self) -> None:
        """Begin anew: nothing is known."""
        self._last, self.is_watching = (), False
        self._calls.clear()
        self._entries.clear()

    def _to_read(self) -> list[_Call]:
        calls = dict.fromkeys([*self._entries, *self._calls])
        return [each for each in calls if isinstance(each.numbers, Tensor)]

    def _trim(self) -> None:
        """Keep what is to be judged, and the two calls before it, by which it is judged."""
        calls = self._calls
        if not self._entries:
            for call in calls:
                call.is_judged = True
        judged = next((k for k, call in enumerate(calls) if not call.is_judged), len(calls))
        del calls[: max(judged - 2, 0)]


class Prompt:
    """Watches the text embedding of one branch.

    Whoever exchanges it, or writes into it, is noticed by its identity, or by torch's count of
    writes; inference tensors have none. Pipelines may make a new one in every step, so it is the
    elements that say whether it is another prompt.

    Attributes:
        has_moved: Whether there may be something to `ask`.
    """

    def __init__(self) -> None:
        self.has_moved = False
        self._ref: Callable[[], Tensor | None] | None = None
        self._writes = 0
        self._sample: Tensor | None = None
        self._entries: list[Tensor] = []  # samples of the entries' prompts

    def note(self, prompt: Tensor) -> None:
        """A call has this prompt."""
        writes = 0 if prompt.is_inference() else prompt._version
        if self._ref is not None and self._ref() is prompt and self._writes == writes:
            return
        self._ref, self._writes = weakref.ref(prompt), writes
        self._sample = rows_of(prompt, prompt.shape[0] if prompt.dim() > 2 else 1)
        self.has_moved = bool(self._entries)

    def ask(self) -> Tensor | None:
        """How far each row is from the entries' prompts, [rows]; `None` if they are the same."""
        now = self._sample
        others = [each for each in self._entries if each is not now]
        if now is None or not others:
            return None
        if any(_kind_of(each) != _kind_of(now) for each in others):
            return torch.full((1,), math.inf)
        moves = [_norms(now - each) / _norms(each) for each in others]
        return moves[0] if len(moves) == 1 else torch.maximum(*moves)

    @staticmethod
    def has_changed(numbers: Sequence[float]) -> bool:
        """Whether some row's prompt is another one, by the answer to `ask`."""
        return any(move > _OTHER_PROMPT for move in numbers)

    def note_entry(self) -> None:
        """The last call becomes the trajectory's newest entry."""
        if self._sample is not None:
            self._entries = [*self._entries[-1:], self._sample]
            self.has_moved = self._entries[0] is not self._sample

    def drop_entries(self) -> None:
        """There are no entries any more."""
        self._entries.clear()
        self.has_moved = False


def _look_at(samples: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """[2, all rows] fp32: norms, and how far each row moved."""
    moves = [now - then for now, then in zip(samples, before, strict=True)]
    return torch.stack([torch.cat([*map(_norms, kind)]) for kind in (samples, moves)])


def _kind_of(sample: Tensor) -> tuple[torch.Size, torch.device]:
    return sample.shape, sample.device


def _norms(sample: Tensor) -> Tensor:
    """[rows] of [rows, n]."""
    return torch.linalg.vector_norm(sample, dim=1)


def _differ(some: list[float], others: list[float], largest_ratio: float) -> bool:
    return any(_is_unlike(a, b, largest_ratio) for a, b in zip(some, others, strict=True))


def _is_unlike(a: float, b: float, largest_ratio: float) -> bool:
    small, large = sorted((a, b))
    if small == 0.0:
        return large > 0.0
    return large > small * largest_ratio


def _jumps(calls: Sequence[list[list[float]]]) -> bool:
    """Whether the last of up to three calls moved further than a call moves."""
    *before, (norms, moves) = calls
    if not before:
        return False
    norms_before, moves_before = before[-1]
    for k, move in enumerate(moves):
        most = _MOVES_AT_ONCE
        if len(before) > 1:
            usual = _share(moves_before[k], norms_before[k], before[0][0][k])
            most = min(max(_MOVES, _TIMES_THE_LAST * usual), most)
        if _share(move, norms[k], norms_before[k]) > most:
            return True
    return False


def _share(move: float, norm: float, norm_before: float) -> float:
    largest = max(norm, norm_before)
    return move / largest if largest > 0.0 else 0.0
