"""Where a call of a diffusers transformer stands, from all that pipelines tell.

They tell little, and each tells something else. There is the `cache_context` of the call, the
scheduler of the pipeline that a feature was applied to, the timestep, the text embedding. What they
do not tell is left open, and computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from ...core.readback import as_number
from ...core.where import Where
from ...driver.conditions import Conditions
from ...driver.families import ModelFamily
from ..schedule import NOWHERE, Schedule
from .conditioning import Adapters

# What pipelines call a batch of [unconditional, conditional] samples; also without guidance.
_BRANCHES_IN_BATCH = "cond_uncond"


_HALF = (torch.bfloat16, torch.float16)


class ContextReader(StateManager):
    """What the pipeline said with `cache_context(...)`; diffusers finds it by its base class."""

    def __init__(self) -> None:
        super().__init__(dict)


class _NoText:
    """Stands for the text embedding of a model that takes none."""


_NO_TEXT = _NoText()


class DiffusersLocator:
    """Tells where calls of one transformer stand.

    Args:
        transformer: diffusers' model, or one whose family says what its arguments are called.
        family: Its row.
        parameters: Names of its `forward`'s parameters; `None` if it takes any.

    Attributes:
        context: Where diffusers puts what the pipeline says of a call.
        schedule: That of the pipeline, once one is known.
    """

    def __init__(
        self, transformer: nn.Module, family: ModelFamily, parameters: frozenset[str] | None
    ) -> None:
        self.context = ContextReader()
        self.schedule: Schedule | None = None
        self._ascends = family.ascending_timesteps
        self._own_timesteps = family.ascending_timesteps or family.own_timesteps
        self._unless_noisy = None if family.tokens_tell_noise else False
        self._timestep = _known(family.timestep, parameters)
        self._text = _known(family.text, parameters)
        self._has_no_text = family.text is None
        names = [name for name in family.behind_probe if _known(name, parameters) is not None]
        self._behind = frozenset(names)
        self._attributes = vars(transformer)
        self._conditions = Conditions(names)
        self._adapters = Adapters(transformer, [block for block, _ in family.blocks(transformer)])

    def follow(self, pipeline: Any) -> None:
        """Read this pipeline's scheduler from now on."""
        if self.schedule is None:
            self.schedule = Schedule(self._own_timesteps)
        self.schedule.pipeline = pipeline

    def locate(self, arguments: Mapping[str, Any], layout: torch.Size | None = None) -> Where:
        """Where a call stands.

        Args:
            arguments: Its arguments by name.
            layout: Shape [B, S, D] of its tokens, for those who know it.
        """
        given = None if self._timestep is None else arguments.get(self._timestep)
        if self._ascends and isinstance(given, Tensor) and given.numel() > 1:
            given = given.min()  # conditioned frames are clean: they have the last one
        context: Any = self.context._context
        place = NOWHERE if self.schedule is None else self.schedule.read(given)
        timestep = as_number(given) if place.check is None else place.timestep
        num_steps, is_last, position = place.num_steps, place.is_last, place.position
        if context is not None and context.num_inference_steps is not None:
            num_steps, is_last = context.num_inference_steps, None
            if context.step_index is not None:
                is_last = context.step_index >= num_steps - 1
                position = context.step_index if position is None else position
        text = None if self._text is None else arguments.get(self._text)
        state: Hashable = None
        behind: tuple[Tensor, ...] = ()
        if self._attributes.get("peft_config") or not self._behind.isdisjoint(arguments):
            conditions, behind = self._conditions.read(arguments, _batch_of(text))
            state = (conditions, self._adapters.read(arguments))
        name = None if context is None else context.name
        prompt = text if isinstance(text, Tensor) else self._prompt_of(text)
        moment = timestep if position is None else position
        if moment is None:  # then nobody can tell where a run begins
            name = prompt = None
        return Where(  # all in their order: names would take half a microsecond a call
            name,
            prompt,
            layout,
            None,
            place.begins,
            place.missed,
            moment,
            position is None and isinstance(given, Tensor) and given.dtype in _HALF,
            position,
            num_steps,
            place.timesteps if num_steps == place.num_steps else None,
            is_last,
            timestep,
            place.first_timestep,
            self.leaders(name, layout) if name == _BRANCHES_IN_BATCH else None,
            state,
            behind,
            place.check,
            place.is_noisy or self._unless_noisy,
        )

    def leaders(self, context: str | None, layout: torch.Size | None) -> tuple[int, ...] | None:
        """In a batch of [unconditional, conditional] samples the first half decides for both."""
        if context != _BRANCHES_IN_BATCH or layout is None or layout[0] % 2:
            return None
        if not _is_guided(None if self.schedule is None else self.schedule.pipeline):
            return None
        return (*range(layout[0] // 2), *range(layout[0] // 2))

    def _prompt_of(self, text: Any) -> object:
        """What tells a branch from others: some models take a text a sample, or a layer."""
        if self._text is None and not self._has_no_text:
            return None
        while isinstance(text, (list, tuple)) and text:
            text = text[0]
        return text if isinstance(text, Tensor) else _NO_TEXT


def _batch_of(text: Any) -> int:
    """How many samples there are: every one has a text."""
    if isinstance(text, Tensor):
        return text.shape[0] if text.dim() > 0 else 1
    return len(text) if isinstance(text, (list, tuple)) else 1


def _is_guided(pipeline: Any) -> bool:
    """Whether a pipeline's batch holds both branches of guidance, in the call that runs."""
    known = getattr(pipeline, "do_classifier_free_guidance", None)
    if known is None:  # CogVideoX only says how strong its guidance is
        known = (getattr(pipeline, "guidance_scale", None) or 0.0) > 1.0
    return bool(known)


def _known(name: str | None, parameters: frozenset[str] | None) -> str | None:
    return name if parameters is None or name in parameters else None
