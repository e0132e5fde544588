"""A packed cache decides and fills in as the plain one does, and holds what it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fuzzing import draws
from helpers import small_bytes, trajectory_of
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build, calls
from torch import Tensor

from dicache import DiCacheConfig, DiCacheSession, apply_dicache, get_stats
from dicache.core.store import PackedBuffer, PackedStore
from dicache.core.trajectory import Trajectory

FP8 = torch.float8_e4m3fn
FREE: dict[str, Any] = {"retention_ratio": 0.0, "compute_last_step": False}
RULES: dict[str, dict[str, Any]] = {
    "default": {"threshold": 0.4, **FREE},
    "published": {"threshold": 0.8, "error": "delta_y", "alignment": "l1", **FREE},
    "delta_minus": {"threshold": 0.02, "error": "delta_minus", "alignment": "l1", **FREE},
    "samples": {"threshold": 0.4, "granularity": "sample", **FREE},
    "samples, published": {
        **{"threshold": 0.8, "error": "delta_y", "alignment": "l1", "granularity": "sample"},
        **FREE,
    },
}


def walk(steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, p, y) [3, 4, 16] of steps that resemble each other, samples to different degrees."""
    generator = torch.Generator().manual_seed(3)
    start, way, found = *torch.randn(2, 3, 3, 4, 16, generator=generator), []
    for step in range(steps):
        noise = torch.randn(3, 3, 4, 16, generator=generator)
        noise *= torch.tensor([0.01, 0.1, 0.3]).reshape(3, 1, 1)
        x, q, r = start + 0.2 * step * way + noise
        found.append((x.to(dtype), (x + q).to(dtype), (x + r).to(dtype)))
    return found


def drive(
    config: DiCacheConfig, steps: list[tuple[Tensor, Tensor, Tensor]], holds: bool = True
) -> tuple[list[Tensor], DiCacheSession]:
    """What each step hands to the head."""
    session, outputs = DiCacheSession(config), []
    for x, p, y in steps:
        with session.step("cond", num_inference_steps=len(steps)) as step:
            if step.needs_probe:
                step.probe(x, p)
            if step.action == "reuse":
                outputs.append(step.reuse(x))
                continue
            rows = y if step.rows is None else y[step.rows]
            if holds:
                step.resume(x, p)
            outputs.append((step.record(rows) if holds else step.record(x, p, rows)).clone())
    return outputs, session


def buffers(trajectory: Trajectory) -> list[Tensor]:
    assert isinstance(trajectory.store, PackedStore)
    return [packed.tensor for packed in trajectory.store._buffers.values()]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float32, {"cache_device": "cpu"}),
        (torch.bfloat16, {"cache_dtype": torch.bfloat16}),
        (torch.bfloat16, {"cache_dtype": torch.bfloat16, "cache_device": "cpu"}),
    ],
    ids=["host", "same dtype", "both"],
)
def test_where_nothing_is_rounded_every_bit_is_the_same(holds, rules, dtype, how) -> None:
    steps = walk(12, dtype)
    outputs, session = drive(DiCacheConfig(**rules, **how), steps, holds)
    expected, plain = drive(DiCacheConfig(**rules), steps, holds)
    assert session.stats.to_dict()["contexts"] == plain.stats.to_dict()["contexts"]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    taken = {record.action for record in session.stats.records()}
    assert taken == {"compute", "resume", "reuse"}  # the walk is worth something


