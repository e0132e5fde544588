"""What a model's block lists hold while a step is reused: not the blocks that are left out.

Calling a module takes torch a microsecond even where nothing happens, and a model has up to a
hundred blocks. So between the decision to reuse and the last block the lists hold twins. A twin is
of its block's class and shares its attributes: whoever looks at it sees the block. Only calling it
is another thing, and returns the arguments that the block would have changed; a twin that somebody
kept is the block again as soon as nothing is skipped.

A list that the model has not begun to loop over can be shorter still, and hold only what runs, as
long as nobody but the model's own loop is there to look at it. Another thread might: one that saves
the model while it runs would find blocks missing.

Both are shortcuts. Where a twin cannot stand for its block, or a list is not what it was when the
cache was applied, the blocks stay, and their own calls pass the input through.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Protocol

from torch import nn


class Skips(Protocol):
    """Says whether blocks are passed by now."""

    skips: bool


class Bypass:
    """What one list holds instead of some of its blocks.

    Args:
        blocks: The list. Where it is no `nn.ModuleList`, nothing is ever exchanged.
        classes: The classes of twins by those of the blocks, from `twin_class`.
        chosen: The blocks that are passed by.
        whole_for: Arguments of the model's call that need the whole list, see `BlockStack`. `None`:
            it is never shortened.
    """

    def __init__(
        self,
        blocks: Any,
        classes: dict[type, type],
        chosen: set[nn.Module],
        whole_for: tuple[str, ...] | None = None,
    ) -> None:
        self._list = blocks
        self._blocks = dict(blocks._modules) if isinstance(blocks, nn.ModuleList) else {}
        self._twins = {
            name: _twin(block, classes[type(block)])
            for name, block in self._blocks.items()
            if block in chosen and type(block) in classes
        }
        # Lists are compared by identity of their entries, and faster than dictionaries.
        self._before = [*self._blocks.values()]
        self._after = [*{**self._blocks, **self._twins}.values()]

        self._whole_for = whole_for if type(blocks) is nn.ModuleList else None
        self._rest = {name: b for name, b in self._blocks.items() if b not in chosen}
        self._whole: dict[str, Any] = {}  # what the list holds, as long as it is short

    def begin(self, arguments: dict[str, Any] | None) -> None:
        """Take the blocks out; the model may be in its loop.

        `arguments` are those of the model's call, or `None` where others may look at the list.
        """
        if not self._twins:
            return
        modules = self._list._modules
        if [*modules.values()] != self._before:  # somebody changed it
            return
        names = self._whole_for
        if names is None or arguments is None or _gives_any(arguments, names):
            modules.update(self._twins)
        else:  # in one assignment, which no interrupt can cut in two
            self._whole = modules
            vars(self._list)["_modules"] = self._rest

    def end(self) -> None:
        """Put the blocks back."""
        if not self._twins:
            return
        modules = self._list._modules
        if modules is self._rest:
            vars(self._list)["_modules"] = self._whole
            return
        if [*modules.values()] == self._after:
            modules.update(self._blocks)
            return
        own = {twin: self._blocks[name] for name, twin in self._twins.items()}
        for name, module in list(modules.items()):  # somebody changed the list meanwhile
            if module in own:
                modules[name] = own[module]


def _gives_any(arguments: dict[str, Any], names: tuple[str, ...]) -> bool:
    for name in names:  # noqa: SIM110 (a generator costs a microsecond of every reused step)
        if arguments.get(name) is not None:
            return True
    return False


def twin_class(
    kind: type, model: Skips, names: tuple[str, ...], parameters: tuple[str, ...]
) -> type | None:
    """A class like a block's, whose call returns its arguments `names` while blocks are skipped.

    Args:
        names: One name stands for its bare value, several for a tuple.
        parameters: The names of positional arguments, in order.

    Returns:
        `None` for a class that a subclass could not stand for: one with slots of its own, or with
        code that runs when a subclass is made.
    """
    has_slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    if has_slots or hasattr(kind.__init_subclass__, "__func__"):
        return None
    take = itemgetter(*names)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not model.skips:
            return kind.__call__(self, *args, **kwargs)
        if not args:
            return take(kwargs)
        return take({**dict(zip(parameters, args, strict=False)), **kwargs})

    return type(kind.__name__, (kind,), {"__call__": call})


def _twin(block: nn.Module, kind: type) -> nn.Module:
    """A module of the class `kind` that is `block` in everything else."""
    twin: nn.Module = object.__new__(kind)
    object.__setattr__(twin, "__dict__", vars(block))
    return twin
