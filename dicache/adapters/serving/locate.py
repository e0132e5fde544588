"""Where calls stand in an engine that serves one request, or one batch of them, after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.where import Where
from ..unnamed import UnnamedLocator


class RequestLocator(UnnamedLocator):
    """Tells where calls of one model stand.

    A call is of the request that began last (`Where.run`). An engine may forget to say that one
    begins, so nobody relies on it alone: a scheduler with new timesteps begins a run, too, and
    where no scheduler tells the position, the timesteps show where a run ends.
    """

    _num_steps: int | None = None
    _request: object = None
    _is_new = True  # whether this model was not called in the request yet

    def begin(self, pipeline: Any, num_steps: int | None) -> None:
        """The next call is of a new request.

        Args:
            pipeline: What has its scheduler.
            num_steps: Number of its steps, where the scheduler does not tell; `None`: unknown.
        """
        self.follow(pipeline)
        self._num_steps, self._request, self._is_new = num_steps, object(), True

    def where(self, arguments: Mapping[str, Any], layout: torch.Size) -> Where:
        """See `driver.call.Locator`."""
        where = super().where(arguments, layout)
        begins, self._is_new = where.begins or self._is_new, False
        # A second expert is called first when the other one's steps are over.
        missed = where.position if begins and where.position else where.missed
        return where._replace(
            run=None if where.position is None else self._request,
            begins=begins,
            missed=missed,
            num_steps=self._num_steps if where.num_steps is None else where.num_steps,
        )
