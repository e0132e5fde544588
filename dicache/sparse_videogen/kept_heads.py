"""Head kinds that stay for several computed steps, for `SparseVideoGenConfig(keep_heads=n)`."""

from __future__ import annotations

from torch import Tensor


class KeptHeads:
    """What profiling found in each context and layer, and for how many more steps it holds.

    Args:
        count: Computed sparse steps that one profiling serves, its own included.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._run: object = None
        self._found: dict[tuple[str, int], tuple[Tensor, int]] = {}

    def recall(self, run: object, context: str, layer: int, batch: int) -> Tensor | None:
        """The kinds uint8 [B, H] to take in this step; `None` where it has to be profiled."""
        if run is not self._run:
            self._run, self._found = run, {}
        heads, left = self._found.get((context, layer), (None, 0))
        return heads if left and heads is not None and heads.shape[0] == batch else None

    def note(self, context: str, layer: int, heads: Tensor, was_kept: bool) -> None:
        """A layer computed a step with these kinds, kept or profiled ones."""
        left = self._found[context, layer][1] if was_kept else self._count
        self._found[context, layer] = (heads, left - 1)

    def clear(self) -> None:
        """Free all of them."""
        self._found.clear()
