"""dicache: the caching path for diffusion transformers (DiCache, arXiv 2508.17356).

    from dicache import apply_dicache
    apply_dicache(pipe)          # one line, then use the pipeline as before

Importing this package imports neither diffusers nor Triton.
"""

from .adapters import (
    apply_dicache,
    context_parallel_plan,
    get_stats,
    remove_dicache,
    reset_dicache,
)
from .config import DiCacheConfig
from .core.judge import Decision
from .core.session import DiCacheSession
from .core.warning import DiCacheWarning
from .core.where import Where
from .driver.families import BlockStack, ModelFamily, register_family
from .profile import Profile
from .profiling import calibrate
from .sparse_videogen import (
    SparseVideoGenConfig,
    SparseVideoGenStats,
    apply_sparse_videogen,
    get_sparse_videogen_stats,
    remove_sparse_videogen,
)
from .stats import RunStats, StepRecord

__all__ = [
    "BlockStack",
    "Decision",
    "DiCacheConfig",
    "DiCacheSession",
    "DiCacheWarning",
    "ModelFamily",
    "Profile",
    "RunStats",
    "SparseVideoGenConfig",
    "SparseVideoGenStats",
    "StepRecord",
    "Where",
    "apply_dicache",
    "apply_sparse_videogen",
    "calibrate",
    "context_parallel_plan",
    "get_sparse_videogen_stats",
    "get_stats",
    "register_family",
    "remove_dicache",
    "remove_sparse_videogen",
    "reset_dicache",
]

__version__ = "0.2.0"
