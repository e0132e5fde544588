"""How many cases the fuzz tests draw, and whether they draw the same ones again.

In `make test` they are the same in every run, so that a change is judged by itself and not by the
luck of the draw. `make fuzz` sets DICACHE_FUZZ to a factor: that many times more, and new ones.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

FACTOR = int(os.environ.get("DICACHE_FUZZ", "0"))


def draws(examples: int, **others: Any) -> settings:
    """Settings for a test that draws so many examples in `make test`."""
    return settings(
        max_examples=examples * max(FACTOR, 1), derandomize=not FACTOR, deadline=None, **others
    )
