"""Which step of which run a call is: a `Timeline` is told where every call stands, and counts.

It knows neither decisions nor tensors, so whoever only has to count steps uses it alone. What its
owner keeps for a branch hangs on the branch, and is freed with it.

`Timeline._ends` is the only place that says that a run is over and a new one begins, but for those
who were told so by the tensors themselves (`Timeline.restart`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic

from ..stats import RunStats
from .branches import MOST_BRANCHES, Branch, Branches, Group, State
from .clock import Clock
from .warning import warn_user
from .where import Where

UNTOLD = "untold"  # in the statistics, calls of which nobody could tell the branch

_MOST_RUNS = 64  # that callers with keys have at a time; the one that rested longest goes
# A whole run of so few steps in which none was like the one before is likely to be of a distilled
# model. One or two steps are no picture, but what warms a model up.
_FEW_STEPS = range(3, 9)
_FEW_MOMENTS = 4  # runs that end within them, one after another, look like requests in turns
_TURNS = 2  # of them make their histories doubtful; one more is worth a word
_TIMESTEP_WENT_BACK, _OTHER_REQUEST = "its timestep went back", "of another request"
_OTHER_DIRECTION = "its timesteps go the other way"


@dataclass(slots=True)
class Visit(Generic[State]):
    """What a timeline says of a call.

    Attributes:
        run: The run that it belongs to.
        branch: Its branch; `None` where nobody can tell.
        index: Index of the step among the branch's.
        is_last: Whether it is the run's last step, as far as anybody knows.
        size: N (t_prev - t) / t_first: the step's size relative to the run's mean; 1 if unknown.
        is_settled: Whether the branch's history is certainly its own.
        is_kept: Whether the call may become a part of its branch's history.
        has_paused: Whether the run went on without the branch since its last call.
        siblings: The branches of one prompt, where it has several calls a step: this one is among
            them by its order.
    """

    run: Run[State]
    branch: Branch[State] | None
    index: int
    is_last: bool = False
    size: float = 1.0
    is_settled: bool = False
    is_kept: bool = False
    has_paused: bool = False
    siblings: list[Branch[State]] | None = None


class Timeline(Generic[State]):
    """The runs of one model.

    Args:
        make_state: Makes what the owner keeps for a branch, from its name.
        num_steps: Number N of steps of a run, where no call says it.
        ascending_timesteps: Whether timesteps rise during a run. Where they do not, and still
            move the other way twice in a row, the direction is learned.

    Attributes:
        run: That of the last call.
        told: Causes of warnings that are given once a model. It outlives runs and `reset`.
        peers: Those of other models that share its runs.
    """

    def __init__(
        self,
        make_state: Callable[[str], State],
        num_steps: int | None = None,
        *,
        ascending_timesteps: bool = False,
    ) -> None:
        self._make_state = make_state
        self._num_steps = num_steps
        self._runs: dict[Hashable, Run[State]] = {}
        self._clock = Clock(ascending_timesteps)
        self._restless = 0  # runs in a row that ended within their first moments
        self._told_of_turns = False
        self.run: Run[State] = Run(num_steps)
        self.told: set[str] = set()
        self.peers: list[Timeline[State]] = []

    def visit(self, where: Where) -> Visit[State]:
        """Count a call.

        Raises:
            ValueError: `where.num_steps` is smaller than 1.
        """
        steps = self._num_steps if where.num_steps is None else where.num_steps
        if steps is not None and steps < 1:
            raise ValueError(f"num_inference_steps is {steps}. Expected an integer >= 1.")
        # Callers with positions, or with a key a run, say themselves which run goes on.
        is_timed = where.position is None and where.run is None
        goes_back = is_timed and self._clock.goes_back(where.timestep)
        run = self._runs.get(where.run)
        if run is None:
            return self._begin(None, where, steps, where.missed)
        group = run.branches.find(where)
        cause = self._ends(run, where, steps, goes_back, group)
        if cause is None:
            return self._visit(run, where, group)
        self._note_the_end(run, cause, where)
        if is_timed and cause not in (_TIMESTEP_WENT_BACK, _OTHER_DIRECTION):
            self._clock.begin(where.timestep)
        missed = self._clock.missed if cause is _OTHER_DIRECTION else where.missed
        return self._begin(run, where, steps, missed)

    def restart(self, run: Run[State], where: Where) -> Visit[State]:
        """A call of this run turned out to be the first one of a new one: nothing had said so."""
        self._note_the_end(run, _OTHER_REQUEST, where)
        if where.position is None and where.run is None:
            self._clock.begin(where.timestep)
        return self._begin(run, where, run.num_steps, 0)

    def tell_of_few_steps(self, run: Run[State]) -> None:
        """A branch took its last step: if the run had few and none was reused, say so, once."""
        if "few steps" in self.told or not run.was_short:
            return
        if not any(stats.num_reused for stats in (run.stats, *(p.run.stats for p in self.peers))):
            self.told.add("few steps")
            run.warn("few steps", _NOTHING_TO_REUSE.format(run.num_steps))

    def join(self, other: Timeline[State]) -> None:
        """Share runs with another model's: what either reused was reused."""
        for peer in (other, *other.peers):
            self.peers.append(peer)
            peer.peers.append(self)

    def forget(self, name: str) -> None:
        """Free what is kept for the branch of this name."""
        self.run.branches.forget(name)

    def end(self, key: Hashable) -> None:
        """Free what is kept for the run with this key, if there is any."""
        run = self._runs.pop(key, None)
        if run is not None:
            run.branches.clear()

    def holds(self, run: Run[State]) -> bool:
        """Whether this run may go on, as far as anybody knows."""
        return any(each is run for each in self._runs.values())

    def reset(self) -> None:
        """Free what is kept for all runs; the next call begins one."""
        self._runs.clear()
        self.run.branches.clear()
        self._clock.begin(None)
        self._restless, self._told_of_turns = 0, False

    def _ends(
        self,
        run: Run[State],
        where: Where,
        steps: int | None,
        goes_back: bool,
        group: Group[State] | None,
    ) -> str | None:
        """Why a call begins a new run; `None` if it goes on with the one that is known."""
        if where.begins:
            return "announced"
        if steps != run.num_steps:
            return "another number of steps"
        if steps is not None and run.is_over(where, steps):
            return "over"
        if where.position is not None and run.position is not None:
            if where.position < run.position:
                return "its position went back"
        elif goes_back:
            return _OTHER_DIRECTION if self._clock.missed else _TIMESTEP_WENT_BACK
        if where.moment is None:
            return None
        kin = run.branches.of_prompt(where) if group is None else ()
        if kin:  # of another layout: a tile at an edge, or another picture
            is_known = any(g.layout == where.layout for g in run.branches.groups(where.context))
            is_one_more = any(each.moment == where.moment for each in kin)
            return None if is_one_more and (is_known or not run.is_full) else _OTHER_REQUEST
        is_another = where.moment == run.moment and run.is_of_another_request(where, group)
        return _OTHER_REQUEST if is_another else None

    def _note_the_end(self, ended: Run[State], cause: str, where: Where) -> None:
        """Count runs that are given up early, one after another, without anybody saying so.

        One that begins where the last one did is likely to be just one more short run.
        """
        if cause not in (_TIMESTEP_WENT_BACK, _OTHER_REQUEST) or not ended.had_few_steps:
            self._restless, self._told_of_turns = 0, False
        elif ended.first_moment != (where.timestep if where.moment is None else where.moment):
            self._restless += 1

    def _begin(
        self, ended: Run[State] | None, where: Where, steps: int | None, missed: int
    ) -> Visit[State]:
        self._runs.pop(where.run, None)
        if len(self._runs) >= _MOST_RUNS:
            self.end(next(iter(self._runs)))
        first = where.timestep if where.first_timestep is None else where.first_timestep
        run: Run[State] = Run(steps, first, missed)
        run.timesteps = where.timesteps
        run.begins_at = max(0, (where.position or 0) - missed)
        if ended is not None and where.moment is not None and ended.moment == where.moment:
            if not ended.is_full:
                run.branches.displace(ended.branches)
        self._runs[where.run] = run
        return self._visit(run, where, None)

    def _visit(self, run: Run[State], where: Where, group: Group[State] | None) -> Visit[State]:
        """Count a call of this run."""
        self.run = run
        if where.run is not None:  # it is now the one that rested least
            self._runs.pop(where.run, None)
            self._runs[where.run] = run
        moment = where.timestep if where.moment is None else where.moment
        if moment != run.moment or run.moments == run.missed:
            run.moments += 1
            run.moment = moment
            if run.moments == run.missed + 1:
                run.first_moment = moment
        if where.position is not None:
            run.position = where.position
        if group is None:
            group = run.new_group(where)
        branch = None if group is None else group.next_branch(where.moment)
        if branch is None and group is not None:
            branch = run.branches.add(group, where, self._make_state)
        if branch is None or group is None:
            return Visit(run, None, run.next_untold(where))
        if group.changes > 2:  # fewer are a part of a run with other guidance than the rest
            run.warn("calls", _OTHER_NUMBER_OF_CALLS)
        is_settled = branch.is_settled and not (where.position is None and self._clock.is_uncertain)
        index = branch.next_step
        branch.next_step = index + 1
        if self._restless >= _TURNS and run.moments - run.missed <= _FEW_MOMENTS:
            is_settled = False
            if self._restless > _TURNS and not self._told_of_turns:
                self._told_of_turns = True
                run.warn("turns", _TAKING_TURNS)
        is_last = where.is_last
        if is_last is None:
            last = -1 if run.num_steps is None else run.num_steps - 1
            is_last = last in (index, run.moments - 1, where.position)
            if where.is_rounded and run.missed + group.num_calls == last + 1:
                is_last = True  # steps that shared a moment were taken for calls of one
        size = 1.0 if self._clock.ascends else _size(run, branch.timestep, where.timestep)
        has_paused = 0 < branch.seen_at < run.moments - 1
        branch.moment, branch.timestep, branch.seen_at = where.moment, where.timestep, run.moments
        siblings = group.branches if len(group.branches) > 1 else None
        return Visit(
            run, branch, index, is_last, size, is_settled, branch.is_kept, has_paused, siblings
        )


