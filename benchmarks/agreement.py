"""Whether a case computes what the reference does: asked before it gets a time.

`check_case` raises where a result, or a buffer that is left behind, differs from the reference by
more than the order of summation allows; stored tensors of a backend must be equal bit by bit.
"""

from __future__ import annotations

import math

import torch
import workloads
from torch import Tensor
from workloads import Case

from dicache import reference

# Tensors of the hidden states' shape: rounded once by every backend, so equal bit by bit where they
# follow from the same numbers. y of a whole step is not one of them: its gamma is a sum's.
_STORED = ("x", "p", "out", "p_prev", "probe_window", "residual_window", "oldest")


def check_case(case: Case, device: torch.device, seed: int = 1) -> list[dict[str, Tensor]]:
    """Run the case and the reference on equal tensors and compare all that they leave behind.

    Returns:
        The sets of tensors that it made, for the case to go on with: the large ones take long.

    Raises:
        AssertionError: With the tensor and the largest difference.
    """
    if case.implementation == "reference":
        return []
    mine = workloads.make_tensors(case, device, seed)
    outputs = workloads.bind(case, mine)()
    theirs = workloads.make_named_tensors(
        case.operation.arguments, case.size, device, seed, case.dtype
    )
    if case.implementation == "published":  # other arguments are drawn in another order
        theirs |= {name: mine[name].clone() for name in theirs if name in mine}
        theirs["entry_sums"] = workloads.entry_sums_of(theirs["probe_window"])
    arguments = [theirs[name] for name in case.operation.arguments]
    expected = case.operation.run(reference, *arguments)
    for name, got, want in zip(case.operation.outputs, outputs, expected, strict=True):
        compare(case, name, got, want)
    if case.implementation == "published":
        return [mine]  # it keeps its state elsewhere
    for name in case.operation.arguments:
        if name != "workspace":
            compare(case, name, mine[name], theirs[name])
    return [mine, theirs]


def compare(case: Case, name: str, got: Tensor, want: Tensor) -> None:
    """Raise AssertionError if what a case made of a tensor is not what the reference makes."""
    exact = case.implementation in ("cpp", "cuda", "triton") and name in _STORED
    if exact or not want.dtype.is_floating_point:
        assert torch.equal(got, want), f"{case.name}: {name} is not the reference's, bit by bit"
        return
    tolerance, scale = sum_tolerance(case), want.abs()
    if name in _STORED or name == "y":  # near zero some elements are, and what made them is not
        tolerance = max(2 * tolerance, torch.finfo(case.dtype).eps)
        scale = scale.clamp(min=1.0)
    difference = (got - want).abs()
    worst = difference.max().item()
    # NaN is neither less nor equal, so it never passes.
    assert (difference <= tolerance * scale).all(), (
        f"{case.name}: {name} is off by up to {worst:.2e}, and {tolerance:.2e} is allowed"
    )


def sum_tolerance(case: Case) -> float:
    """Relative difference that another order of summation may make, and rounding in between.

    Sums of n fp32 terms in blocks: some eps log2(n). Compiled code may skip the rounding of a
    stored residual that it sums, and the published sequence rounds every intermediate: some eps
    of the data's dtype.
    """
    if case.implementation in ("published", "torch.compile"):
        return 4 * torch.finfo(case.dtype).eps
    doublings = max(16.0, math.log2(math.prod(case.size.shape)))
    return 8 * torch.finfo(torch.float32).eps * doublings
