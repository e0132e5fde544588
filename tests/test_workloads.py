"""What the operator benchmarks compare with, count and refuse to time is what they say it is."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dicache import ops, reference

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of the benchmarks, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import agreement
        import rows
        import timing
        import workloads

        yield SimpleNamespace(agreement=agreement, rows=rows, timing=timing, workloads=workloads)
    finally:
        sys.path.remove(str(BENCHMARKS))


def published_case(bench: SimpleNamespace, dtype: torch.dtype) -> Any:
    """The published sequence at a size with two samples."""
    size = dataclasses.replace(bench.workloads.SMALL, shape=(2, 40, 24))
    operation = bench.workloads.OPERATIONS["skipped_step"]
    return bench.workloads.Case(operation, "published", size, dtype)


def test_published_sequence_gives_error_gamma_and_y_of_the_reference(bench) -> None:
    """In fp64, where rounding leaves twelve digits: delta_y, the clipped gamma, and y."""
    workloads = bench.workloads
    case = published_case(bench, torch.float64)
    tensors = workloads.make_tensors(case, CPU)
    error, gamma, y = workloads.bind(case, tensors)()
    newest = torch.ones(2, dtype=torch.int32)
    d = tensors["probe_window"][1] - tensors["probe_window"][0]
    entry_sums = torch.stack(
        [d.abs().sum((1, 2)), d.square().sum((1, 2)), *torch.ones(2, 2).double()], dim=1
    )
    sums, result = reference.probe_statistics(
        *(tensors[name] for name in ("x", "p", "p_prev")),
        None,
        tensors["probe_window"],
        newest,
        entry_sums,
        workloads.LOW,
        workloads.HIGH,
    )
    torch.testing.assert_close(torch.stack([error, gamma]), result[-1], rtol=1e-12, atol=0)
    assert workloads.LOW < gamma < workloads.HIGH
    weights = result[-1, 1].expand(2)
    expected = reference.combine_residuals(
        tensors["x"], tensors["residual_window"], newest, weights
    )
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_published_sequence_clips_gamma(bench) -> None:
    """A probe residual ten times as large would give a gamma far above the bound."""
    workloads = bench.workloads
    case = published_case(bench, torch.float32)
    tensors = workloads.make_tensors(case, CPU)
    tensors["p"] = tensors["x"] + 10 * (tensors["p"] - tensors["x"])
    _, gamma, _ = workloads.bind(case, tensors)()
    assert gamma == workloads.HIGH


def test_published_passes_are_counted_from_the_operations(bench) -> None:
    """48 tensors of the hidden states' size read or written; the text and scalars do not count."""
    case = published_case(bench, torch.float32)
    tensors = bench.workloads.make_tensors(case, CPU)
    passes = PassCounter(tensors["x"].numel())
    with passes:
        bench.workloads.bind(case, tensors)()
    assert passes.count == bench.workloads.PUBLISHED_PASSES == case.passes
    # Two copies of x, one of the text, 6 for each delta, q, 3 for each mean, ratio, clip and y's 4.
    launches = bench.timing.count_launches(bench.workloads.bind(case, tensors), CPU)
    assert launches == 2 + 1 + 2 * 6 + 1 + 2 * 3 + 2 + 4


class PassCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts tensors of one size that operations (not views) read and write."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
            self.count += sum(tensor.numel() == self.numel for tensor in tensors)
        return result


@pytest.mark.parametrize(
    ("operation", "tensors"),
    [
        ("probe_statistics", 5),
        ("alignment_statistics", 4),
        ("combine_residuals", 4),
        ("extrapolate_residuals", 7),
        ("record_residuals", 6),
        ("skipped_step", 9),
        ("skipped_step_default", 8),
    ],
)
def test_bytes_are_passes_times_the_tensor(bench, operation: str, tensors: int) -> None:
    """By the operators' table: 25,165,824 bytes a tensor of FLUX, 2 x 4096 x 3072."""
    workloads = bench.workloads
    for implementation in ("reference", "cuda"):
        case = workloads.Case(workloads.OPERATIONS[operation], implementation, workloads.FLUX)
        assert case.num_bytes == tensors * 25_165_824


def test_rates_and_ratios_follow_from_times(bench) -> None:
    """9 passes of 25.2 MB in 100 us are 2265 GB/s; ten times the published sequence's speed."""
    workloads, rows = bench.workloads, bench.rows
    step = workloads.OPERATIONS["skipped_step"]
    made = [
        rows.make_row(workloads.Case(step, name, workloads.FLUX), seconds, 4000.0, 2, 3, "device")
        for name, seconds in (("cuda", 1e-4), ("reference", 5e-4), ("published", 1e-3))
    ]
    rows.add_ratios(made)
    assert made[0]["gb_per_s"] == pytest.approx(9 * 25_165_824 / 1e-4 / 1e9)
    assert made[0]["fraction_of_copy"] == pytest.approx(0.5662, rel=1e-3)
    assert made[0]["over_reference"] == pytest.approx(5)
    assert made[0]["over_published"] == pytest.approx(10)
    assert made[2]["gb_per_s"] == pytest.approx(48 * 25_165_824 / 1e-3 / 1e9)
    assert "| skipped_step | cuda | 100.0 | 9 |" in rows.markdown(made)


