"""The backends that tests of the operators run over; the fixture is in conftest.py."""

from __future__ import annotations

import emulated_cuda
import torch
from torch import Tensor

from dicache import ops


class Backend:
    """One backend's operators and the device they run on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name in ("cuda", "triton") else "cpu"
        if name == "emulated":
            self.ops = emulated_cuda.load()
        else:
            self.ops = ops.resolve_backend(name, torch.device(self.device))

    def __repr__(self) -> str:
        return self.name

    def workspace(self, x: Tensor) -> Tensor:
        """A workspace whose partial sums are NaN: reading one that was not written shows."""
        workspace = ops.make_workspace(x)
        if self.name == "emulated":
            workspace = torch.zeros(128 + 64 * 1024, dtype=torch.uint8)
        workspace[128:] = 0xFF
        return workspace


def why_not(name: str) -> str | None:
    if name == "emulated":
        return emulated_cuda.why_not()
    status = ops.backend_status()[name]
    return None if status == "available" else status
