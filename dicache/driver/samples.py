"""Running a part of a batch through a block: gathering its arguments, scattering its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class UnknownSamplesError(ValueError):
    """An argument of a block has neither a part a sample nor one for all."""


class Samples:
    """Some samples of a batch.

    Args:
        rows: Their places in the batch.
        like: [B, ...] a tensor of the batch, for its size and device.
    """

    def __init__(self, rows: Sequence[int], like: Tensor) -> None:
        self.batch = like.shape[0]
        indices = torch.tensor(rows, device="cpu", pin_memory=like.is_cuda)
        self.indices = indices.to(like.device, non_blocking=True)

    def gather(self, arguments: dict[str, Any], per_sample: Sequence[str]) -> dict[str, Any]:
        """The arguments for these samples; those that `per_sample` does not name are as they were.

        Raises:
            UnknownSamplesError: A named tensor has a number of rows that is neither B nor 1, or an
                argument that is not named may have a row a sample, too.
        """
        gathered = dict(arguments)
        for name in arguments.keys() - set(per_sample):
            value = arguments[name]
            if isinstance(value, dict):
                value = {
                    key: each for key, each in value.items() if f"{name}.{key}" not in per_sample
                }
            self._check_shared(value, name)
        for path in per_sample:
            name, _, key = path.partition(".")
            value = gathered.get(name)
            if not key:
                gathered[name] = self._of(value, path)
            elif isinstance(value, dict) and key in value:
                gathered[name] = {**value, key: self._of(value[key], path)}
        return {name: value for name, value in gathered.items() if name in arguments}

    def take(self, tensor: Tensor) -> Tensor:
        """These samples of a tensor [B, ...]."""
        return tensor.index_select(0, self.indices.to(tensor.device))

    def scatter(self, part: Tensor | None, whole: Tensor | None) -> Tensor | None:
        """[B, ...] `whole` with these samples replaced; a new tensor of the part's dtype."""
        if part is None or whole is None:
            return part
        return whole.to(part.dtype).index_copy(0, self.indices.to(part.device), part)

    def _check_shared(self, value: Any, name: str) -> None:
        """What nobody named must not look as if it had a row a sample."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for each in value:
                self._check_shared(each, name)
        elif isinstance(value, Tensor):
            if value.dim() > 0 and value.shape[0] == self.batch:
                raise UnknownSamplesError(
                    f"argument {name!r} holds a tensor of shape {list(value.shape)} in a batch of "
                    f"{self.batch}, and BlockStack.per_sample does not name it, so the block ran "
                    f"for all samples."
                )
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            raise UnknownSamplesError(
                f"argument {name!r} holds a {type(value).__name__}, which may have rows of its "
                f"own, so the block ran for all samples."
            )

    def _of(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or value.shape[0] == 1:
                return value
            if value.shape[0] != self.batch:
                raise UnknownSamplesError(
                    f"argument {path!r} has shape {list(value.shape)} in a batch of {self.batch}. "
                    f"Expected a row a sample or one for all, so the block ran for all samples."
                )
            return self.take(value)
        if isinstance(value, dict):
            return {key: self._of(each, path) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._of(each, path) for each in value)
        return value