def test_every_available_case_is_right_at_odd_sizes(bench) -> None:
    """Backends and the published sequence pass the check that stands before every time."""
    workloads = bench.workloads
    size = workloads.Size("odd", (2, 37, 23), 5, "odd")
    checked = []
    for case in workloads.cases(CPU, [size], [*workloads.backends(CPU), "published"]):
        bench.agreement.check_case(case, CPU)
        checked.append(case.implementation)
    assert "published" in checked
    assert ("cpp" in checked) == (ops.backend_status()["cpp"] == "available")


def test_reference_in_slabs_is_the_reference(bench, monkeypatch) -> None:
    """Three slabs of fp64 tokens, the last one shorter: twelve digits of the undivided result."""
    workloads = bench.workloads
    size = workloads.Size("odd", (2, 37, 23), 5, "odd")
    monkeypatch.setattr(bench.agreement, "_SLAB", 16 * 23)
    for operation in workloads.OPERATIONS.values():
        case = workloads.Case(operation, "reference", size, torch.float64)
        whole, slabs = (workloads.make_tensors(case, CPU) for _ in range(2))
        for tensors in (whole, slabs):
            if "entry_sums" in tensors:
                tensors["entry_sums"] = tensors["entry_sums"].double() * 1.25
        expected = workloads.bind(case, whole)()
        arguments = [slabs[name] for name in operation.arguments]
        got = operation.run(bench.agreement.ReferenceInSlabs(size), *arguments)
        torch.testing.assert_close(list(got), list(expected), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slabs, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "broken", ["alignment_statistics", "combine_residuals", "extrapolate_residuals"]
)
def test_a_wrong_result_gets_no_time(bench, monkeypatch, broken: str) -> None:
    """A body that is off by a thousandth, or by one element's last bit, is refused."""
    workloads = bench.workloads
    right = getattr(reference, broken)

    def wrong(*args, **kwargs):
        returned = right(*args, **kwargs)
        if broken == "alignment_statistics":
            return returned[0] * 1.001, returned[1]
        returned.view(-1)[-1].view(torch.int16).bitwise_xor_(1)
        return returned

    backend = SimpleNamespace(**{broken: wrong})
    resolve = ops.resolve_backend
    monkeypatch.setattr(
        ops, "resolve_backend", lambda name, device: backend if name == "cpp" else resolve(name)
    )
    case = workloads.Case(workloads.OPERATIONS[broken], "cpp", workloads.SMALL)
    with pytest.raises(AssertionError, match=f"small-{broken}-cpp"):
        bench.agreement.check_case(case, CPU)


def test_tensors_are_random_and_repeat(bench) -> None:
    """No zeros, entries that differ, and the same bits from the same seed."""
    workloads = bench.workloads
    names = ("x", "p", "y", "p_prev", "probe_window", "residual_window")
    first, again, other = (
        workloads.make_named_tensors(names, workloads.SMALL, CPU, seed) for seed in (0, 0, 1)
    )
    for name in names:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert first[name].float().std() > 0.1
    assert not torch.equal(*first["probe_window"])


def test_rotation_leaves_the_cache(bench, monkeypatch) -> None:
    """More than four caches of 60 MB in all, two sets at least, and 32 at most."""
    workloads = bench.workloads
    monkeypatch.setattr(workloads, "cache_bytes", lambda device: 60 * 2**20)
    flux = workloads.FLUX.tensor_bytes()
    assert workloads.num_sets(4 * flux, CPU) * 4 * flux > 4 * 60 * 2**20
    assert workloads.num_sets(workloads.HUNYUAN_VIDEO.tensor_bytes(), CPU) == 2
    assert workloads.num_sets(workloads.SMALL.tensor_bytes(), CPU) == 32


def test_samples_rotate_over_all_sets(bench) -> None:
    """A loop of calls takes the sets in turn, and its time is that of one call."""
    seen: list[int] = []
    calls = [lambda index=index: seen.append(index) for index in range(3)]
    sampler = bench.timing.Sampler(calls, CPU, seconds=0.0)
    seen.clear()
    assert 0 < sampler() < 1e-3
    assert len(seen) >= 3
    assert all(second == (first + 1) % 3 for first, second in zip(seen, seen[1:], strict=False))


def test_host_time_loops_leave_room_in_the_queue(bench) -> None:
    """An operator that dispatches many kernels is called fewer times in a row."""
    x = torch.ones(4)

    def call() -> None:
        for _ in range(100):
            x.add_(1)

    bench.timing.host_seconds([call], CPU)
    assert x[0] <= 1 + 100 * (1 + 10 * 6)  # one counted call, then ten loops of 600 launches
