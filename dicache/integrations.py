"""Names that used to be here, for code that imports them: they are in `dicache` itself now."""

from .adapters import apply_dicache, get_stats, remove_dicache, reset_dicache
from .driver.families import (
    BlockStack,
    ModelFamily,
    find_family,
    register_family,
    supported_families,
)

__all__ = [
    "BlockStack",
    "ModelFamily",
    "apply_dicache",
    "find_family",
    "get_stats",
    "register_family",
    "remove_dicache",
    "reset_dicache",
    "supported_families",
]
