"""What the operator benchmarks compare with, count and refuse to time is what they say it is."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import agreement
import bench_ops
import findings
import operators
import pytest
import report
import timing
import torch
import workloads
from stages import Outcome

from dicache import ops, reference

CPU = torch.device("cpu")


def published_case(dtype: torch.dtype) -> Any:
    """The published sequence at a size with two samples."""
    size = dataclasses.replace(workloads.SMALL, shape=(2, 40, 24))
    operation = workloads.OPERATIONS["skipped_step"]
    return workloads.Case(operation, "published", size, dtype)


def test_published_sequence_gives_error_gamma_and_y_of_the_reference() -> None:
    """In fp64, where rounding leaves twelve digits: delta_y, the clipped gamma, and y."""
    case = published_case(torch.float64)
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


def test_published_sequence_clips_gamma() -> None:
    """A probe residual ten times as large would give a gamma far above the bound."""
    case = published_case(torch.float32)
    tensors = workloads.make_tensors(case, CPU)
    tensors["p"] = tensors["x"] + 10 * (tensors["p"] - tensors["x"])
    _, gamma, _ = workloads.bind(case, tensors)()
    assert gamma == workloads.HIGH


def test_published_passes_are_counted_from_the_operations() -> None:
    """48 tensors of the hidden states' size read or written; the text and scalars do not count."""
    case = published_case(torch.float32)
    tensors = workloads.make_tensors(case, CPU)
    passes = PassCounter(tensors["x"].numel())
    with passes:
        workloads.bind(case, tensors)()
    assert passes.count == workloads.PUBLISHED_PASSES == case.passes
    # Two copies of x, one of the text, 6 for each delta, q, 3 for each mean, ratio, clip and y's 4.
    launches = timing.count_launches(workloads.bind(case, tensors), CPU)
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
def test_bytes_are_passes_times_the_tensor(operation: str, tensors: int) -> None:
    """By the operators' table: 25,165,824 bytes a tensor of FLUX, 2 x 4096 x 3072."""
    for implementation in ("reference", "cuda"):
        case = workloads.Case(workloads.OPERATIONS[operation], implementation, workloads.FLUX)
        assert case.num_bytes == tensors * 25_165_824


def test_rates_and_ratios_follow_from_times() -> None:
    """9 passes of 25.2 MB in 100 us are 2265 GB/s; ten times the published sequence's speed."""
    step = workloads.OPERATIONS["skipped_step"]
    made = [
        operators.make_row(workloads.Case(step, name, workloads.FLUX), seconds, 4000.0)
        for name, seconds in (("cuda", 1e-4), ("reference", 5e-4), ("published", 1e-3))
    ]
    found = findings.Findings([Outcome("times", "passed", results=made)], dry=False)
    mine, _, published = found.times()
    assert mine["gb_per_s"] == pytest.approx(9 * 25_165_824 / 1e-4 / 1e9)
    assert mine["fraction_of_copy"] == pytest.approx(0.5662, rel=1e-3)
    assert mine["over_reference"] == pytest.approx(5)
    assert mine["over_published"] == pytest.approx(10)
    assert published["gb_per_s"] == pytest.approx(48 * 25_165_824 / 1e-3 / 1e9)
    text = report.markdown(found, "a command")
    assert "| skipped_step | cuda | 100.0 | 9 | 2264.9 | 57% |  | 5.00x | 10.00x |" in text


def test_every_available_case_is_right_at_odd_sizes() -> None:
    """Backends and the published sequence pass the check that stands before every time."""
    size = workloads.Size("odd", (2, 37, 23), 5, "odd")
    checked = []
    for case in workloads.cases(CPU, [size], [*workloads.backends(CPU), "published"]):
        agreement.check_case(case, CPU)
        checked.append(case.implementation)
    assert "published" in checked
    assert ("cpp" in checked) == (ops.backend_status()["cpp"] == "available")


