"""What a cached model has to know of torch.compile's inside, in one place.

A model with a cache cannot be compiled in one piece, because a decision takes Python in its middle;
its blocks are compiled instead, each with what the whole was to be compiled with. torch has no
public way to find that out, so this uses private parts of torch 2.11 to 2.13, beside the place
where torch keeps a module's compiled call (`Module._compiled_call_impl`). The tests in
`tests/test_compile.py` notice a change.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

from ..core.warning import warn_user

Call: TypeAlias = Callable[..., Any]
Compile: TypeAlias = Callable[[Call], Call]
RunOutside: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


# What calling a module looks at first: its compiled call, or one of ours; `None` if there is none.
outermost_call: Callable[[nn.Module], Call | None] = operator.attrgetter("_compiled_call_impl")


def set_outermost_call(module: nn.Module, call: Call | None) -> None:
    """Let calls of the module come to `call`, outside of its hooks and of compiled code.

    `None` leaves nothing where there was nothing.
    """
    vars(module).pop("_compiled_call_impl", None)
    if call is not None:
        module._compiled_call_impl = call


class Surroundings:
    """What a model's blocks are compiled with, because of what is around the model.

    Args:
        model: Whose own compiled call is replaced while the cache is on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = outermost_call(model)
        self._own = None if self._before is None else _compiled_like(self._before)
        self._callback: Call | None = None  # dynamo's, of a compiled caller
        if self._before is not None and self._own is None:
            warn_user(
                f"This {type(model).__name__} was compiled as a whole, DiCache takes it apart, and "
                f"this torch does not tell what it was compiled with: its blocks now run "
                f"uncompiled. Call compile_repeated_blocks(...) instead of compile(...), before or "
                f"after applying DiCache."
            )

    @property
    def compile(self) -> Compile | None:
        """What compiles the call of a block that is not compiled; `None`: nothing does."""
        return self._own if self._callback is None else _under(self._callback)

    def forget_own(self) -> None:
        """The blocks were compiled one by one by now."""
        self._own = None

    def put_back(self) -> None:
        """Give the model the call that it had."""
        set_outermost_call(self._model, self._before)

    def take_call(self, run: RunOutside) -> None:
        """Let `run` stand for the model's call, outside of a `torch.compile` around it.

        It gets what is around, for `change`, and the call's arguments.
        """

        @torch.compiler.disable(recursive=False)
        def call(*args: Any, **kwargs: Any) -> Any:
            surrounding = set_eval_frame(None)  # must not see what we do
            try:
                return run(surrounding, args, kwargs)
            finally:
                set_eval_frame(surrounding)

        self.seen: Any = None
        set_outermost_call(self._model, call)

    def change(self, surrounding: Any) -> bool:
        """Take note of what is around; whether blocks have to be compiled for it."""
        self.seen = surrounding
        callback = surrounding if callable(surrounding) else None
        if callback is self._callback:
            return False
        self._callback = callback
        return True


def _compiled_like(compiled: Call) -> Compile | None:
    """What compiles another call the way `compiled` was, by `torch.compile`; `None` if unknown."""
    if not inspect.isfunction(compiled):
        return None
    context = inspect.getclosurevars(compiled).nonlocals.get("self")
    return context if callable(context) else None


def _under(callback: Call) -> Compile:
    """What compiles a call as if it were a part of the frames that dynamo's `callback` sees."""

    def compile_call(call: Call) -> Call:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            set_eval_frame(callback)
            try:
                return call(*args, **kwargs)
            finally:
                set_eval_frame(None)

        return compiled

    return compile_call
