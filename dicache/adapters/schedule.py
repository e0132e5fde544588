"""What a pipeline's scheduler tells of a call: which timestep of which run it is at.

The scheduler is one of diffusers' kind, whoever made it; nothing here imports diffusers.

Reading a timestep from a tensor waits for the device. Where the scheduler is known, its timesteps
are read once a run and its position tells which of them a call is at; the tensor itself is read
along with the decision. So no step waits but for its decision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.readback import Readback, as_number
from ..core.where import Check

# They take the scheduler's timesteps but for the last one.
_LEAVE_THE_LAST_OUT = ("LTXEulerAncestralRFScheduler",)
# They draw noise in every step, unless their configuration has an `eta` of 0.
_NOISY = {
    "CMStochasticIterativeScheduler",
    "CogVideoXDPMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "LTXEulerAncestralRFScheduler",
    "SASolverScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "TCDScheduler",
}


class Place(NamedTuple):
    """Where in a scheduler's timesteps a call is; `None` is what it does not tell.

    Attributes:
        begins: Whether a run begins: `set_timesteps` was called since the call before.
        num_steps: Number of steps of the run.
        timesteps: Of all its steps, as the scheduler counts them.
        is_last: Whether this is the last one.
        position: Place in the run, from 0.
        timestep: As the scheduler counts it.
        first_timestep: Likewise, of the run's first step.
        check: The call's own timestep, which has to be that one.
        is_noisy: Whether the scheduler adds new noise in every step.
        missed: Steps of a run that begins which are over already.
    """

    begins: bool = False
    num_steps: int | None = None
    is_last: bool | None = None
    position: int | None = None
    timestep: float | None = None
    first_timestep: float | None = None
    check: Check | None = None
    is_noisy: bool = False
    missed: int = 0
    timesteps: tuple[float, ...] | None = None


NOWHERE = Place()


class Schedule:
    """Reads a pipeline's scheduler.

    Args:
        own_timesteps: Whether the model's timesteps are others than the scheduler's times a factor.

    Attributes:
        pipeline: Set it to the pipeline whose scheduler is to be read. It is referenced weakly; its
            scheduler is kept, because a pipeline made by `from_pipe` shares it.
    """

    def __init__(self, own_timesteps: bool = False) -> None:
        self._own_timesteps = own_timesteps
        self._pipeline: Callable[[], Any] | None = None
        self._scheduler: Any = None
        self._timesteps: weakref.ref[Any] | None = None
        self._known: list[float] = []  # the same on the host
        self._begin = 0  # where the run began in these timesteps
        self._of_run: tuple[int, tuple[float, ...]] | None = None  # from where on, and which
        self._scale = 1.0  # what the model is given, relative to them
        self._last_seen: tuple[Any, int | None] = (None, None)  # timestep and position
        # Calls with a timestep tensor of their own at this position, and at an earlier one: for
        # every branch of guidance, say. As many need not be read to be known as one step's.
        self._calls = self._usual_calls = 1
        self._is_idle = False  # whether another scheduler than ours drives the run
        self._is_noisy = False

    @property
    def pipeline(self) -> Any:
        """The pipeline, as long as somebody has it."""
        return None if self._pipeline is None else self._pipeline()

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        try:
            self._pipeline = weakref.ref(pipeline)
        except TypeError:  # some objects cannot be
            self._pipeline = lambda: pipeline
        self._scheduler = getattr(pipeline, "scheduler", None)

    def read(self, timestep: Any) -> Place:
        """Where a call with this timestep is."""
        self._scheduler = getattr(self.pipeline, "scheduler", self._scheduler)
        scheduler = self._scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or isinstance(timesteps, (list, tuple)):  # some have a list at first
            return NOWHERE
        position = getattr(scheduler, "step_index", None)
        begins = self._timesteps is None or self._timesteps() is not timesteps
        if begins and self._is_another_copy(timesteps, position):
            begins = False
            self._timesteps = weakref.ref(timesteps)
        if begins:
            self._begin_schedule(timestep, position)
        was_idle = self._is_idle
        if self._stands_still(timestep, position):
            self._is_idle = True  # another pipeline runs, with a scheduler of its own
        self._last_seen = (timestep, position)
        if self._is_idle:  # its first step was taken for one of ours
            return Place(begins or not was_idle, missed=int(not was_idle and not begins))
        begin = self._begin_of_run()
        is_last = None if position is None else position >= self._last_position
        num_steps = len(timesteps) - begin
        index = self._index(position, begin)
        if index is None or not isinstance(timestep, Tensor):  # then there is nothing to read
            position = None if position is None else position - begin
            return Place(begins, num_steps, is_last, position, is_noisy=self._is_noisy)
        known, first = self._known[index], self._known[begin]
        check = Check(timestep, _Promise(self, timestep.dtype, known))
        place = index - begin
        noisy, timesteps = self._is_noisy, self._timesteps_from(begin)
        return Place(begins, num_steps, is_last, place, known, first, check, noisy, 0, timesteps)

    def _timesteps_from(self, begin: int) -> tuple[float, ...]:
        """Those of a run that began here."""
        if self._of_run is None or self._of_run[0] != begin:
            self._of_run = begin, tuple(self._known[begin:])
        return self._of_run[1]

    @property
    def _last_position(self) -> int:
        """The position from which on a step may be the last one.

        Of a pipeline that leaves out the scheduler's last timestep it is the one before. So it may
        be where that is 0: some end there, for others there is nothing left to do at 0.
        """
        known = self._known
        leaves_one = type(self._scheduler).__name__ in _LEAVE_THE_LAST_OUT
        leaves_one |= len(known) > 1 and known[-1] == 0.0 and known[0] > 0.0
        return len(known) - (2 if leaves_one else 1)

    def _begin_of_run(self) -> int:
        """Where in the known timesteps the run began."""
        begin = getattr(self._scheduler, "begin_index", None)
        return self._begin if begin is None else int(begin)

    def _is_another_copy(self, timesteps: Any, position: int | None) -> bool:
        """Whether these are the timesteps that are known, of a picture in lockstep.

        Pictures that are made side by side have a scheduler, or a state of one, each. It stands
        where the last one did, or a step further.
        """
        if len(timesteps) != len(self._known) or len(timesteps) - self._begin_of_run() < 2:
            return False
        begin = self._begin_of_run()
        now, last = (begin if each is None else each for each in (position, self._last_seen[1]))
        if now - last not in (0, 1):
            return False
        return bool(Readback(torch.as_tensor(timesteps)).wait()[0] == self._known)

    def _begin_schedule(self, timestep: Any, position: int | None) -> None:
        """`set_timesteps` was called: a new run."""
        scheduler = self._scheduler
        self._timesteps = weakref.ref(scheduler.timesteps)
        (self._known,) = Readback(torch.as_tensor(scheduler.timesteps)).wait()
        self._of_run = None
        first = as_number(timestep)
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:
            begin = self._begin = _index_of(first, self._known)
        index = begin if position is None else position  # a second expert begins in the middle
        known = self._known[index] if index < len(self._known) else 0.0
        self._scale = first / known if first and known else 1.0
        self._last_seen = (timestep, position)
        self._calls = self._usual_calls = 1
        self._is_idle = False
        self._is_noisy = adds_noise(scheduler)

    def _index(self, position: int | None, begin: int) -> int | None:
        """Where this call is in the scheduler's timesteps, if they are the model's and it tells."""
        if self._own_timesteps or not hasattr(self._scheduler, "step_index"):
            return None
        index = begin if position is None else position
        return index if index < len(self._known) else None

    def _stands_still(self, timestep: Any, position: int | None) -> bool:
        """Whether the scheduler has no part in this run: finished, or not moving with it."""
        if not hasattr(self._scheduler, "step_index"):  # this kind does not count its steps
            return False
        if position is not None and position >= len(self._scheduler.timesteps):
            return True
        last_timestep, last_position = self._last_seen
        if position != last_position:
            self._calls = 1
        if position != last_position or timestep is last_timestep:
            return False
        self._calls += 1
        if self._calls <= self._usual_calls:
            return False
        has_moved = as_number(timestep) != as_number(last_timestep)
        if not has_moved:
            self._usual_calls = self._calls
        return has_moved


class _Promise:
    """Whether a call's timestep is the one that the scheduler's position promised.

    Another pipeline with a scheduler of its own may go on where an aborted run left ours.
    """

    def __init__(self, schedule: Schedule, dtype: torch.dtype, known: float) -> None:
        self._schedule, self._dtype, self._known = schedule, dtype, known

    def __call__(self, given: float) -> bool:
        expected = self._known * self._schedule._scale
        # bf16 rounds by 2e-3, here and in the scale.
        tolerance = 1e-2 if self._dtype in (torch.bfloat16, torch.float16) else 1e-4
        if abs(given - expected) <= tolerance * abs(expected) + 1e-6:
            return True
        self._schedule._is_idle = True
        return False


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds new noise in every step, so that no step is like the one before."""
    config = getattr(scheduler, "config", {})
    if config.get("stochastic_sampling") or str(config.get("algorithm_type", "")).startswith("sde"):
        return True
    is_noisy = any(base.__name__ in _NOISY for base in type(scheduler).__mro__)
    return is_noisy and config.get("eta") != 0


def _index_of(timestep: float | None, timesteps: list[float]) -> int:
    """Which of the scheduler's timesteps a run begins with.

    Some video-to-video pipelines leave out the first ones without telling the scheduler. Pipelines
    that scale or round the timestep do tell it, so an unknown value stands for the first one. So
    does a first timestep in thousandths, which may be a number that the last ones have, too.
    """
    if timestep is None or not timesteps or abs(1000 * timestep - timesteps[0]) < 1:
        return 0
    return timesteps.index(timestep) if timestep in timesteps else 0
