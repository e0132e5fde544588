"""`Ranks`: processes that run a model's blocks together, and so have to decide as one.

Blocks of a model that is shared by several GPUs wait for each other: attention over a sequence that
is split, weights that are gathered or whose products are added up. A rank that skips blocks which
another one runs would leave it waiting for ever. So ranks add up the sums of their statistics, and
then do what the first of them made of them: nothing promises that every rank gets the same last bit
of a total, nor that what each saw of its own tokens says the same.

No other module below the command line calls collectives. Whether there is one in a step follows
from counts and from what the first rank said before, which are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .readback import Readback

Thing = TypeVar("Thing")


class Ranks:
    """Those that decide with this process; alone without a group.

    All methods are collective: every rank of the group calls them, in the same order.

    Args:
        group: A `torch.distributed.ProcessGroup`.

    Attributes:
        group: As given, or as followed since.
        are_several: Whether there are others.
    """

    def __init__(self, group: Any = None) -> None:
        self.group: Any = None
        self.are_several = self._is_first = False
        self.follow(group)

    def follow(self, group: Any) -> None:
        """Decide with the ranks of this group from now on; `None`: alone."""
        self.group = group
        self.are_several = group is not None and dist.get_world_size(group) > 1
        self._is_first = self.are_several and dist.get_rank(group) == 0

    def add_up(self, sums: Tensor) -> Tensor:
        """The total of all ranks' sums, in their place."""
        if self.are_several:
            dist.all_reduce(sums, group=self.group)
        return sums

    def agree(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The first rank's numbers, of which every rank has as many; the others wait for them."""
        if not self.are_several:
            return [*numbers]
        is_staged = self._is_first and device.type == "cuda"
        host = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=is_staged)
        buffer = host.to(device, non_blocking=is_staged)
        dist.broadcast(buffer, group_src=0, group=self.group)
        return [*numbers] if self._is_first else Readback(buffer).wait()[0]

    def take_first(self, thing: Thing, device: torch.device) -> Thing:
        """The first rank's thing, which is pickled on its way to the others."""
        if not self.are_several:
            return thing
        things = [thing if self._is_first else None]
        dist.broadcast_object_list(things, group_src=0, group=self.group, device=device)
        return things[0]  # type: ignore[return-value]