def test_residuals_of_another_dtype_than_the_tokens_entering() -> None:
    steps = [(x, p, y.bfloat16()) for x, p, y in walk(12)]
    rules = RULES["default"]
    outputs, _ = drive(DiCacheConfig(**rules, cache_device="cpu"), steps)
    expected, _ = drive(DiCacheConfig(**rules), steps)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("how", "bytes_an_element"),
    [
        ({"cache_device": "cpu"}, 4),
        ({"cache_dtype": torch.bfloat16}, 2),
        ({"cache_dtype": FP8}, 1 + 4 / 16),  # and a scale for every row of 16
    ],
    ids=["host", "bf16", "fp8"],
)
def test_buffers_are_empty_beside_the_blocks_and_between_steps(
    how, bytes_an_element, rules
) -> None:
    session = DiCacheSession(DiCacheConfig(**rules, **how))
    for x, p, y in walk(8):
        with session.step("cond", num_inference_steps=8) as step:
            if step.needs_probe:
                step.probe(x, p)
            if step.action == "reuse":
                step.reuse(x)
            else:
                step.resume(x, p)
                held = buffers(trajectory_of(session))
                assert [each.untyped_storage().nbytes() for each in held] == [0] * len(held)
                step.record(y if step.rows is None else y[step.rows])
        held = buffers(trajectory_of(session))
        assert [each.untyped_storage().nbytes() for each in held] == [0] * len(held)
    count = {"delta_minus": 6, "delta_y": 5}.get(rules.get("error", ""), 4)
    small = small_bytes(3, count)
    assert session.stats.cache_tensors == count
    assert session.stats.cache_bytes == count * 3 * 4 * 16 * bytes_an_element + small


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_gamma_is_that_of_the_rounded_trajectory(dtype: torch.dtype, granularity: str) -> None:
    """A probe on the line through the two entries, as they are read, has no misfit."""
    rules = {"threshold": math.inf, "granularity": granularity, "error": "alignment", **FREE}
    session = DiCacheSession(DiCacheConfig(**rules, cache_dtype=dtype))
    for x, p, y in walk(2):
        with session.step("cond", num_inference_steps=9) as step:
            step.record(x, p, y)
    trajectory = trajectory_of(session)
    trajectory.store.open("probe_window")
    newest = int(trajectory.newest[0])
    older, newer = trajectory.store["probe_window"][[1 - newest, newest]].clone()
    trajectory.store.empty("probe_window")
    with session.step("cond", num_inference_steps=9) as step:
        x = torch.zeros_like(older)
        found = step.probe(x, older + 0.7 * (newer - older))
        for decision in found.samples or (found,):
            assert decision.gamma == pytest.approx(0.7, abs=1e-5)
            assert decision.error < 1e-3
        step.reuse(x)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_a_rounded_cache_stays_close(dtype: torch.dtype, rules: dict[str, Any]) -> None:
    """Under one schedule; bf16 keeps 8 bits of a residual, fp8 4, and gamma adds three of them."""
    rules = {**rules, "threshold": None, "schedule": "CCRCRRCR"}
    outputs, _ = drive(DiCacheConfig(**rules, cache_dtype=dtype), walk(8))
    expected, _ = drive(DiCacheConfig(**rules), walk(8))
    largest = max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, expected, strict=True))
    assert 0 < largest < 8 * 2.0 ** (-9 if dtype == torch.bfloat16 else -5)


@given(
    exponents=st.lists(st.integers(-20, 20), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    dim=st.sampled_from((-1, -2)),
)
@draws(30)
def test_fp8_rounds_each_token_by_itself(exponents: list[int], seed: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, len(exponents), 32, generator=generator)
    rows *= 2.0 ** torch.tensor(exponents).reshape(-1, 1)
    rows = rows.transpose(-1, dim).contiguous()
    buffer = rows.clone()
    packed = PackedBuffer(buffer, FP8, None, dim)
    packed._make_room()
    buffer.copy_(rows)
    packed.save()
    packed.empty()
    packed.fill()
    # Four significant bits, or the smallest step of a token whose largest element is 448.
    step = rows.abs().amax(dim, keepdim=True) / 448 * 2.0**-9
    assert bool(((buffer - rows).abs() <= torch.maximum(rows.abs() * 2.0**-4, step)).all())
    again = buffer.clone()
    packed.save()
    packed.empty()
    packed.fill()
    assert torch.allclose(buffer, again, rtol=1e-6, atol=0)  # packing twice does not drift


def test_fp8_keeps_zeros_and_marks_what_is_not_finite() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, math.nan], [1.0, math.inf]]).reshape(1, 3, 2)
    buffer = rows.clone()
    packed = PackedBuffer(buffer, FP8, None)
    packed._make_room()
    buffer.copy_(rows)
    packed.save()
    packed.reread()
    assert buffer[0, 0].tolist() == [0.0, 0.0]
    assert not buffer[0, 1:].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
