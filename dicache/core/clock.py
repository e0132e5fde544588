"""Whether timesteps go on in the direction of a run, and which direction that is."""

from __future__ import annotations

_JUMP = 1.5  # times the step before: steps of a schedule grow by less


class Clock:
    """Watches the timesteps of runs that follow each other.

    Args:
        ascends: Whether timesteps rise during a run, as far as anybody knows.

    Attributes:
        ascends: Whether timesteps rise.
        missed: Where the last timestep went back: how many steps the run that begins with it has
            behind it already.
        is_uncertain: Whether the last step began where the run before was broken off. Both stand
            there, and nobody knows whose step it is.
    """

    def __init__(self, ascends: bool) -> None:
        self.ascends = ascends
        self.missed = 0
        self.is_uncertain = False
        self._last: float | None = None
        self._step: float | None = None  # from the timestep before the last one, in this run
        self._moves_back = 0  # in a row
        self._abandoned: float | None = None  # where the run was that another one broke off

    def goes_back(self, timestep: float | None) -> bool:
        """Take the next timestep; whether it cannot follow the last one.

        It moves against the direction. Or it jumps over the very place where the run before was
        broken off, as that run does when it goes on. Two moves in a row against the direction are
        one run in the other direction: the timesteps before them were its first two.
        """
        last = self._last
        if timestep is None or timestep == last:
            return False
        self._last, self.missed = timestep, 0
        if last is None:
            return False
        if (timestep > last) != self.ascends:
            self._move_back(last)
            return True
        self._moves_back = 0
        before, self._step = self._step, abs(timestep - last)
        abandoned = self._abandoned
        self.is_uncertain = last == abandoned
        if abandoned is None or timestep == abandoned or (timestep > abandoned) != self.ascends:
            return False  # it is not beyond that place
        self._abandoned = None
        if self.is_uncertain or before is not None and self._step <= _JUMP * before:
            return False
        self._step = None
        return True

    def begin(self, timestep: float | None) -> None:
        """A new run begins here for another reason: what came before is over."""
        self._last, self._step, self._abandoned, self._moves_back = timestep, None, None, 0
        self.is_uncertain = False

    def _move_back(self, last: float) -> None:
        self._moves_back += 1
        self._abandoned, self._step, self.is_uncertain = last, None, False
        if self._moves_back == 2:
            self.ascends, self._moves_back = not self.ascends, 0
            self._abandoned, self.missed = None, 2
