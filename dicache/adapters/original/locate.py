"""Where a call of an original model stands: two experts share a run, ranks a sequence.

Nobody names branches of guidance here, and nobody says when a run is over.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...core.run import Timeline
from ...core.session import DiCacheSession
from ...core.where import Where
from ...driver.families import ModelFamily, unwrapped
from ..unnamed import UnnamedLocator


class Experts:
    """Models that share the steps of a run: Wan 2.2 has one for noisy steps and one for the others.

    Each has a session of its own. What they have to know of each other is how many steps a run had
    already when it comes to one of them.

    Args:
        num_steps: Number N of steps of a run; `None` if nobody said it.
    """

    def __init__(self, num_steps: int | None) -> None:
        self._timeline: Timeline[None] = Timeline(lambda name: None, num_steps)
        self._sessions: dict[object, DiCacheSession] = {}
        self._last: tuple[object, object] = (
            None,
            None,
        )  # whose call was the last one, in which run

    def join(self, expert: object, session: DiCacheSession) -> None:
        """One of them has this session."""
        for known in [*self._sessions.values()][:1]:
            session.timeline.join(known.timeline)
        self._sessions[expert] = session

    def place(self, expert: object, where: Where) -> Where:
        """The same call of this expert, placed in the whole run."""
        run = self._timeline.visit(where).run
        position = run.moments - 1
        begins = self._last != (expert, run)
        if begins:
            self._last = expert, run
            self._free_others(expert)
        return where._replace(
            begins=begins,
            missed=position if begins else 0,
            moment=position,
            position=position,
            first_timestep=run.first_timestep,
        )

    def _free_others(self, expert: object) -> None:
        """The steps of the others are over, and nobody else says so."""
        for other, session in self._sessions.items():
            if other is not expert:
                session.reset()


class OriginalLocator(UnnamedLocator):
    """Tells where calls of one model stand.

    Args:
        model: The model.
        family: Its row.
        pipeline: What has a scheduler, if anybody has.
        experts: Those that it shares its runs with, if there are any.
    """

    def __init__(
        self, model: nn.Module, family: ModelFamily, pipeline: Any, experts: Experts | None
    ) -> None:
        super().__init__(family)
        self._model, self._experts = model, experts
        self.follow(pipeline)

    def where(self, arguments: Mapping[str, Any], layout: torch.Size) -> Where:
        """See `driver.call.Locator`."""
        where = super().where(arguments, layout)
        return where if self._experts is None else self._experts.place(self, where)

    def groups(self) -> list[Any]:
        """See `driver.call.Locator`.

        HunyuanVideo's blocks get an attention of xfuser's where a sequence is split, Wan's model
        another `forward`: that of Wan 2.1 is xfuser's, too, that of 2.2 splits over all processes.
        """
        forward = vars(self._model).get("forward")
        name = getattr(getattr(forward, "__func__", forward), "__name__", "")
        if name == "sp_dit_forward":
            return [dist.group.WORLD]
        block = unwrapped(next(iter(getattr(self._model, "double_blocks", ())), None))
        has_split_attention = getattr(block, "hybrid_seq_parallel_attn", None) is not None
        return [_xfuser_group()] if has_split_attention or name == "usp_dit_forward" else []


def _xfuser_group() -> Any:
    """The group of xfuser's sequence parallelism; `None` where there is no xfuser."""
    try:
        distributed: Any = importlib.import_module("xfuser.core.distributed")
        return distributed.get_sp_group().device_group
    except (ImportError, AssertionError):  # it asserts that it was initialized
        return None