def test_tokens_that_lie_transposed_are_rounded_as_the_others(dtype: torch.dtype) -> None:
    steps = walk(12)
    rules = {**RULES["default"], "cache_dtype": dtype}
    outputs, session = drive(DiCacheConfig(**rules), [transposed(step) for step in steps])
    expected, plain = drive(DiCacheConfig(**rules), steps)
    assert session.stats.cache_bytes == plain.stats.cache_bytes
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("fails_at", ["_make_room", "_unpack", "_pack", "empty"])
def test_an_error_while_buffers_are_filled_or_packed_is_survived(
    fails_at: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a device has no memory left: the next steps begin anew, and touch nothing empty."""
    rules = {**FREE, "threshold": math.inf, "granularity": granularity}
    session, left = DiCacheSession(DiCacheConfig(**rules, cache_device="cpu")), [0]
    original = getattr(PackedBuffer, fails_at)

    def failing(packed: PackedBuffer) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        original(packed)

    monkeypatch.setattr(PackedBuffer, fails_at, failing)
    taken = []
    for index, (x, p, y) in enumerate(walk(10)):
        left[0] = 1 if index in (0, 3, 4) else 0
        try:
            with session.step("cond") as step:
                if step.needs_probe:
                    step.probe(x, p)
                if step.action == "reuse":
                    step.reuse(x)
                else:
                    step.record(x, p, y)
            taken.append(step.action)
        except MemoryError:
            taken.append("failed")
    assert "failed" in taken and taken[-2:] == ["reuse", "reuse"]


def test_large_fp16_residuals_stay_finite_in_bf16() -> None:
    steps = [(x.half(), p.half(), y.half()) for x, p, y in walk(6)]
    for x, _, y in steps:
        y[..., 0], x[..., 0] = 65504.0, 0.0
    rules = {**FREE, "schedule": "CCRRCR"}
    outputs, _ = drive(DiCacheConfig(**rules, cache_dtype=torch.bfloat16), steps)
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_the_last_blocks_dtype_may_change_in_the_middle_of_a_run(granularity: str) -> None:
    steps = [(x, p, y.bfloat16() if index > 4 else y) for index, (x, p, y) in enumerate(walk(12))]
    rules = {**RULES["default"], "granularity": granularity}
    outputs, _ = drive(DiCacheConfig(**rules, cache_device="cpu"), steps)
    expected, _ = drive(DiCacheConfig(**rules), steps)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def transposed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same [B, S, D], in memory as [B, D, S]."""
    return tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors)


@pytest.mark.filterwarnings("ignore::dicache.DiCacheWarning")
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_nan_in_a_packed_entry_is_computed(rules: dict[str, Any]) -> None:
    steps = walk(8)
    steps[1][2][0, 0, 0] = math.nan
    rules = {**rules, "threshold": math.inf}
    outputs, session = drive(DiCacheConfig(**rules, cache_dtype=FP8), steps)
    expected, plain = drive(DiCacheConfig(**rules), steps)
    taken = [(record.step, record.action) for record in session.stats.records()]
    assert taken == [(record.step, record.action) for record in plain.stats.records()]
    finite = [bool(output.isfinite().all()) for output in outputs]
    assert finite == [bool(output.isfinite().all()) for output in expected]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("family", ["flux", "hunyuan-video", "wan"])
def test_models_in_host_memory_give_the_same_pictures(family: str, granularity: str) -> None:
    results = []
    for how in ({}, {"cache_device": "cpu"}):
        model = build(family)
        apply_dicache(model, DiCacheConfig(schedule="CCRCRR", granularity=granularity, **how))
        with torch.no_grad():
            results.append([model(**inputs)[0] for inputs in calls(family, 6)])
        assert get_stats(model).num_reused > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("cache_dtype", "bf16"), ("cache_dtype", torch.float32), ("cache_device", "cuda")],
)
def test_other_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*Expected None"):
        DiCacheConfig(**{field: value})


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_on_a_gpu_host_memory_gives_the_same_bits(rules: dict[str, Any]) -> None:
    steps = [tuple(tensor.cuda() for tensor in step) for step in walk(12)]
    outputs, session = drive(DiCacheConfig(**rules, cache_device="cpu"), steps)
    expected, _ = drive(DiCacheConfig(**rules), steps)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    store = trajectory_of(session).store
    assert isinstance(store, PackedStore)
    packed = store._buffers["residual_window"]
    assert packed._packed.is_pinned() and packed.tensor.is_cuda
