"""Calls whose result would depend on the order of threads, and calls that look like it and do not.

Every case places the operator's tensors in one allocation; offsets are in elements of 4 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH, SIZE = 2, 64
ROWS = BATCH * SIZE
OPERANDS = {
    "probe_statistics": ("x", "p", "p_prev", "x_prev", "probe_window"),
    "probe_and_combine": ("x", "p", "p_prev", "x_prev", "probe_window", "residual_window"),
    "combine_residuals": ("x", "residual_window", "out"),
    "extrapolate_residuals": ("x", "p", "residual_window", "oldest", "probe_window", "out"),
    "record_residuals": ("x", "p", "y", "residual_window", "probe_window"),
}
# Shifted by one element against each other.
SHIFTED = [
    *(("probe_statistics", written, read) for written in ("p_prev", "x_prev")
      for read in ("x", "p", "p_prev", "x_prev", "probe_window") if read != written),
    *(("probe_and_combine", written, read) for written in ("p_prev", "x_prev")
      for read in OPERANDS["probe_and_combine"] if read != written),
    *(("combine_residuals", "out", read) for read in ("x", "residual_window")),
    *(("extrapolate_residuals", "out", read)
      for read in ("x", "p", "residual_window", "oldest", "probe_window")),
    *(("record_residuals", written, read) for written in ("residual_window", "probe_window")
      for read in ("x", "p", "y", "residual_window", "probe_window") if read != written),
]  # fmt: skip
# In the same place, although both are written, or one is read again behind that.
SAME = [
    ("probe_statistics", "p_prev", "x_prev"),
    *(
        ("probe_and_combine", written, read)
        for written in ("p_prev", "x_prev")
        for read in ("x", "residual_window")
    ),
    ("record_residuals", "residual_window", "probe_window"),
]
# In the same place, of which one is read and then written: right.
ALLOWED = [
    ("probe_statistics", "p_prev", "p"),
    ("probe_statistics", "x_prev", "x"),
    ("probe_and_combine", "p_prev", "p"),
    ("combine_residuals", "out", "x"),
    ("extrapolate_residuals", "out", "p"),
    ("extrapolate_residuals", "out", "oldest"),
]
# Samples, or entries, of one written tensor.
OF_ITSELF = [
    ("probe_statistics", "p_prev", "samples"),
    ("probe_statistics", "x_prev", "samples"),
    ("combine_residuals", "out", "samples"),
    ("extrapolate_residuals", "out", "samples"),
    ("record_residuals", "residual_window", "samples"),
    ("record_residuals", "probe_window", "entries"),
]


def arguments_of(
    operator: str, written: str, other: str, shift: int, device: str
) -> dict[str, Any]:
    """Arguments of an operator, `other` lying `shift` elements behind the start of `written`."""
    values = torch.linspace(-1, 1, 13 * ROWS, device=device)
    places = {name: 2 * ROWS * place for place, name in enumerate(OPERANDS[operator])}
    if other in places:
        places[other] = places[written] + shift
    given: dict[str, Any] = {name: _view(values, name, at) for name, at in places.items()}
    if other == "samples":
        rows = given[written].narrow(-2, 0, 1)
        given[written] = rows.expand(given[written].shape)
    elif other == "entries":
        given[written] = given[written][:1].expand(given[written].shape)
    given["newest"] = torch.tensor([0, 1], dtype=torch.int32, device=device)
    ones = torch.ones(BATCH, 4, device=device)
    return (
        given
        | {
            "probe_statistics": {"entry_sums": ones, "low": 0.0, "high": 9.0},
            "probe_and_combine": {"entry_sums": ones, "low": 0.0, "high": 9.0},
            "combine_residuals": {"gamma": ones[:, 0]},
            "extrapolate_residuals": {"weights": ones[:, :3]},
            "record_residuals": {"entry_sums": ones, "first": False},
        }[operator]
    )


def _view(values: Tensor, name: str, at: int) -> Tensor:
    shape = (2, BATCH, SIZE) if name.endswith("_window") else (BATCH, SIZE)
    return values[at : at + torch.Size(shape).numel()].view(shape)
