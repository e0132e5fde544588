"""The rules that the options of the command line describe."""

from __future__ import annotations

from pathlib import Path

from dicache import DiCacheConfig, Profile, SparseVideoGenConfig

from .errors import InputError, one_line


def make_config(
    preset: str | None = None,
    threshold: float | None = None,
    schedule: str | None = None,
    profile: Path | Profile | None = None,
    target_speedup: float | None = None,
    target_psnr: float | None = None,
) -> DiCacheConfig:
    """The cache's rules.

    Raises:
        InputError: There is no such preset or file, or a value is out of its range.
    """
    given = {
        "threshold": threshold,
        "schedule": schedule,
        "profile": profile,
        "target_speedup": target_speedup,
        "target_psnr": target_psnr,
    }
    given = {name: value for name, value in given.items() if value is not None}
    try:
        if preset is None:
            return DiCacheConfig(**given)  # type: ignore[arg-type]
        return DiCacheConfig.preset(preset, **given)  # type: ignore[arg-type]
    except OSError as error:
        raise InputError(f"--profile {profile} cannot be read: {one_line(error)}") from error
    except ValueError as error:
        raise InputError(one_line(error)) from error


def make_sparse_config(
    sparse: bool, density: float | None, block_size: int = SparseVideoGenConfig.block_size
) -> SparseVideoGenConfig | None:
    """The rules, or None without `--sparse`.

    Raises:
        InputError: The density is out of its range, or was given without `--sparse`.
    """
    if not sparse:
        if density is not None:
            raise InputError(f"--density {density:g} needs --sparse, which was not given")
        return None
    try:
        return SparseVideoGenConfig(density=density, block_size=block_size)
    except ValueError as error:
        raise InputError(one_line(error)) from error
