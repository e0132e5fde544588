"""Whether timesteps go on in the direction of a run, and which direction that is."""

from __future__ import annotations


class Clock:
    """Watches the timesteps of runs that follow each other.

    Args:
        direction: 1 where timesteps rise during a run, -1 where they fall; as far as anybody knows.

    Attributes:
        ascends: Whether timesteps rise.
        missed: Where the last timestep went back: how many steps the run that begins with it has
            behind it already.
    """

    def __init__(self, ascends: bool) -> None:
        self.ascends = ascends
        self.missed = 0
        self._last: float | None = None
        self._moves_back = 0  # in a row
        self._abandoned: float | None = None  # where the run was that another one broke off

    def goes_back(self, timestep: float | None) -> bool:
        """Take the next timestep; whether it cannot follow the last one.

        It moves against the direction. Or it jumps over the very place where the run before was
        broken off, as that run does when it goes on. Two moves in a row against the direction are
        one run in the other direction: the timesteps before them were its first two.
        """
        last, self._last = self._last, timestep if timestep is not None else self._last
        if timestep is None or last is None or timestep == last:
            return False
        if (timestep > last) != self.ascends:
            self._moves_back += 1
            self._abandoned, self.missed = last, 0
            if self._moves_back == 2:
                self.ascends, self._moves_back = not self.ascends, 0
                self._abandoned, self.missed = None, 2
            return True
        self._moves_back = 0
        if self._abandoned is None:
            return False
        is_beyond = timestep == self._abandoned or (timestep > self._abandoned) == self.ascends
        if not is_beyond:
            return False
        jumped = timestep != self._abandoned and last != self._abandoned
        self._abandoned, self.missed = (last if jumped else None), 0
        return jumped

    def reset(self) -> None:
        """Forget the timesteps; the direction stays."""
        self._last = self._abandoned = None
        self._moves_back = 0
