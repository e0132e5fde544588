"""The rules of Sparse VideoGen that `--sparse` and `--density` describe."""

from __future__ import annotations

from dicache import SparseVideoGenConfig

from .errors import InputError, one_line


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
        return SparseVideoGenConfig(density=density, block_size=block_size, stats=True)
    except ValueError as error:
        raise InputError(one_line(error)) from error