@pytest.mark.parametrize(
    "broken", ["alignment_statistics", "combine_residuals", "extrapolate_residuals"]
)
def test_a_wrong_result_gets_no_time(monkeypatch, broken: str) -> None:
    """A body that is off by a thousandth, or by one element's last bit, is refused."""
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
        agreement.check_case(case, CPU)
    monkeypatch.setattr(bench_ops, "DEVICE", CPU)
    timed: list[Any] = []
    with pytest.raises(AssertionError, match=f"small-{broken}-cpp"):
        bench_ops.test_operator("small", broken, "cpp", timed.append)
    assert timed == []


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `make bench` keeps of short rounds at the small size, compiled code left out."""
    kept = tmp_path_factory.mktemp("run") / "run.json"
    command = [sys.executable, "-m", "pytest", Path(bench_ops.__file__).parent]
    command += ["-o", "python_files=bench_*.py", "-p", "no:cacheprovider", "--benchmark-only"]
    command += [f"--benchmark-json={kept}", "--benchmark-max-time=0.001"]
    command += ["-k", "small and not compile or bench_host"]
    # pytest-benchmark does not time beside other workers, and takes this process for one of them.
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env=alone
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(kept.read_text())


def test_microbenchmarks_time_every_operator_by_every_backend(saved_run) -> None:
    """In groups that compare implementations, with the rate that follows from the fastest round."""
    found = set()
    for row in saved_run["benchmarks"]:
        if not row["name"].startswith("test_operator"):
            continue
        size, operation, implementation = row["params"].values()
        found.add((operation, implementation))
        assert row["group"] == f"{size}: {operation}"
        passes = 48 if implementation == "published" else workloads.OPERATIONS[operation].passes
        moved, fastest = passes * 2 * 256 * 64, row["stats"]["min"]  # [1, 256, 64] in bf16
        assert row["extra_info"]["gb_per_s"] == pytest.approx(moved / fastest / 1e9)
        assert row["stats"]["rounds"] >= 5
    operations = {*ops.MEMORY_PASSES, "skipped_step", "skipped_step_default"}
    backends = workloads.backends(bench_ops.DEVICE)
    assert found == {*product(operations, backends), ("skipped_step", "published")}


def test_a_saved_run_has_a_copy_the_hosts_time_and_what_it_was_measured_on(saved_run) -> None:
    names = {row["name"] for row in saved_run["benchmarks"]}
    hosts = {f"test_skipped_step[{name}]" for name in ("dicache", "FirstBlockCache", "probe alone")}
    assert names > hosts | {"test_copy[small]"}
    assert saved_run["machine_info"]["versions"]["torch"] == torch.__version__
    assert "cpu" in saved_run["machine_info"]["devices"]


def test_tensors_are_random_and_repeat() -> None:
    """No zeros, entries that differ, and the same bits from the same seed."""
    names = ("x", "p", "y", "p_prev", "probe_window", "residual_window")
    first, again, other = (
        workloads.make_named_tensors(names, workloads.SMALL, CPU, seed) for seed in (0, 0, 1)
    )
    for name in names:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert first[name].float().std() > 0.1
    assert not torch.equal(*first["probe_window"])


def test_rotation_leaves_the_cache(monkeypatch) -> None:
    """More than four caches of 60 MB in all, two sets at least, and 32 at most."""
    monkeypatch.setattr(workloads, "cache_bytes", lambda device: 60 * 2**20)
    flux = workloads.FLUX.tensor_bytes()
    assert workloads.num_sets(4 * flux, CPU) * 4 * flux > 4 * 60 * 2**20
    assert workloads.num_sets(workloads.HUNYUAN_VIDEO.tensor_bytes(), CPU) == 2
    assert workloads.num_sets(workloads.SMALL.tensor_bytes(), CPU) == 32


def test_samples_rotate_over_all_sets() -> None:
    """A loop of calls takes the sets in turn, and its time is that of one call."""
    seen: list[int] = []
    calls = [lambda index=index: seen.append(index) for index in range(3)]
    assert 0 < timing.seconds_per_call(calls, CPU, seconds=0.0) < 1e-3
    assert len(seen) >= 3
    assert all(second == (first + 1) % 3 for first, second in zip(seen, seen[1:], strict=False))


def test_host_time_loops_leave_room_in_the_queue() -> None:
    """An operator that dispatches many kernels is called fewer times in a row."""
    x = torch.ones(4)

    def call() -> None:
        for _ in range(100):
            x.add_(1)

    timing.host_seconds([call], CPU)
    assert x[0] <= 1 + 100 * (
        2 + 10 * 6
    )  # a warm-up, one counted call, then ten loops of 600 launches
