"""The models in what users of the original code have at hand, and who has their scheduler."""

from __future__ import annotations

from typing import Any

from ..holders import Holders
from . import table as table  # registers its families

HOLDERS = Holders("hyvideo", "wan")


def pipeline_of(thing: Any) -> Any:
    """What has the scheduler that drives a thing's models, if anybody has; Wan's is hidden."""
    for each in (thing, getattr(thing, "pipeline", None)):
        if getattr(each, "scheduler", None) is not None:
            return each
    return None
