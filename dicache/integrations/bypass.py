"""What a model's block lists hold while a step is reused: twins of the blocks that are left out.

Calling a module takes torch a microsecond even where nothing happens, and a model has up to a
hundred blocks. So between the decision to reuse and the end of the call the lists hold twins. A
twin is of its block's class and shares its attributes: whoever looks at it sees the block. Only
calling it is another thing, and returns the arguments that the block would have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from operator import itemgetter
from typing import Any

from torch import nn


class Bypass:
    """The twins of some blocks of one list.

    Args:
        blocks: The list. Where it is no `nn.ModuleList`, nothing is ever exchanged.
        calls: What calling a block's twin does, for every block that gets one.
    """

    def __init__(self, blocks: Any, calls: Mapping[nn.Module, Callable[..., Any]]) -> None:
        is_list = isinstance(blocks, nn.ModuleList)
        self._modules: dict[str, Any] = blocks._modules if is_list else {}
        self._length = len(self._modules)
        classes: dict[Any, type] = {}  # one a kind: what is touched in every step should be little
        self._twins = {
            name: _twin(block, calls[block], classes)
            for name, block in self._modules.items()
            if block in calls
        }
        self._blocks: dict[str, nn.Module] = {}

    def begin(self) -> None:
        """Put the twins into the list; the model may be iterating over it."""
        if len(self._modules) == self._length:  # else blocks came or went, and names moved
            self._blocks = self._modules.copy()
            self._modules.update(self._twins)

    def end(self) -> None:
        """Put back what was there."""
        self._modules.update(self._blocks)
        self._blocks = {}


@cache
def passing_through(names: tuple[str, ...], parameters: tuple[str, ...]) -> Callable[..., Any]:
    """A call that returns its arguments `names`, and does nothing else.

    Args:
        names: One name stands for its bare value, several for a tuple.
        parameters: The names of positional arguments, in order.
    """
    take = itemgetter(*names)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not args:
            return take(kwargs)
        return take({**dict(zip(parameters, args, strict=False)), **kwargs})

    return call


def _twin(block: nn.Module, call: Callable[..., Any], classes: dict[Any, type]) -> nn.Module:
    """A module that is `block` in everything but its call; its class is taken from `classes`."""
    kind = type(block)
    if (kind, call) not in classes:
        members = {"__call__": staticmethod(call)}
        classes[kind, call] = type(kind.__name__, (kind,), members)
    twin: nn.Module = object.__new__(classes[kind, call])
    object.__setattr__(twin, "__dict__", vars(block))
    return twin
