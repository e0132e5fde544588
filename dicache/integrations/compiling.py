"""What the cache has to know of torch.compile's inside, in one place.

A transformer with a cache cannot be compiled in one piece, because a decision takes Python in its
middle; its blocks are compiled instead, each with what the whole was to be compiled with. torch has
no public way to find that out. Both functions here use private ones, of torch 2.11 to 2.13; the
tests in `tests/test_compile.py` notice a change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from torch._C._dynamo.eval_frame import set_eval_frame

Call: TypeAlias = Callable[..., Any]


def compiled_like(compiled: Call) -> Callable[[Call], Call] | None:
    """What compiles another call the way `compiled` was, by `torch.compile`; `None` if unknown."""
    if not inspect.isfunction(compiled):
        return None
    context = inspect.getclosurevars(compiled).nonlocals.get("self")
    return context if callable(context) else None


def under(callback: Call) -> Callable[[Call], Call]:
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
