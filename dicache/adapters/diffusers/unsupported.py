"""Transformers of diffusers that cannot have the cache, and why: not for want of a row.

A row that somebody registers all the same goes first.
"""

from __future__ import annotations

WHY = {
    "LatteTransformer3DModel": (
        "its last block returns tokens in another order (a row a patch) than its first block takes "
        "them (a row a frame), so that there is no residual from one to the other"
    ),
}


def refuse_unsupported(transformer: object) -> None:
    """See that a transformer is not known to be out of reach.

    Raises:
        ValueError: It is; the message says why.
    """
    for base in type(transformer).__mro__:
        if base.__name__ in WHY and base.__module__.startswith("diffusers."):
            raise ValueError(
                f"DiCache cannot support {type(transformer).__name__}: {WHY[base.__name__]}. "
                f"Expected a model whose first and last block carry the same tokens."
            )
