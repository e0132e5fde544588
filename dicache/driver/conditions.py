"""What of a call's arguments changes what blocks behind the probe compute, where it sees nothing.

Numbers, names and block lists are taken as they are, also numbers in a tensor: any change of them
is one. Of tensors that are added to the tokens between blocks, which change a little in every step,
a sample is taken for `core.behind` to compare.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.readback import Readback
from ..core.sample import rows_of


class Conditions:
    """Reads these arguments of a model's calls.

    Args:
        names: Of the arguments; those that a call does not give do not count.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._read: dict[tuple[str, int], tuple[weakref.ref[Tensor], int, Hashable]] = {}

    def read(self, arguments: Mapping[str, Any], batch: int) -> tuple[Hashable, tuple[Tensor, ...]]:
        """What has to stay as it is, and samples [rows, n] of what has to stay alike.

        There is a row a sample of the batch, as far as tensors have so many.
        """
        state: list[Hashable] = []
        samples: list[Tensor] = []
        for name in self._names:
            value = arguments.get(name)
            if value is None:
                continue
            state.append(name)
            tensors = _added_tensors(value)
            if isinstance(value, Tensor) and value.dim() < 2:
                state.append(self._numbers_in(name, value))
            elif tensors:
                sample = _sample_of_all(tensors, batch)
                state.append(tuple(sample.shape))
                samples.append(sample)
            else:
                state.append(_plain(value))
        return tuple(state), tuple(samples)

    def _numbers_in(self, name: str, tensor: Tensor) -> Hashable:
        """A tensor's numbers; it is waited for once, not in every step."""
        writes = 0 if tensor.is_inference() else tensor._version
        key = name, id(tensor)
        known = self._read.get(key)
        if known is None or known[0]() is not tensor or known[1] != writes:
            self._read = {k: v for k, v in self._read.items() if v[0]() is not None}
            numbers = Readback(tensor.reshape(-1)).wait()[0]
            self._read[key] = known = (weakref.ref(tensor), writes, tuple(numbers))
        return known[2]


def _sample_of_all(tensors: list[Tensor], batch: int) -> Tensor:
    """[rows, n] elements of the first, the middle and the last one of them."""
    chosen = [tensors[index] for index in sorted({0, len(tensors) // 2, len(tensors) - 1})]
    if any(each.shape[:1] != (batch,) for each in chosen):
        batch = 1
    parts = [rows_of(each, batch) for each in chosen]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _added_tensors(value: Any) -> list[Tensor]:
    """The tensors of a list, tuple or dictionary by block; a dictionary of options has none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        by_block = value and all(isinstance(key, int) for key in value)
        return _added_tensors(list(value.values())) if by_block else []
    if isinstance(value, (list, tuple)):
        return [each for each in value if isinstance(each, Tensor)]
    return []


def _plain(value: Any) -> Hashable:
    """What stays equal as long as numbers, names and block lists do; tensors by being there."""
    if isinstance(value, Mapping):
        named = {str(key): _plain(each) for key, each in value.items()}
        return tuple((key, named[key]) for key in sorted(named))
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each) for each in value)
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return type(value).__name__
