"""Where calls stand whose branches of guidance nobody names.

The text embeddings tell them apart, which are the same objects in every step. A scheduler of
diffusers' kind tells the rest, if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.readback import as_number
from ..core.where import Where
from ..driver.call import Locator
from ..driver.conditions import Conditions
from ..driver.families import ModelFamily
from .schedule import NOWHERE, Schedule


class UnnamedLocator(Locator):
    """Tells where calls of one model stand.

    Args:
        family: Its row.
    """

    def __init__(self, family: ModelFamily) -> None:
        self._timestep, self._text = family.timestep or "", family.text or ""
        self._own_timesteps = family.own_timesteps
        self._unless_noisy = None if family.tokens_tell_noise else False
        self._conditions = Conditions(family.behind_probe)
        self._schedule: Schedule | None = None

    def follow(self, pipeline: Any) -> None:
        """Read the scheduler of this one from now on; `None`: nobody has one."""
        self._schedule = None
        if pipeline is not None:
            self._schedule = Schedule(self._own_timesteps)
            self._schedule.pipeline = pipeline

    def where(self, arguments: Mapping[str, Any], layout: torch.Size) -> Where:
        """See `driver.call.Locator`."""
        given = arguments.get(self._timestep)
        place = NOWHERE if self._schedule is None else self._schedule.read(given)
        timestep = as_number(given) if place.check is None else place.timestep
        conditions, behind = self._conditions.read(arguments, layout[0])
        return Where(
            context=None,
            prompt=_first_tensor(arguments.get(self._text)),
            layout=layout,
            begins=place.begins,
            missed=place.missed,
            moment=timestep if place.position is None else place.position,
            position=place.position,
            num_steps=place.num_steps,
            is_last=place.is_last,
            timestep=timestep,
            timesteps=place.timesteps,
            first_timestep=place.first_timestep,
            computes_in=conditions,
            behind=behind,
            check=place.check,
            is_noisy=place.is_noisy or self._unless_noisy,
        )

    def end_call(self) -> None:
        """See `driver.call.Locator`."""


def _first_tensor(text: Any) -> object:
    """What tells a branch: some models take a list of texts, one a sample or an encoder."""
    if isinstance(text, (list, tuple)) and text:
        text = text[0]
    return text if isinstance(text, Tensor) else None
