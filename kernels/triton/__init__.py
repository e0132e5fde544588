"""Triton bodies of the operators in `dicache.ops`: the signatures and rules of `dicache.reference`.

Every function is one launch (beside allocations; `probe_and_combine` two where a cooperative one
is refused) and gives the same bits from run to run: the grid
depends on sizes and device alone, and partial sums are added in an order fixed by their index.
`combine_residuals`, `extrapolate_residuals` and the windows of `record_residuals` equal the
reference bit by bit.

Import it as `dicache.kernels`: this folder enters the package through the link `dicache/kernels`.
The one above it has no `__init__.py`, so that it is nobody's package: `kernels` is a project of
Hugging Face's, which others look for. Nothing imports this package before a Triton backend is
chosen, so `import dicache` works without Triton.
"""

from .alignment import alignment_statistics, finish_alignment_statistics
from .combine import combine_residuals
from .extrapolate import extrapolate_residuals
from .probe import finish_probe_statistics, probe_statistics
from .probe_and_combine import probe_and_combine
from .record import record_residuals

__all__ = [
    "alignment_statistics",
    "combine_residuals",
    "extrapolate_residuals",
    "finish_alignment_statistics",
    "finish_probe_statistics",
    "probe_and_combine",
    "probe_statistics",
    "record_residuals",
]
