"""`Where`: what somebody who knows a model says of one call of it.

It is a value. An adapter makes one from what its framework tells, and hands it to a session; it
never touches the session's state. Whatever it cannot tell it leaves out, and what the session then
cannot judge is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor


class Check(NamedTuple):
    """A call's timestep that is still on the device, and what it has to be.

    It is read along with a step's decision. Where `holds` denies it, the call is of another run
    than the session was told, and the step is computed, as the first one of a new run.

    Attributes:
        value: Of its elements the largest one is the timestep.
        holds: Whether a timestep is the right one.
    """

    value: Tensor
    holds: Callable[[float], bool]


class Where(NamedTuple):
    """Where one call of a model stands; `None` says that nobody can tell.

    Attributes:
        context: Name of the branch of guidance (`"cond"`, `"uncond"`, ...). Every branch has its
            own history and schedule.
        prompt: What tells branches apart where nobody names them, and requests that share a name:
            the text embedding, say. Compared by identity, and referenced weakly.
        layout: Shape of the tokens. Another one of the same prompt is one more call of the step in
            which it comes, a tile at an edge say, or in another moment begins a new run.
        run: Calls with the same key are of one run (a request, a pipeline's call). `None` is the
            one run of callers who have one at a time; where it ends is found out.
        begins: Whether a new run begins for certain.
        missed: Steps of the run that begins here which nobody noticed before.
        moment: Calls with the same moment are in one step. Several of one branch are then no
            further steps of it (tiles, windows, averages) but have a history each, in the order of
            their calls. `None`: every call of a branch is a step.
        is_rounded: Whether the moment is a number so rounded that neighbouring steps may share it.
        position: The step's place in the whole run, from 0. One that moved back begins a new run.
        num_steps: Number N of steps of the run; `None` takes the configuration's. Another one than
            before begins a new run.
        timesteps: Those of all N steps, where they are known before the run.
        is_last: Whether this is the run's last step; `None` counts.
        timestep: The step's timestep. Where there is no position, one that moves against the run's
            direction begins a new run; equal ones do not.
        first_timestep: That of the run's first step, where another model took it.
        leaders: For every sample of the batch, the sample that decides for it where branches of
            guidance share decisions; `None`: every sample decides for itself.
        computes_in: What lies behind the probe, where it does not see it: sparse or dense
            attention, adapters and their scales. A trajectory is of one such state, so where it
            changes the branch's trajectory begins anew.
        behind: A sample [rows, n] of each thing that is added to tokens behind the probe (residuals
            of a ControlNet), on the device: it may change much without `computes_in` telling.
            Compared with those of the trajectory's entries, when the decision is read. Their
            number and sizes are the same wherever `computes_in` is.
        check: A number that has to be read to know whether all this is true.
        is_noisy: Whether the sampler adds new noise between steps, so that neighbours are unlike.
            `None`: the tokens of the run's first steps shall tell.
    """

    context: str | None = "main"
    prompt: object = None
    layout: Hashable = None
    run: Hashable = None
    begins: bool = False
    missed: int = 0
    moment: Hashable = None
    is_rounded: bool = False
    position: int | None = None
    num_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    is_last: bool | None = None
    timestep: float | None = None
    first_timestep: float | None = None
    leaders: tuple[int, ...] | None = None
    computes_in: Hashable = None
    behind: tuple[Tensor, ...] = ()
    check: Check | None = None
    is_noisy: bool | None = False

    def without_place(self, timestep: float) -> Where:
        """The same call, of which nothing but its timestep is known to tell where it stands."""
        return self._replace(
            timesteps=None,
            begins=False,
            missed=0,
            moment=timestep,
            position=None,
            is_last=None,
            timestep=timestep,
            first_timestep=None,
            check=None,
        )
