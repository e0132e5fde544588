"""Where a call of the transformer stands: which guidance branch, which run, which step of how many.

Pipelines tell little of that, and each tells something else. The tracker reads what there is: the
`cache_context` of the call, the scheduler of the pipeline that the cache was applied to, the
timestep, the identity of the text embedding. What it cannot find out it leaves open, and the
session then computes.

Reading a timestep from a tensor waits for the device. Where the scheduler is known, its timesteps
are read once a run and its position tells which of them a call is at; the tensor itself is read
along with the decision. So no step waits but for its decision.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import StateManager
from torch import Tensor

from ..readback import Readback, as_number
from ..session import DiCacheSession, Step

_MOST_BRANCHES = 4
_UNKNOWN_BRANCH = (
    "The pipeline sets no cache_context and makes new text embeddings during a run, so its "
    "guidance branches cannot be told apart; steps of a new embedding are computed. Wrap the calls "
    "of the transformer in `with transformer.cache_context(name):`."
)

# What pipelines call a batch of [unconditional, conditional] samples; also without guidance.
_BRANCHES_IN_BATCH = "cond_uncond"
_TAKING_TURNS = (
    "Requests take turns on one transformer under the same cache_context, so every step is "
    "computed. Give each a transformer of its own, or a cache_context of its own name."
)


class ContextReader(StateManager):
    """What the pipeline said with `cache_context(...)`; diffusers finds it by its base class."""

    def __init__(self) -> None:
        super().__init__(dict)

    @property
    def current(self) -> Any:
        """Name and numbers of this call, or `None` where the pipeline gives none."""
        return self._context


class _NoText:
    """Stands for the text embedding of a model that takes none."""


_NO_TEXT = _NoText()


class CallTracker:
    """Opens the session's steps for one transformer.

    Args:
        session: The transformer's session.
        pipeline: The pipeline that the cache was applied to, if any. It is referenced weakly; its
            scheduler is kept, because a pipeline made by `from_pipe` shares it.

    Attributes:
        position: The last call's place in the whole run, from 0; `None` where nobody tells. Of
            Wan 2.2's second expert it counts the first one's steps, which `Step.index` does not.
    """

    def __init__(self, session: DiCacheSession, pipeline: DiffusionPipeline | None) -> None:
        self.session = session
        self.context = ContextReader()
        self.position: int | None = None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = getattr(pipeline, "scheduler", None)
        self._branches: dict[str, weakref.ref[Any]] = {}
        self._num_branches = 0
        self._timesteps: weakref.ref[Any] | None = None
        self._known_timesteps: list[float] = []  # the same on the host
        self._begin = 0  # where the run began in these timesteps
        self._scale = 1.0  # what the model is given, relative to them
        self._last_seen: tuple[Any, int | None] = (None, None)  # timestep and position
        self._is_idle = False  # whether another scheduler than ours drives the run
        self._step_indices: dict[str, int] = {}  # of each context's last call
        self._last_calls: dict[str, tuple[float | None, weakref.ref[Any]]] = {}  # timestep and text
        self._texts: dict[str, list[weakref.ref[Any]]] = {}  # that a context was called with

    def open_step(self, given: Any, text: Any) -> Step:
        """The step that a call of the transformer with this timestep and text embedding is."""
        session, context = self.session, self.context.current
        num_steps, is_last, index = self._position(given, context)
        timestep, first = as_number(given) if index is None else self._known_timesteps[index], None
        self.position = None if context is None else context.step_index
        if index is not None:  # Wan 2.2's second expert begins in the middle of the run
            begin = self._begin_of_run()
            first, self.position = self._known_timesteps[begin], index - begin
        text = text if isinstance(text, Tensor) else _first_tensor(text)
        if context is not None:
            self._notice_other_request(context.name, timestep, text)
        session.observe(timestep, num_steps, first)
        if not session.stats.contexts:  # a run begins: its branches are named anew
            self._branches.clear()
            self._num_branches = 0
        name = self._branch_name(text) if context is None else context.name
        step = session.open_step(name, is_last)
        if index is not None and step.needs_probe:
            step.promise(given, functools.partial(self._keeps, given.dtype, timestep))
        step.pairs_branches = name == _BRANCHES_IN_BATCH and self._is_guided()
        return step

    def _notice_other_request(self, name: str, timestep: float | None, text: Any) -> None:
        """Begin anew where a branch that the pipeline names comes with another request's text.

        A new text alone says little: some pipelines make one in every step. It tells if the
        timestep did not move (a second evaluation repeats the timestep, but with the same text),
        or if the text was there before: then requests take turns.
        """
        last_timestep, last_text = self._last_calls.get(name, (None, None))
        if last_text is not None and last_text() is text:  # as in nearly every call
            self._last_calls[name] = (timestep, last_text)
            return
        known = [ref for ref in self._texts.get(name, []) if ref() is not None]
        is_known = any(ref() is text for ref in known)
        self._texts[name] = known if is_known else [*known[1 - _MOST_BRANCHES :], weakref.ref(text)]
        if last_text is not None:
            if is_known and self.session.runs_on(timestep):
                self.session.warn("requests", _TAKING_TURNS)
            if is_known or (timestep is not None and timestep == last_timestep):
                self.reset()
        self._last_calls[name] = (timestep, weakref.ref(text))

    def _is_guided(self) -> bool:
        pipeline = None if self._pipeline is None else self._pipeline()
        return bool(getattr(pipeline, "do_classifier_free_guidance", False))

    def reset(self) -> None:
        """Free the session's state and forget the branches, as when a pipeline ends."""
        self.session.reset()
        self._branches.clear()
        self._num_branches = 0
        self._step_indices.clear()
        self._last_calls.clear()

    def _branch_name(self, text: Any) -> str:
        """A name for the branch by the identity of its text embedding."""
        for name, branch in self._branches.items():
            if branch() is text:
                return name
        self._drop_branches()
        name = f"branch{self._num_branches}"
        self._num_branches += 1
        self._branches[name] = weakref.ref(text)
        return name

    def _drop_branches(self) -> None:
        """Free branches nobody can ask for again, and the oldest where there are too many."""
        gone = [name for name, branch in self._branches.items() if branch() is None]
        if not gone and len(self._branches) == _MOST_BRANCHES:
            gone = [next(iter(self._branches))]
        for name in gone:
            self.session.forget(name)
            del self._branches[name]
            self.session.warn("branches", _UNKNOWN_BRANCH)

    def _position(self, timestep: Any, context: Any) -> tuple[int | None, bool | None, int | None]:
        """Number of steps, whether this is the last one, and its index in the known timesteps.

        Each is `None` as far as the pipeline does not tell.
        """
        pipeline = None if self._pipeline is None else self._pipeline()
        self._scheduler = getattr(pipeline, "scheduler", self._scheduler)
        if getattr(self._scheduler, "timesteps", None) is None:
            num_steps, is_last, index = None, None, None
        else:
            num_steps, is_last, index = self._position_in_schedule(self._scheduler, timestep)
            index = index if isinstance(timestep, Tensor) else None  # else there is nothing to read
        if context is not None and context.num_inference_steps is not None:
            num_steps, is_last = self._position_in_context(context)
        return num_steps, is_last, index

    def _position_in_context(self, given: Any) -> tuple[int, bool | None]:
        index, steps = given.step_index, given.num_inference_steps
        if index is None:
            return steps, None
        if index <= self._step_indices.get(given.name, -1):  # a branch is called once a step
            self.reset()
        self._step_indices[given.name] = index
        return steps, index >= steps - 1

    def _position_in_schedule(
        self, scheduler: Any, timestep: Any
    ) -> tuple[int | None, bool | None, int | None]:
        timesteps = scheduler.timesteps
        position = getattr(scheduler, "step_index", None)
        if self._timesteps is None or self._timesteps() is not timesteps:
            self._begin_schedule(scheduler, timestep, position)
        if self._stands_still(scheduler, timestep, position):
            self._is_idle = True  # another pipeline runs, with a scheduler of its own
        self._last_seen = (timestep, position)
        if self._is_idle:
            return None, None, None
        begin = self._begin_of_run()
        is_last = None if position is None else position >= len(timesteps) - 1
        return len(timesteps) - begin, is_last, self._index(scheduler, position, begin)

    def _begin_of_run(self) -> int:
        """Where in the known timesteps the run began."""
        begin = getattr(self._scheduler, "begin_index", None)
        return self._begin if begin is None else begin

    def _begin_schedule(self, scheduler: Any, timestep: Any, position: int | None) -> None:
        """`set_timesteps` was called: a new run."""
        self.reset()
        self._timesteps = weakref.ref(scheduler.timesteps)
        (self._known_timesteps,) = Readback(torch.as_tensor(scheduler.timesteps)).wait()
        first = as_number(timestep)
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:
            begin = self._begin = _index_of(first, self._known_timesteps)
        index = begin if position is None else position  # a second expert begins in the middle
        known = self._known_timesteps[index] if index < len(self._known_timesteps) else 0.0
        self._scale = first / known if first and known else 1.0
        self._last_seen = (timestep, position)
        self._is_idle = False

    def _keeps(self, dtype: torch.dtype, known: float | None, given: float) -> bool:
        """Whether a call's timestep is the one that the scheduler's position promised.

        Another pipeline with a scheduler of its own may go on where an aborted run left ours.
        """
        expected = (known or 0.0) * self._scale
        # bf16 rounds by 2e-3, here and in the scale.
        tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
        if abs(given - expected) <= tolerance * abs(expected) + 1e-6:
            return True
        self._is_idle = True
        return False

    def _index(self, scheduler: Any, position: int | None, begin: int) -> int | None:
        """Where this call is in the scheduler's timesteps, if they are the model's and it tells."""
        if self.session.ascending_timesteps or not hasattr(scheduler, "step_index"):
            return None
        index = begin if position is None else position
        return index if index < len(self._known_timesteps) else None

    def _stands_still(self, scheduler: Any, timestep: Any, position: int | None) -> bool:
        """Whether the scheduler has no part in this run: finished, or not moving with it."""
        if not hasattr(scheduler, "step_index"):  # this kind does not count its steps
            return False
        if position is not None and position >= len(scheduler.timesteps):
            return True
        last_timestep, last_position = self._last_seen
        if position != last_position or timestep is last_timestep:
            return False
        return as_number(timestep) != as_number(last_timestep)


def _first_tensor(text: Any) -> Any:
    """What tells a text embedding from others: some models take one a sample, or a layer."""
    while isinstance(text, (list, tuple)) and text:
        text = text[0]
    return text if isinstance(text, Tensor) else _NO_TEXT


def _index_of(timestep: float | None, timesteps: list[float]) -> int:
    """Which of the scheduler's timesteps a run begins with.

    Some video-to-video pipelines leave out the first ones without telling the scheduler. Pipelines
    that scale or round the timestep do tell it, so an unknown value stands for the first one. So
    does a first timestep in thousandths, which may be a number that the last ones have, too.
    """
    if timestep is None or not timesteps or abs(1000 * timestep - timesteps[0]) < 1:
        return 0
    return timesteps.index(timestep) if timestep in timesteps else 0
