"""Which ranks run a model's blocks together, and so have to decide as one.

Whatever splits a model makes its ranks wait for each other inside of blocks: attention over tokens
that others have, weights that FSDP gathers, products that tensor parallelism adds up. FSDP and
DTensors are found here, in any torch model; who splits a sequence is for adapters to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn


def groups_of(model: nn.Module) -> list[Any]:
    """The process groups over which a model's weights are spread."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.tensor import DTensor

    found: dict[Any, None] = {}
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel" and hasattr(module, "process_group"):
            found[module.process_group] = None
        for weight in module.parameters(recurse=False):
            if isinstance(weight, DTensor):
                for dim, placement in enumerate(weight.placements):
                    if placement.is_shard():  # where it is replicated nobody waits
                        found[weight.device_mesh.get_group(dim)] = None
    return [*found]


def group_of_all(given: Any, found: Sequence[Any]) -> Any:
    """The group whose ranks decide as one; `None`: there are no others.

    Args:
        given: By the user, or `None`.
        found: Those whose ranks wait for each other; `None` stands for one that nobody can name.

    Raises:
        ValueError: No known group has all these ranks.
    """
    if given is None and None in found:
        raise ValueError(
            "The tokens of this model are split over several GPUs, and the group of these ranks is "
            "not known: neither xfuser nor torch.distributed has one. Expected "
            "DiCacheConfig(process_group=...): ranks that decide alone would wait for each other "
            "for ever."
        )
    ranks = {group: {*dist.get_process_group_ranks(group)} for group in found if group is not None}
    several = [group for group, members in ranks.items() if len(members) > 1]
    group = given
    if given is None:
        group = max(several, key=lambda each: len(ranks[each]), default=None)
    if group is not None:
        mine = {*dist.get_process_group_ranks(group)}
        missing = sorted(set().union(*(ranks[each] for each in several)) - mine)
        if missing:
            raise ValueError(
                f"Blocks of this model wait for the ranks {missing}, which are not in the group "
                f"{sorted(mine)} that decides as one: it is split in several ways. Give "
                f"DiCacheConfig(process_group=...) a group of all of them, by "
                f"torch.distributed.new_group."
            )
    return group