class Run(Generic[State]):
    """One pass of a denoising loop over its timesteps.

    Attributes:
        num_steps: Number N of its steps; `None` where nobody said it.
        first_timestep: Where it began.
        timesteps: Of all its steps, where they are known before.
        begins_at: Position of its first step: a model that takes over counts its own from 0.
        missed: Steps that were over before it was known to be one run.
        moments: Steps so far, the missed ones included.
        first_moment: Of its first call.
        moment, position: Of the last call.
        branches: Those of its calls.
        stats: What it did.
        is_noisy: Whether its tokens showed that every step brings new noise.
        is_overruled: Whether a caller computed a step that might have been reused.
    """

    def __init__(
        self, num_steps: int | None, first_timestep: float | None = None, missed: int = 0
    ) -> None:
        self.num_steps, self.first_timestep, self.missed = num_steps, first_timestep, missed
        self.timesteps: tuple[float, ...] | None = None
        self.begins_at = 0
        self.moments = missed
        self.first_moment: Hashable = None
        self.moment: Hashable = None
        self.position: int | None = None
        self.branches: Branches[State] = Branches(missed)
        self.stats = RunStats()
        self.is_noisy = self.is_overruled = False
        self._num_untold = 0
        self._warned: set[str] = set()

    def warn(self, cause: str, message: str) -> None:
        """Warn with `DiCacheWarning`, once per run and cause."""
        if cause not in self._warned:
            self._warned.add(cause)
            self.stats.notes.append(message)
            warn_user(message)

    @property
    def is_full(self) -> bool:
        """Whether it has come to its last step."""
        return self.num_steps is not None and self.moments >= self.num_steps

    def is_over(self, where: Where, steps: int) -> bool:
        """Whether its steps were done before this call, which is no other branch's last one."""
        if where.moment is not None:
            return self.moments >= steps and where.moment != self.moment
        known = self.branches.groups(where.context)
        if known and known[0].branches[0].next_step >= steps:
            return True
        ends = [branch.next_step >= steps for branch in self.branches]
        is_new_time = where.timestep is None or where.timestep != self.moment
        return bool(ends) and all(ends) and is_new_time

    def is_of_another_request(self, where: Where, group: Group[State] | None) -> bool:
        """Whether a call in the present moment cannot be of one of this run's branches.

        It looks like one more branch of it, or like one more call of a branch, and is the first
        one of a run that begins where this one was given up.
        """
        if group is not None:
            return self.is_full and group.was_called_in(where.moment)
        others = self.branches.groups(where.context)
        if not others:
            return False
        if where.context is not None:
            is_first_moment = self.moments - self.missed == 1
            return is_first_moment and others[0].moment == where.moment
        return all(other.is_gone for other in others) or (self.is_full and len(others) >= 4)

    @property
    def had_few_steps(self) -> bool:
        """Whether it ended early; a run that is planned for so few has not."""
        steps = max(self.moments, *(branch.next_step for branch in self.branches), 0)
        return steps - self.missed <= _FEW_MOMENTS and steps != self.num_steps

    @property
    def was_short(self) -> bool:
        """Whether it has no more steps than a few, and nothing but their errors had them computed.

        Asked in its last moment, in which a branch that was called in the one before is still to
        come.
        """
        steps = self.num_steps
        if steps is None or steps not in _FEW_STEPS or self._warned or self.is_overruled:
            return False
        is_timed = self.moment is not None
        return all(
            branch.next_step >= steps or (is_timed and self.moments - branch.seen_at != 1)
            for branch in self.branches
        )

    def new_group(self, where: Where) -> Group[State] | None:
        """The group of a prompt that was not there yet; `None` if nobody can tell."""
        if where.context is None and where.prompt is None:
            return None
        group, was_lost = self.branches.group_for(where)
        if was_lost and self.moments - self.missed > 1:
            self.warn("prompts", _UNKNOWN_BRANCH)
        return group

    def next_untold(self, where: Where) -> int:
        """Index of a call whose branch nobody can tell."""
        if where.context is None and where.prompt is None:
            self.warn("untold", _UNTOLD)
        else:
            self.warn("branches", _TOO_MANY)
        self._num_untold += 1
        return self._num_untold - 1


