"""Which branch of a run a call belongs to, by its context's name, its prompt, and its order.

A branch of guidance is known by its name, or where nobody names it by the identity of its prompt.
Where a branch is called several times a step (tiles, windows, averages, pictures in lockstep),
every call of the step has a history of its own: by its prompt, by its layout (tiles at an edge are
smaller), and where these are the same by its order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from .where import Where

MOST_BRANCHES = 32  # with histories of their own in one run; more calls of a step are computed

State = TypeVar("State")


class Branch(Generic[State]):
    """Calls that have one history: a branch of guidance, or one of its calls in every step.

    Attributes:
        name: As the statistics call it.
        place: Which one of its context's prompts it has, and which call of a step it is.
        state: What the timeline's owner keeps for it.
        next_step: Index of its next step.
        moment: Of its last call.
        timestep: Of its last step.
        seen_at: How many moments the run had with its last call.
        is_settled: Whether its history is certainly its own, as its last call showed.
        is_kept: Whether its last call may become a part of its history.
    """

    __slots__ = (
        "born",
        "is_kept",
        "is_settled",
        "moment",
        "name",
        "next_step",
        "place",
        "seen_at",
        "state",
        "timestep",
    )

    def __init__(self, name: str, place: tuple[int, int], state: State, where: Where) -> None:
        self.name, self.place, self.state = name, place, state
        self.next_step = 0
        self.born = where.moment
        self.moment: Hashable = None
        self.timestep: float | None = None
        self.seen_at = 0
        self.is_settled = self.is_kept = True


class Group(Generic[State]):
    """The branches of one prompt and layout: one, or as many as there are such calls in a step.

    Calls of a step have nothing but their order to be told apart by. So where their number was
    another one in the last step than in the one before, nobody knows which is which.

    Args:
        rank: Which one of its context's groups it is.
        where: Of its first call.

    Attributes:
        branches: In the order of calls.
        layout: Of the calls.
        moment: Of the last call.
        changes: How often the number of calls in a step changed.
        num_calls: Calls in all.
    """

    def __init__(self, rank: int, where: Where) -> None:
        self.rank = rank
        self.branches: list[Branch[State]] = []
        self.moment: Hashable = None
        self.changes = self.num_calls = 0
        self._calls = 0  # in the present moment
        self._counts = (0, 0)  # in the moment before the last one, and in the last one
        self.take(where)

    def take(self, where: Where) -> None:
        """Its prompt and layout are those by which calls are known from now on."""
        self.layout = where.layout
        self.ref = None if where.prompt is None else weakref.ref(where.prompt)

    def has_prompt(self, where: Where) -> bool:
        """Whether a call has the prompt by which this group is known."""
        prompt, ref = where.prompt, self.ref
        return prompt is None if ref is None else prompt is not None and ref() is prompt

    @property
    def is_gone(self) -> bool:
        """Whether nobody has the prompt any more."""
        return self.ref is not None and self.ref() is None

    def was_called_in(self, moment: Hashable) -> bool:
        """Whether all its calls of this moment were made, as many as in the moment before."""
        return moment == self.moment and self._calls >= self._counts[1]

    def next_branch(self, moment: Hashable) -> Branch[State] | None:
        """The branch of a call in this moment; `None` if its step never had so many calls."""
        branches, place = self.branches, 0
        self.num_calls += 1
        if moment is not None:
            if moment != self.moment:
                before, last = self._counts = (self._counts[1], self._calls)
                self.moment, self._calls = moment, 0
                if before != last:
                    self.changes += before != 0
                elif last > 0:
                    del branches[last:]
            place = self._calls
            self._calls = place + 1
        if place >= len(branches):
            return None
        branch = branches[place]
        is_alone = len(branches) == 1
        branch.is_settled = is_alone or self._counts[0] == self._counts[1]
        branch.is_kept = is_alone or place == 0 or branch.born != moment
        return branch

    def add(self, name: str, state: State, where: Where) -> Branch[State]:
        """A branch for a call that has none."""
        place = len(self.branches)
        branch = Branch(name, (self.rank, place), state, where)
        branch.is_settled = branch.is_kept = place == 0
        self.branches.append(branch)
        return branch


class Branches(Generic[State]):
    """All branches of one run.

    Args:
        missed: Steps of the run that were over before anybody knew of it.
    """

    def __init__(self, missed: int) -> None:
        self._missed = missed
        self._groups: dict[str | None, list[Group[State]]] = {}
        self._num_names: dict[str | None, int] = {}  # that were given
        self._free_names: list[str] = []  # of branches that nobody named and that are gone
        self._displaced: dict[str | None, list[weakref.ref[object]]] = {}

    def __iter__(self) -> Iterator[Branch[State]]:
        """Those that have a history now, in the order in which they came."""
        for groups in self._groups.values():
            for group in groups:
                yield from group.branches

    def groups(self, context: str | None) -> list[Group[State]]:
        """The groups of a context."""
        return self._groups.get(context, [])

    def find(self, where: Where) -> Group[State] | None:
        """The group that has a call's prompt, and its layout."""
        for group in self._groups.get(where.context, ()):
            if group.layout == where.layout and group.has_prompt(where):
                return group
        return None

    def of_prompt(self, where: Where) -> list[Group[State]]:
        """The groups that have a call's prompt, in whatever layout."""
        return [group for group in self._groups.get(where.context, ()) if group.has_prompt(where)]

    def group_for(self, where: Where) -> tuple[Group[State] | None, bool]:
        """A group for what `find` does not know, and whether that means that a branch was lost.

        There is none where there are too many already.
        """
        groups = self._groups.get(where.context, [])
        if where.context is not None and not self._is_displaced(where):
            group = _to_take(groups, where)
            if group is not None:  # pipelines may make a new embedding in every step
                group.take(where)
                return group, False
        elif where.context is None and any(group.is_gone for group in groups):
            return self._replace_gone(groups, where), True
        if self._are_enough:
            return None, False
        groups.append(Group(len(groups), where))
        self._groups[where.context] = groups
        return groups[-1], False

    def add(
        self, group: Group[State], where: Where, make_state: Callable[[str], State]
    ) -> Branch[State] | None:
        """A branch for a call of a group that has none for it; `None` if there are too many."""
        if self._are_enough:
            return None
        name = self._name(where.context)
        branch = group.add(name, make_state(name), where)
        branch.next_step = self._missed
        return branch

    def leader_of(self, branch: Branch[State], where: Where) -> Branch[State] | None:
        """The branch that decides for this one in this step; `None` if it does so itself.

        It is the one that is called first, if it did this step already. Of prompts that nobody
        named there may be two of a layout; more are no branches of one guidance.
        """
        place = branch.place
        if where.context is None:
            alike = [group for group in self._groups[None] if group.layout == where.layout]
            if len(alike) > 2:
                return None
            place = (alike[0].rank, place[1])
        for leader in self:
            if leader is branch:
                return None
            if leader.place == place:
                return leader if _did_step(leader, branch, where) else None
        return None

    def forget(self, name: str) -> None:
        """Free the branch of this name."""
        for context, groups in list(self._groups.items()):
            for group in groups:
                group.branches = [each for each in group.branches if each.name != name]
            groups[:] = [group for group in groups if group.branches]
            if not groups:
                del self._groups[context]
                if context is not None:
                    self._num_names.pop(context, None)  # the next one is called so again

    def clear(self) -> None:
        """Free all of them."""
        self._groups.clear()

    def displace(self, others: Branches[State]) -> None:
        """Those of another run were broken off where this one began, and may go on beside it."""
        for context, groups in others._groups.items():
            known = [*others._displaced.get(context, []), *(group.ref for group in groups)]
            self._displaced[context] = [
                ref for ref in known if ref is not None and ref() is not None
            ]

    def _replace_gone(self, groups: list[Group[State]], where: Where) -> Group[State]:
        """A new group in the place of the first whose prompt nobody has; all such are freed."""
        gone = [place for place, group in enumerate(groups) if group.is_gone]
        for place in gone:
            self._free_names += [branch.name for branch in groups[place].branches]
            groups[place].branches = []
        groups[gone[0]] = Group(groups[gone[0]].rank, where)
        return groups[gone[0]]

    @property
    def _are_enough(self) -> bool:
        return sum(1 for _ in self) >= MOST_BRANCHES

    def _is_displaced(self, where: Where) -> bool:
        known = self._displaced.get(where.context, ())
        return where.prompt is not None and any(ref() is where.prompt for ref in known)

    def _name(self, context: str | None) -> str:
        """A name for one more branch of a context: cond, cond#2, ...; or branch0, branch1, ..."""
        if context is None and self._free_names:
            return self._free_names.pop(0)
        number = self._num_names.get(context, 0)
        self._num_names[context] = number + 1
        if context is None:
            return f"branch{number}"
        return context if number == 0 else f"{context}#{number + 1}"


def _to_take(groups: list[Group[State]], where: Where) -> Group[State] | None:
    """The group whose prompt a call's replaces: one of its layout that rests in this moment.

    Where all rest, any of another layout will do: the tensors then tell that a new run begins.
    """
    resting = [group for group in groups if group.moment != where.moment or group.is_gone]
    alike = [group for group in resting if group.layout == where.layout]
    if not alike and len(resting) == len(groups):
        alike = resting
    return alike[0] if alike else None


def _did_step(leader: Branch[State], branch: Branch[State], where: Where) -> bool:
    """Whether a branch was called in the step that another one is in now."""
    if where.moment is not None:
        return leader.moment == where.moment
    if where.timestep is None:  # branches that are not called in every step fall out of pace
        return leader.next_step == branch.next_step
    return leader.timestep == where.timestep
