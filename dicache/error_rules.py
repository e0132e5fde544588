"""The ways to measure how far a step has moved: one row of data each.

`DiCacheConfig.error` names a row. Whoever needs to know anything about an error (which operator
computes it, what the cache has to remember for it, what a plot calls it) reads the row, so a new
one is a row here, and an operator only where no launch has its sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ErrorName = Literal["delta_y", "delta_minus", "alignment", "weighted_alignment"]


@dataclass(frozen=True)
class ErrorRule:
    r"""One error of a step, in the notation of `dicache.reference`.

    Attributes:
        name: Value of `DiCacheConfig.error`.
        text: What it is, in a plot's mathematical text.
        verifies_alignment: Whether it asks how well the trajectory predicts the probe
            (`alignment_statistics`), and not how far the probe moved (`probe_statistics`). Its
            values are several times smaller.
        relative_to_probe: A misfit's denominator: ||p|| if true, else ||q||.
        weighted: Whether it counts a step by its size.
        buffers: What is kept beside the windows of both residuals, by the names of `core.store`.
    """

    name: ErrorName
    text: str
    verifies_alignment: bool
    relative_to_probe: bool = False
    weighted: bool = False
    buffers: tuple[str, ...] = ()


ERROR_RULES: dict[ErrorName, ErrorRule] = {
    rule.name: rule
    for rule in (
        ErrorRule(
            "delta_y",
            r"change of the probe  $\delta_y$",
            verifies_alignment=False,
            buffers=("previous_probe",),
        ),
        ErrorRule(
            "delta_minus",
            r"change of the probe beyond the input's  $|\delta_y-\delta_x|$",
            verifies_alignment=False,
            buffers=("previous_probe", "previous_x"),
        ),
        ErrorRule(
            "alignment",
            r"misfit of the trajectory  $\|a-\gamma d\| \,/\, \|q\|$",
            verifies_alignment=True,
        ),
        ErrorRule(
            "weighted_alignment",
            r"misfit $\|a-\gamma d\| \,/\, \|p\|$ x relative step size",
            verifies_alignment=True,
            relative_to_probe=True,
            weighted=True,
        ),
    )
}