def _size(run: Run[State], previous: float | None, now: float | None) -> float:
    """A run leads from t_first to 0. One with rising timesteps does not say where it ends, and
    equal timesteps (rounded, or two evaluations a step) say nothing about the size.
    """
    first, steps = run.first_timestep, run.num_steps
    if previous is None or now is None or not first or not steps:
        return 1.0
    size = steps * (previous - now) / first
    return size if size > 0 else 1.0


_UNTOLD = (
    "Nobody can tell which branch of guidance a call belongs to, or where a run begins, so such "
    "calls are computed. A family's row names the arguments that tell it, in ModelFamily(timestep="
    "..., text=...); and so does `with transformer.cache_context(name):` around the calls."
)
_UNKNOWN_BRANCH = (
    "The pipeline sets no cache_context and makes new text embeddings during a run, so its "
    "guidance branches cannot be told apart; steps of a new embedding are computed. Wrap the calls "
    "of the transformer in `with transformer.cache_context(name):`."
)
_TAKING_TURNS = (
    "Timesteps go back and forth, or the size of the picture does: requests take turns on one "
    "transformer, or several in a row were given up. Steps are computed until a run goes on. Give "
    "each request a transformer of its own, or let one follow the other."
)
_OTHER_NUMBER_OF_CALLS = (
    "The transformer is called several times a step with one prompt, and the number of these calls "
    "changed, so it cannot be told which is which. They are computed until their number stays. "
    "Calls at one timestep are one step; where steps share a rounded timestep, apply the cache to "
    "the pipeline, whose scheduler tells them apart."
)
_NOTHING_TO_REUSE = (
    "None of the {} steps of this run was like enough to the one before to be reused. Those of a "
    "distilled model lie far apart, and fewer than about ten steps gain nothing from this cache. "
    "Take it off (remove_dicache), give the run more steps, or raise DiCacheConfig(threshold=...), "
    "which costs quality. This is said once."
)
_TOO_MANY = (
    f"The transformer is called more than {MOST_BRANCHES} times a step (calls at one timestep are "
    f"one step), or with more prompts than that. Only so many have a history of their own; the "
    f"others are computed."
)
