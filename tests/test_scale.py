"""The estimates for several GPUs (`benchmarks/scale.py`), worked out by hand a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale

ROOT = Path(__file__).resolve().parents[1]


def test_steps_of_flux_on_one_node_by_hand() -> None:
    """4,608 tokens of width 3,072, 57 blocks, 8 GPUs."""
    flux = scale.MODELS[0]
    # 12 x 3072^2 = 113,246,208 multiplications a token; 4608^2 = 21,233,664 pairs of tokens.
    operations = 2 * 113_246_208 * 4608 + 4 * 3072 * 21_233_664
    arithmetic = operations / 8 / 494.5e12
    # A rank has 576 tokens, 3,538,944 bytes in bf16, and gives away 7/8 of four such tensors.
    exchange = 4 * 3_538_944 * 7 / 8 / 315e9 + 4 * 20e-6
    block = arithmetic + exchange
    assert scale.computed_seconds(flux, 8) == pytest.approx(57 * block)
    # 512 of its tokens are the picture's: 3,145,728 bytes a pass; 8 passes, 4.08e12 bytes a second.
    passes = 8 * 3_145_728 / 4.08e12
    assert scale.reused_seconds(flux, 8) == pytest.approx(block + passes + 2 * 20e-6 + 30e-6)
    assert scale.cache_bytes(flux, 8) == 4 * 3_145_728
    assert scale.decision_bytes(batch=2) == 48 + 64  # as tests/test_ranks.py counts


def test_a_ring_between_nodes_by_hand() -> None:
    """FLUX on 64 GPUs has so little arithmetic that it waits for the ring: 7 times keys, values."""
    flux = scale.MODELS[0]
    held = 4608 * 3072 * 2 / 64
    ring = 7 * (2 * held / 40e9 + 50e-6)
    exchange = 4 * held * 7 / 8 / 315e9 + 4 * 20e-6
    assert scale.computed_seconds(flux, 64) == pytest.approx(57 * (ring + exchange))


def test_the_page_has_the_table_that_is_printed() -> None:
    assert scale.table() in (ROOT / "docs" / "several_gpus.md").read_text(encoding="utf-8")
