"""Which run and which step a call is, found out from what was said of it; no tensor is needed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

import pytest

from dicache import DiCacheWarning, Where
from dicache.core.branches import MOST_BRANCHES
from dicache.core.run import UNTOLD, Timeline, Visit


class Prompt:
    """Stands for a text embedding: compared by identity, referenced weakly."""


class Notes:
    """Visits a timeline, and keeps what it said."""

    def __init__(self, **options: Any) -> None:
        self.timeline: Timeline[str] = Timeline(str, **options)
        self.visits: list[Visit[str]] = []

    def __call__(self, *calls: Where) -> list[int]:
        """The number of the run that each call so far belongs to, in order of appearance."""
        self.visits += [self.timeline.visit(call) for call in calls]
        numbers: dict[int, int] = {}
        return [numbers.setdefault(id(visit.run), len(numbers)) for visit in self.visits]

    @property
    def steps(self) -> list[int]:
        return [visit.index for visit in self.visits]

    @property
    def branches(self) -> list[str]:
        return [UNTOLD if each.branch is None else each.branch.name for each in self.visits]


def times(*timesteps: float, **told: Any) -> Iterable[Where]:
    return [Where(timestep=time, moment=time, **told) for time in timesteps]


# --- what ends a run -----------------------------------------------------------------------------

PROMPT = Prompt()
GOES_ON: dict[str, list[Where]] = {
    "timesteps that fall": [*times(9, 7, 5, 3)],
    "equal timesteps": [Where(timestep=9), Where(timestep=9), Where(timestep=9)],
    "no timestep at all": [Where(), Where(), Where()],
    "positions that rise": [Where(moment=k, position=k) for k in range(3)],
    "positions under timesteps that rise": [
        Where(moment=k, position=k, timestep=100 * k) for k in range(3)
    ],
    "another branch": [Where("cond", moment=9), Where("uncond", moment=9), Where("cond", moment=7)],
    "a new embedding of a named branch": [
        Where("cond", prompt, moment=time) for time, prompt in ((9, Prompt()), (7, Prompt()))
    ],
}
BEGINS: dict[str, list[Where]] = {
    "somebody says so": [*times(9, 7), Where(timestep=5, moment=5, begins=True)],
    "timesteps go back": [*times(9, 7, 9)],
    "positions go back": [Where(moment=k, position=k) for k in (0, 1, 0)],
    "another number of steps": [Where(num_steps=9), Where(num_steps=9), Where(num_steps=8)],
    "its steps are done": [*times(9, 7, num_steps=2), Where(timestep=5, moment=5, num_steps=2)],
    "its steps are done, by count": [Where(num_steps=2), Where(num_steps=2), Where(num_steps=2)],
    "another layout": [
        *[Where(None, PROMPT, (1, 4, 8), moment=time) for time in (9, 7)],
        Where(None, PROMPT, (1, 6, 8), moment=5),
    ],
}


@pytest.mark.parametrize("calls", GOES_ON.values(), ids=GOES_ON)
def test_a_run_goes_on_with(calls: list[Where]) -> None:
    assert set(Notes()(*calls)) == {0}


@pytest.mark.parametrize("calls", BEGINS.values(), ids=BEGINS)
def test_a_new_run_begins_where(calls: list[Where]) -> None:
    notes = Notes()
    assert notes(*calls) == [0, 0, 1]
    assert notes.steps == [0, 1, 0]


def test_a_request_that_begins_where_another_was_given_up_has_a_run_of_its_own() -> None:
    """After an exception in the first step, say: same timestep, same name, another prompt."""
    first, second = Prompt(), Prompt()
    calls = [Where("cond", first, moment=9), Where("cond", second, moment=9)]
    assert Notes()(*calls, Where("cond", second, moment=7)) == [0, 1, 1]


def test_a_request_that_goes_on_beside_the_one_that_displaced_it_has_a_branch_of_its_own() -> None:
    prompts = Prompt(), Prompt()
    notes = Notes(num_steps=4)
    calls = [Where("cond", each, moment=9 - k) for k in range(4) for each in prompts]
    assert notes(*calls) == [0] + [1] * 7
    assert notes.branches[1:] == ["cond", "cond#2"] * 3 + ["cond"]


def test_calls_in_lockstep_have_branches_in_the_order_in_which_they_came() -> None:
    prompts = Prompt(), Prompt()
    notes = Notes(num_steps=4)
    notes(*(Where(None, each, moment=9 - k) for k in range(3) for each in prompts))
    assert notes.branches == ["branch0", "branch1"] * 3
    assert notes.steps == [0, 0, 1, 1, 2, 2]


def test_tiles_of_other_layouts_are_calls_of_one_step() -> None:
    notes = Notes(num_steps=3)
    tiles = [(1, 4, 8), (1, 4, 8), (1, 2, 8)]
    told = [Where("cond", PROMPT, each, moment=9 - k) for k in range(3) for each in tiles]
    assert set(notes(*told)) == {0}
    assert notes.branches == ["cond", "cond#2", "cond#3"] * 3
    assert notes.steps == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_tiles_whose_prompt_is_made_anew_in_every_step_keep_their_branches() -> None:
    notes, prompts = Notes(num_steps=3), [Prompt() for _ in range(3)]
    tiles = [(1, 4, 8), (1, 2, 8)]
    calls = [
        Where("cond", prompt, layout, moment=9 - step)
        for step, prompt in enumerate(prompts)
        for layout in tiles
    ]
    assert set(notes(*calls)) == {0}
    assert notes.branches == ["cond", "cond#2"] * 3


# --- the direction -------------------------------------------------------------------------------


def test_timesteps_that_rise_are_one_run_from_the_third_one_on() -> None:
    notes = Notes(num_steps=6)
    assert notes(*times(1, 2, 3, 4, 5, 6)) == [0, 1, 2, 2, 2, 2]
    assert notes.steps[2:] == [2, 3, 4, 5]  # the two before are counted
    assert notes.visits[-1].is_last


def test_the_direction_is_learned_once_and_learned_back() -> None:
    notes, up, down = Notes(num_steps=6), range(1, 7), range(6, 0, -1)
    notes(*times(*up))
    assert notes(*times(*up))[6:] == [3] * 6  # the next inversion: no step is missed
    assert notes(*times(*down))[12:] == [4, 5, 6, 6, 6, 6]  # begins where that one ended
    assert notes.steps[14:18] == [2, 3, 4, 5] and notes.visits[17].is_last
    assert notes(*times(*down))[18:] == [7] * 6


def test_a_family_whose_timesteps_rise_loses_none() -> None:
    assert Notes(ascending_timesteps=True)(*times(1, 2, 3)) == [0, 0, 0]


def test_an_announced_run_has_a_clock_from_its_first_timestep_on() -> None:
    calls = [Where(timestep=9, moment=9, begins=True), *times(10, 9)]
    assert Notes()(*calls) == [0, 1, 1]


@pytest.mark.parametrize("in_a_row", [2, 3, 7])
@pytest.mark.parametrize("offset", [2, 9, 20])
def test_requests_that_take_turns_of_several_steps_are_never_taken_for_one(
    offset: int, in_a_row: int
) -> None:
    """And share a prompt: the first step of a turn never has the other one's history."""
    notes, grid = Notes(), [*range(60, 0, -1)]
    notes(*times(*grid[:offset]))
    position = [offset, 0]
    while max(position) + in_a_row < 60:
        for request in (1, 0):
            turn = grid[position[request] : position[request] + in_a_row]
            position[request] += in_a_row
            begun = len(notes.visits)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                notes(*times(*turn))
            assert notes.visits[begun].index == 0 or not notes.visits[begun].is_settled


