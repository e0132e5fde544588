"""The profiles of the shipped models, as `benchmarks/train/profiles.py` made them."""

from __future__ import annotations

from pathlib import Path

from dicache import Profile

PROFILE_DIR = Path(__file__).parent / "profiles"
PROFILE_STEPS = {"flux": 30, "hunyuan-video": 50, "wan": 50}  # of the runs that they are of


def shipped_profile(name: str) -> Profile:
    """That of a demo model.

    Raises:
        ValueError: It has none.
    """
    if name not in PROFILE_STEPS:
        raise ValueError(f"{name!r} has no profile. Expected one of {', '.join(PROFILE_STEPS)}.")
    return Profile.load(PROFILE_DIR / f"{name}.json")