@pytest.mark.parametrize("offset", [2, 3, 5])  # by 1 they are in lockstep
def test_requests_that_take_turns_are_never_taken_for_one(offset: int) -> None:
    """Each jumps back to where it was, over the place where the other one stands."""
    notes = Notes(num_steps=12)
    one, other = [*times(*range(12, 0, -1))], [*times(*range(12, 0, -1))]
    calls = [*one[:offset]]
    for index in range(12 - offset):
        calls += [other[index], one[index + offset]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes(*calls)
    turns = notes.visits[offset:]
    assert not any(visit.is_settled and visit.index > 0 for visit in turns[4:])
    assert len(caught) == 1 and "take turns" in str(caught[0].message)


def test_a_run_that_goes_on_after_turns_is_trusted_again() -> None:
    notes = Notes(num_steps=12)
    with pytest.warns(DiCacheWarning, match="take turns"):
        notes(*times(12, 11, 12, 10, 11, 9, 10, 8, 9, 8, 7, 6, 5, 4))
    assert notes.steps[-6:] == [0, 1, 2, 3, 4, 5]
    assert [visit.is_settled for visit in notes.visits[-6:]] == [False] * 4 + [True] * 2


RUNS = [
    [*range(1000, 0, -50)],
    [1000 - 1000 / 30 * k for k in range(30)],
    [1000, 750, 500, 250],
    [1000 * 5 * s / (1 + 4 * s) for s in (1 - k / 25 for k in range(25))],  # shifted by 5
    [1000 * s**2 for s in (1 - k / 12 for k in range(12))],
]


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("first", RUNS)
@pytest.mark.parametrize("second", RUNS)
def test_runs_of_other_lengths_and_timesteps_may_follow_each_other(
    first: list[float], second: list[float], is_told: bool
) -> None:
    """A run that is over was not broken off where it ended."""
    notes = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for timesteps in (first, second, first, second):
            begun = len(notes.visits)
            num_steps = len(timesteps) if is_told else None
            notes(*times(*timesteps, num_steps=num_steps))
            visits = notes.visits[begun:]
            assert [visit.index for visit in visits] == [*range(len(timesteps))]
            # Where nobody says the length, a run that ended where this one comes by may go on.
            assert sum(not visit.is_settled for visit in visits) <= (0 if is_told else 1)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_runs_that_are_meant_to_be_short_are_no_turns(length: int) -> None:
    notes = Notes(num_steps=length)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            notes(*times(*range(9, 9 - length, -1)))
    assert all(visit.is_settled for visit in notes.visits)


# --- sizes, last steps ---------------------------------------------------------------------------


def test_a_step_is_as_large_as_its_timesteps_say() -> None:
    notes = Notes(num_steps=4)
    notes(*times(8, 7, 4, 2))
    assert [visit.size for visit in notes.visits] == [1, 0.5, 1.5, 1]


def test_a_first_timestep_that_another_model_took_counts() -> None:
    notes = Notes(num_steps=4)
    notes(*times(4, 3, first_timestep=8))
    assert notes.visits[1].size == 0.5


@pytest.mark.parametrize("branches", [["main"], ["cond", "uncond"]])
def test_the_last_step_is_the_last_of_every_branch(branches: list[str]) -> None:
    notes = Notes(num_steps=3)
    notes(*(Where(name, moment=time, timestep=time) for time in (9, 6, 3) for name in branches))
    assert [visit.is_last for visit in notes.visits] == [
        time == 3 for time in (9, 6, 3) for _ in branches
    ]


@pytest.mark.parametrize("shared", [(0, 1), (3, 4), (5, 6), (8, 9)], ids=str)
def test_steps_that_share_a_rounded_moment_count_for_the_last_one(shared: tuple[int, int]) -> None:
    notes = Notes(num_steps=10)
    moments = [20 - (shared[0] if step in shared else step) for step in range(10)]
    notes(*(Where("cond", moment=each, timestep=each, is_rounded=True) for each in moments))
    assert notes.visits[-1].is_last


def test_a_run_that_began_unnoticed_has_its_last_step_all_the_same() -> None:
    notes = Notes(num_steps=4)
    notes(Where("cond", begins=True, missed=1, moment=8), Where("cond", moment=7))
    notes(Where("cond", moment=6))
    assert notes.steps == [1, 2, 3] and notes.visits[-1].is_last


def test_a_branch_that_begins_late_has_the_runs_last_step_all_the_same() -> None:
    notes = Notes(num_steps=3)
    late = Where("late", moment=3)
    notes(Where("cond", moment=9), Where("cond", moment=6), Where("cond", moment=3), late)
    assert notes.visits[-1].is_last and notes.visits[-1].index == 0


# --- who has a run at all ------------------------------------------------------------------------


def test_callers_with_keys_have_their_runs_side_by_side() -> None:
    notes = Notes(num_steps=9)
    calls = [Where("cond", run=key, timestep=t) for t in (9, 8, 7) for key in ("b", "a")]
    assert notes(*calls) == [0, 1, 0, 1, 0, 1]
    assert notes.steps == [0, 0, 1, 1, 2, 2]
    ended = notes.visits[-1].run
    notes.timeline.end("a")
    assert not [*ended.branches]  # what they keep is free, though it was called last
    assert notes(*(Where("cond", run=key, timestep=6) for key in ("a", "b")))[6:] == [2, 0]


def test_runs_with_keys_that_nobody_ended_are_bounded() -> None:
    notes = Notes(num_steps=9)
    for key in range(1000):
        notes.timeline.visit(Where("cond", run=key))
        active = notes.timeline.visit(Where("cond", run="active", num_steps=2000))
    assert len(notes.timeline._runs) <= 64
    assert active.index == 999  # the one that is called is kept, whenever it began


def test_calls_of_which_nobody_can_tell_the_branch_are_told_once() -> None:
    notes = Notes(num_steps=9)
    with pytest.warns(DiCacheWarning, match="Nobody can tell which branch") as caught:
        notes(*(Where(None) for _ in range(5)))
    assert len(caught) == 1
    assert notes.branches == [UNTOLD] * 5 and notes.steps == [0, 1, 2, 3, 4]
    assert not any(visit.is_settled or visit.is_kept for visit in notes.visits)


def test_a_branch_whose_prompt_is_replaced_keeps_its_place() -> None:
    """So that the one that is called first goes on to decide."""
    notes, cond, uncond, leaders = Notes(num_steps=9), Prompt(), Prompt(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for time in range(9, 0, -1):
            if time == 6:
                cond = Prompt()
                gc.collect()
            for prompt in (cond, uncond):
                where = Where(None, prompt, moment=time, timestep=time)
                notes(where)
                branch = notes.visits[-1].branch
                assert branch is not None
                leader = notes.timeline.run.branches.leader_of(branch, where)
                leaders.append(None if leader is None else leader.name)
    assert leaders == [None, "branch0"] * 9


def test_the_position_says_which_step_is_the_last_one() -> None:
    notes = Notes(num_steps=6)
    notes(*(Where("cond", moment=k, position=k) for k in (0, 1, 4, 5)))
    assert [visit.is_last for visit in notes.visits] == [False, False, False, True]


def test_embeddings_that_are_made_anew_are_told_once_and_take_no_memory() -> None:
    notes = Notes(num_steps=99)
    with pytest.warns(DiCacheWarning, match="new text embeddings") as caught:
        for time in range(99, 0, -1):
            prompts = Prompt(), Prompt()
            notes(*(Where(None, each, moment=time, timestep=time) for each in prompts))
            del prompts
            gc.collect()
    assert len(caught) == 1
    assert len(list(notes.timeline.run.branches)) <= 2


def test_prompts_without_end_take_no_memory_without_end() -> None:
    """Of an engine that keeps them all, and calls each once a step."""
    notes, prompts = Notes(num_steps=9), [Prompt() for _ in range(200)]
    with pytest.warns(DiCacheWarning, match=f"more than {MOST_BRANCHES} times a step") as caught:
        notes(*(Where(None, each, moment=9, timestep=9) for each in prompts))
    assert len(caught) == 1
    assert len(list(notes.timeline.run.branches)) == MOST_BRANCHES


def test_prompts_that_come_and_go_beside_one_that_stays_have_no_more_names() -> None:
    notes, stays = Notes(num_steps=4), Prompt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            passing = Prompt()
            notes(*(Where(None, each, moment=9, timestep=9) for each in (stays, passing)))
            del passing
            gc.collect()
    assert len({*notes.branches}) <= MOST_BRANCHES + 1


def test_names_without_end_leave_nothing_behind() -> None:
    notes = Notes(num_steps=9)
    with pytest.warns(DiCacheWarning, match=f"more than {MOST_BRANCHES} times a step"):
        notes(*(Where(f"tile {k}", moment=9, timestep=9) for k in range(300)))
    assert len(notes.timeline.run.branches._groups) == MOST_BRANCHES
    assert notes.branches[MOST_BRANCHES:] == [UNTOLD] * (300 - MOST_BRANCHES)


def test_requests_that_displace_each_other_do_not_add_up() -> None:
    notes, kept = Notes(num_steps=1), [Prompt() for _ in range(100)]
    for each in kept:  # whoever keeps them all alive: a run that is over displaces nobody
        notes.timeline.visit(Where("cond", each, moment=9, timestep=9))
    assert not notes.timeline.run.branches._displaced
    for _ in range(100):
        notes.timeline.visit(Where("cond", Prompt(), moment=9, timestep=9, num_steps=9))
    assert sum(map(len, notes.timeline.run.branches._displaced.values())) <= 2


def test_one_step_requests_are_runs_and_no_branches() -> None:
    notes = Notes(num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = notes(*(Where(None, Prompt(), moment=9, timestep=9) for _ in range(50)))
    assert len(set(runs)) > 1 and len(notes.timeline._runs) == 1
    assert len(list(notes.timeline.run.branches)) <= 4


@pytest.mark.parametrize("steps", [0, -1])
def test_a_number_of_steps_below_one_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}. Expected an integer"):
        Notes()(Where(num_steps=steps))


def test_what_was_said_is_never_changed_by_the_timeline() -> None:
    where = Where("cond", moment=9, timestep=9)
    same = Where("cond", moment=9, timestep=9)
    Notes(num_steps=4)(where, where)
    assert where == same
