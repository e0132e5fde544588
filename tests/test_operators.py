"""Every backend computes what the reference defines: stored values to the bit, sums to rounding.

The sums are judged by the reference in fp64 on the same values. The bound is that of fp32 addition
of at most `CHAIN` terms one after the other, relative to the sum of the terms' magnitudes. Results
(error, gamma) are judged by the reference's own last step on the sums that the backend returned, so
that a nearly perfect prediction, a small difference of large sums, does not blur the comparison.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import overlaps
import pytest
import torch
from fuzzing import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from operator_backends import Backend, why_not
from operator_cases import SENTINEL, Case, Layout, cases
from torch import Tensor

from dicache import DiCacheConfig, DiCacheSession, ops, reference

# The longest chain of fp32 additions: 8192 / 16 lanes on the CPU. A GPU thread's is shorter here.
CHAIN = 512
EPSILON = 2.0**-24

FUZZ = draws(
    60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def to_wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().clone()  # fp64 on the CPU would be the tensor itself


def assert_sums(sums: Tensor, expected: Tensor, magnitudes: Tensor) -> None:
    """|sums - expected| <= CHAIN epsilon magnitudes, the worst case of fp32 addition."""
    bound = CHAIN * EPSILON * magnitudes + 1e-30
    assert ((to_wide(sums) - expected).abs() <= bound).all(), (sums, expected)


def assert_finished(result: Tensor, expected: Tensor) -> None:
    # A handful of roundings in the last line, in the dtype of the sums.
    tolerance = 1e-12 if result.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        result.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )


@FUZZ
@given(case=cases(), minus=st.booleans(), least_squares=st.booleans())
def test_probe_statistics(backend: Backend, case: Case, minus: bool, least_squares: bool) -> None:
    case.device = backend.device
    case.layouts["p_prev"].shared = case.layouts["x_prev"].shared = False  # written
    x, p = case.tensor("x", case.x_dtype), case.tensor("p", case.p_dtype)
    p_prev, x_prev = case.tensor("p_prev", case.p_dtype), case.tensor("x_prev", case.x_dtype)
    window, newest = case.tensor("probe_window", case.p_dtype, entries=2), case.newest()
    entry_sums, active = case.entry_sums(), case.active_flags()
    wide = [to_wide(t) for t in (x, p, p_prev, x_prev, window)]
    before = p_prev.clone(), x_prev.clone()
    sums, result = backend.ops.probe_statistics(
        x,
        p,
        p_prev,
        x_prev if minus else None,
        window,
        newest,
        entry_sums,
        0.5,
        1.5,
        least_squares,
        active,
        backend.workspace(x),
    )
    arguments = (newest.cpu(), to_wide(entry_sums), 0.5, 1.5, least_squares)
    flags = None if active is None else active.cpu()
    kept = wide[3] if minus else None
    expected, _ = reference.probe_statistics(*wide[:3], kept, wide[4], *arguments, flags)
    magnitudes = expected.abs()
    if least_squares:
        magnitudes[:, 2] = inner_product_magnitude(wide, case, newest, flags)
    assert sums.dtype == (torch.float64 if case.wide else torch.float32)
    assert_sums(sums, expected, magnitudes)
    assert_finished(result, reference.finish_probe_statistics(sums.cpu(), 0.5, 1.5))
    chosen = torch.ones(case.batch, dtype=torch.bool) if flags is None else flags.bool()
    for sample in range(case.batch):
        stored = (p, x if minus else before[1]) if chosen[sample] else before
        assert torch.equal(p_prev[sample], stored[0][sample])
        assert torch.equal(x_prev[sample], stored[1][sample])
    assert case.surroundings_are_untouched()


def inner_product_magnitude(
    wide: list[Tensor], case: Case, newest: Tensor, active: Tensor | None
) -> Tensor:
    """sum |a d| [B]: what <a, d> loses digits against."""
    x, p, window = wide[0], wide[1], wide[-1]
    rows = []
    for sample in range(case.batch):
        new = int(newest[sample])
        a = p[sample] - x[sample] - window[1 - new, sample]
        d = window[new, sample] - window[1 - new, sample]
        counts = active is None or bool(active[sample])
        rows.append((a * d).abs().sum() * counts)
    return torch.stack(rows)


@FUZZ
@given(case=cases(), to_probe=st.booleans())
def test_alignment_statistics(backend: Backend, case: Case, to_probe: bool) -> None:
    case.device = backend.device
    x, p = case.tensor("x", case.x_dtype), case.tensor("p", case.p_dtype)
    window, newest = case.tensor("probe_window", case.p_dtype, entries=2), case.newest()
    entry_sums, active = case.entry_sums(), case.active_flags()
    sums, result = backend.ops.alignment_statistics(
        x, p, window, newest, entry_sums, 0.0, math.inf, to_probe, active, backend.workspace(x)
    )
    wide = [to_wide(t) for t in (x, p, window)]
    flags = None if active is None else active.cpu()
    expected, _ = reference.alignment_statistics(
        *wide, newest.cpu(), to_wide(entry_sums), 0.0, math.inf, to_probe, flags
    )
    magnitudes = expected.abs()
    magnitudes[:, 1] = inner_product_magnitude(wide, case, newest, flags)
    assert sums.dtype == (torch.float64 if case.wide else torch.float32)
    assert_sums(sums, expected, magnitudes)
    last = reference.finish_alignment_statistics(sums.cpu(), 0.0, math.inf, to_probe)
    assert_finished(result, last)
    assert case.surroundings_are_untouched()


@FUZZ
@given(case=cases(), in_place=st.booleans(), allocate=st.booleans(), one=st.booleans())
def test_combine_residuals(
    backend: Backend, case: Case, in_place: bool, allocate: bool, one: bool
) -> None:
    case.device = backend.device
    in_place = in_place and case.x_dtype == case.y_dtype and not allocate
    case.layouts["x"].shared = case.layouts["x"].shared and not in_place
    x = case.tensor("x", case.x_dtype)
    window, newest = case.tensor("residual_window", case.y_dtype, entries=2), case.newest()
    gamma = torch.rand(case.batch, generator=case.generator("gamma")).to(backend.device) * 2
    gamma = gamma[:1].expand(case.batch) if one else gamma
    active, out = case.active_flags(), None
    if not allocate:
        out = x if in_place else case.tensor("out", case.y_dtype, fill=False)
    initial = None if out is None else out.cpu().clone()
    inputs = (x.cpu().clone(), window.cpu(), newest.cpu(), gamma.cpu())
    y = backend.ops.combine_residuals(x, window, newest, gamma, active, out)
    flags = None if active is None else active.cpu()
    expected = reference.combine_residuals(*inputs, flags, initial)
    assert y.dtype == case.y_dtype
    assert torch.equal(y.cpu(), expected)
    assert case.surroundings_are_untouched()


@FUZZ
@given(
    case=cases(),
    out=st.sampled_from(["new", "given", "x"]),
    one=st.booleans(),
    wide_weights=st.booleans(),
)
def test_extrapolate_residuals(
    backend: Backend, case: Case, out: str, one: bool, wide_weights: bool
) -> None:
    case.device = backend.device
    in_place = out == "x" and case.x_dtype == case.y_dtype
    case.layouts["x"].shared = case.layouts["x"].shared and not in_place
    x, p = case.tensor("x", case.x_dtype), case.tensor("p", case.p_dtype)
    residuals = case.tensor("residual_window", case.y_dtype, entries=2)
    oldest = case.tensor("oldest", case.y_dtype)
    probes = case.tensor("probe_window", case.p_dtype, entries=2)
    is_wide = torch.float64 in (case.x_dtype, case.p_dtype, case.y_dtype)
    weights = case.weights(one, wide_weights and is_wide)
    newest, active, given = case.newest(), case.active_flags(), None
    if out != "new":
        given = x if in_place else case.tensor("out", case.y_dtype, fill=False)
    initial = None if given is None else given.cpu().clone()
    read = (x, p, residuals, oldest, probes, newest, weights)
    inputs = [tensor.cpu().clone() for tensor in read]
    y = backend.ops.extrapolate_residuals(*read, active, given)
    flags = None if active is None else active.cpu()
    expected = reference.extrapolate_residuals(*inputs, flags, initial)
    assert y.dtype == case.y_dtype
    assert given is None or y is given
    assert torch.equal(y.cpu(), expected)
    for tensor, before in zip(read[in_place:], inputs[in_place:], strict=True):
        assert torch.equal(tensor.cpu(), before)
    assert case.surroundings_are_untouched()


@FUZZ
@given(case=cases(), first=st.booleans(), parked=st.booleans())
def test_record_residuals(backend: Backend, case: Case, first: bool, parked: bool) -> None:
    case.device = backend.device
    for window in ("residual_window", "probe_window"):
        case.layouts[window].shared = False
    x, p = case.tensor("x", case.x_dtype), case.tensor("p", case.p_dtype)
    y = case.tensor("y", case.y_dtype)
    residuals = case.tensor("residual_window", case.y_dtype, entries=2)
    probes = case.tensor("probe_window", case.p_dtype, entries=2)
    newest = case.newest()
    entry_sums, active = case.entry_sums(wide=case.wide), case.active_flags()
    if parked:  # in the older entries, which are overwritten; they must be the same for all samples
        newest.fill_(1)
        p = probes[0].copy_(p)
        x = residuals[0].copy_(x) if case.x_dtype == case.y_dtype else x
    mine = [t.cpu().clone() for t in (residuals, probes, newest, entry_sums)]
    inputs = [t.cpu().clone() for t in (x, p, y)]
    backend.ops.record_residuals(
        x, p, y, residuals, probes, newest, entry_sums, first, active, backend.workspace(x)
    )
    flags = None if active is None else active.cpu()
    reference.record_residuals(*inputs, *mine, first, flags)
    assert torch.equal(residuals.cpu(), mine[0])
    assert torch.equal(probes.cpu(), mine[1])
    assert torch.equal(newest.cpu(), mine[2])
    # The reference adds in fp32 too, so both may be off by the bound.
    assert_sums(entry_sums, mine[3].double(), 2 * mine[3].double().abs())
    assert case.surroundings_are_untouched()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [5, 6, 7])
def test_finish(backend: Backend, columns: int, dtype: torch.dtype) -> None:
    sums = torch.rand(3, columns, dtype=dtype) + 0.5
    sums[1, 3] = 0.0  # gamma's denominator
    sums[2, 4] = math.nan  # a window that cannot be used
    name = "finish_alignment_statistics" if columns == 6 else "finish_probe_statistics"
    result = getattr(backend.ops, name)(sums.to(backend.device), 0.9, 1.1)
    assert_finished(result, getattr(reference, name)(sums, 0.9, 1.1))
    assert float(result[1, 1]) == 1.0
    assert result[2, 1].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "p", "probe_window", "entry_sums"])
def test_what_is_not_finite_reaches_the_result(backend: Backend, where: str, value: float) -> None:
    case = Case(2, (9000,), *[torch.bfloat16] * 3, {}, None, seed=1, device=backend.device)
    tensors = {name: case.tensor(name, torch.bfloat16) for name in ("x", "p")}
    tensors["probe_window"] = case.tensor("probe_window", torch.bfloat16, entries=2)
    tensors["entry_sums"] = case.entry_sums()
    newest = torch.zeros(2, dtype=torch.int32, device=backend.device)
    place = {"probe_window": (1, 1, 8999), "entry_sums": (1, 3)}.get(where, (1, 8999))
    tensors[where][place] = value
    shared = (tensors["probe_window"], newest, tensors["entry_sums"], 1.0, 1.5)
    p_prev = torch.ones_like(tensors["p"])
    for _, result in (
        backend.ops.alignment_statistics(tensors["x"], tensors["p"], *shared),
        backend.ops.probe_statistics(tensors["x"], tensors["p"], p_prev, None, *shared),
    ):
        assert result[0].isfinite().all()  # the other sample is not touched
        assert not result[1].isfinite().all()
        assert not result[2].isfinite().all()


def extrapolate_arguments(device: str, batch: int = 2, size: int = 9000) -> dict[str, Tensor]:
    """fp32; every number differs from every other."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    return {
        "x": draw(batch, size),
        "p": draw(batch, size),
        "residual_window": draw(2, batch, size),
        "oldest": draw(batch, size),
        "probe_window": draw(2, batch, size),
        "newest": torch.tensor([0, 1] * batch, dtype=torch.int32)[:batch].to(device),
        "weights": draw(batch, 3),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [5, 8999])
@pytest.mark.parametrize(
    ("where", "entry", "weight"),
    [
        ("x", (), None),
        ("p", (), 2),
        ("residual_window", (1,), 0),  # r_a
        ("residual_window", (0,), 1),  # r_b
        ("oldest", (), 1),
        ("probe_window", (1,), 2),  # q_a
    ],
)
def test_what_is_not_finite_reaches_y_whatever_its_weight(
    backend: Backend, where: str, entry: tuple, weight: int | None, position: int, value: float
) -> None:
    """In its own place alone. Sample 1's newer entries are 1."""
    for zero in (False, True):
        arguments = extrapolate_arguments(backend.device)
        arguments[where][(*entry, 1, position)] = value
        if zero and weight is not None:
            arguments["weights"][1, weight] = 0.0
        finite = backend.ops.extrapolate_residuals(**arguments).isfinite()
        assert not finite[1, position]
        assert finite.sum() == finite.numel() - 1


def test_the_older_probe_residual_is_not_read(backend: Backend) -> None:
    arguments = extrapolate_arguments(backend.device)
    expected = backend.ops.extrapolate_residuals(**arguments)
    arguments["probe_window"][1, 0] = arguments["probe_window"][0, 1] = math.nan
    assert torch.equal(backend.ops.extrapolate_residuals(**arguments), expected)


def test_a_weight_that_is_not_finite_reaches_all_of_its_sample(backend: Backend) -> None:
    for column in range(3):
        arguments = extrapolate_arguments(backend.device)
        arguments["weights"][1, column] = math.nan
        y = backend.ops.extrapolate_residuals(**arguments)
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


def statistics_arguments(device: str, batch: int, size: int) -> tuple:
    case = Case(batch, (size,), *[torch.bfloat16] * 3, {}, None, seed=2, device=device)
    x, p = case.tensor("x", torch.bfloat16), case.tensor("p", torch.bfloat16)
    window = case.tensor("probe_window", torch.bfloat16, entries=2)
    return x, p, window, case.newest(), case.entry_sums(), 0.0, 2.0


def test_runs_are_bitwise_equal(backend: Backend) -> None:
    arguments = statistics_arguments(backend.device, 2, 300_001)
    workspace = backend.workspace(arguments[0])
    runs = [backend.ops.alignment_statistics(*arguments, workspace=workspace) for _ in range(5)]
    for sums, result in runs[1:]:
        assert torch.equal(sums, runs[0][0])
        assert torch.equal(result, runs[0][1])


def test_a_call_without_a_workspace_gives_the_same_bits(backend: Backend) -> None:
    arguments = statistics_arguments(backend.device, 2, 100_003)
    workspace = backend.workspace(arguments[0])
    with_it, _ = backend.ops.alignment_statistics(*arguments, workspace=workspace)
    without, _ = backend.ops.alignment_statistics(*arguments)
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("batch", [0, 1, 40])
@pytest.mark.parametrize("size", [0, 1])
def test_empty_batches_and_samples(backend: Backend, batch: int, size: int) -> None:
    device = backend.device
    x = torch.ones(batch, size, device=device)
    window = torch.zeros(2, batch, size, device=device)
    newest = torch.zeros(batch, dtype=torch.int32, device=device)
    entry_sums = torch.ones(batch, 4, device=device)
    shared = (window, newest, entry_sums, 0.0, 2.0)
    on_cpu = (window.cpu(), newest.cpu(), entry_sums.cpu(), 0.0, 2.0)
    sums, result = backend.ops.alignment_statistics(x, x, *shared)
    expected, last = reference.alignment_statistics(x.cpu(), x.cpu(), *on_cpu)
    assert torch.equal(sums.cpu(), expected)
    assert_finished(result, last)
    sums, result = backend.ops.probe_statistics(x, x, x.clone(), x.clone(), *shared)  # delta_minus
    expected, last = reference.probe_statistics(*[x.cpu().clone() for _ in range(4)], *on_cpu)
    assert torch.equal(sums.cpu(), expected)
    assert_finished(result, last)
    y = backend.ops.combine_residuals(x, window, newest, torch.ones(batch, device=device))
    assert torch.equal(y, x)
    weights = torch.ones(batch, 3, device=device)
    y = backend.ops.extrapolate_residuals(x, x, window, x, window, newest, weights)
    assert torch.equal(y, x - x)  # r_b - r_c = -x
    backend.ops.record_residuals(x, x, x, window, window.clone(), newest, entry_sums, True)
    assert torch.equal(newest, torch.ones_like(newest))


# One, two, four and eight warps of a CUDA block add up a sample, eight samples at once at most.
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 9, 19])
def test_sums_of_any_number_of_samples(backend: Backend, batch: int) -> None:
    """Small integers, so that no order of adding rounds anything: all sums are exact."""
    device, size = backend.device, 4099
    generator = torch.Generator().manual_seed(batch)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float().to(device)

    x, p, y, p_prev = (drawn(batch, size) for _ in range(4))
    r, q, entry_sums = drawn(2, batch, size), drawn(2, batch, size), drawn(batch, 4).abs() + 1
    newest = torch.arange(batch, dtype=torch.int32).to(device) % 2
    active = (torch.arange(batch, device=device) % 4 != 3).to(torch.uint8)
    older = torch.arange(batch, device=device), 1 - newest.long()
    q_new, q_old = q[1 - older[1], older[0]], q[older[1], older[0]]
    on = active.bool()[:, None]

    sums, result = backend.ops.alignment_statistics(
        x, p, q, newest, entry_sums, 0.0, 2.0, active=active
    )
    a, d, size_q = (p - x) - q_old, q_new - q_old, p - x
    expected = [(a * a).sum(1), (a * d).sum(1), (size_q**2).sum(1), entry_sums[:, 1]]
    expected += [entry_sums[:, 2] + entry_sums[:, 3], (p * p).sum(1)]
    assert torch.equal(sums, torch.stack(expected, 1) * on)
    with_last = torch.cat([sums, sums.sum(0, keepdim=True)])
    finished = backend.ops.finish_alignment_statistics(with_last, 0.0, 2.0)[:-1]
    assert torch.equal(result.nan_to_num(7.0), finished.nan_to_num(7.0))

    sums, result = backend.ops.probe_statistics(
        x, p, p_prev.clone(), None, q, newest, entry_sums, 0.0, 2.0, active=active
    )
    expected = [(p - p_prev).abs().sum(1), p_prev.abs().sum(1), a.abs().sum(1), entry_sums[:, 0]]
    expected.append(entry_sums[:, 2] + entry_sums[:, 3])
    assert torch.equal(sums, torch.stack(expected, 1) * on)
    with_last = torch.cat([sums, sums.sum(0, keepdim=True)])
    finished = backend.ops.finish_probe_statistics(with_last, 0.0, 2.0)[:-1]
    assert torch.equal(result.nan_to_num(7.0), finished.nan_to_num(7.0))

    turned, left = newest.clone(), entry_sums.clone()
    backend.ops.record_residuals(x, p, y, r, q, turned, left, False, active=active)
    d = (p - x) - q_new
    expected = [d.abs().sum(1), (d * d).sum(1), (y - x).abs().sum(1), entry_sums[:, 2]]
    assert torch.equal(left, torch.where(on, torch.stack(expected, 1), entry_sums))
    assert torch.equal(turned, torch.where(on[:, 0], 1 - newest, newest))


def wrong(case: str, device: str) -> dict[str, Tensor | float]:
    """Good arguments of alignment_statistics with one of them spoilt."""
    x = torch.randn(2, 3, 4, device=device)
    arguments: dict[str, Tensor | float] = {
        "x": x,
        "p": x.clone(),
        "probe_window": torch.randn(2, 2, 3, 4, device=device),
        "newest": torch.zeros(2, dtype=torch.int32, device=device),
        "entry_sums": torch.ones(2, 4, device=device),
        "low": 0.0,
        "high": 1.0,
    }
    name, _, how = case.partition(" ")
    value = arguments[name]
    if isinstance(value, float):
        arguments[name] = math.nan if how == "nan" else 2.0
    elif how == "shape":
        arguments[name] = value[..., :-1].contiguous()
    elif how == "dtype":
        arguments[name] = value.to(torch.int64)
    elif how == "layout":
        arguments[name] = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif how == "half":
        arguments[name] = value.half()
    return arguments


CASES = [f"{n} {h}" for n in ("x", "p", "probe_window") for h in ("shape", "dtype")]
CASES += [f"{n} {h}" for n in ("newest", "entry_sums") for h in ("shape", "dtype")]
CASES += ["low value", "low nan", "probe_window half"]


@pytest.mark.parametrize("case", CASES)
def test_errors_name_the_argument(backend: Backend, case: str) -> None:
    named = "gamma is clipped" if case.startswith("low") else case.split()[0]
    if case == "x shape":
        named = "p"  # x is what the others are measured by
    arguments = wrong(case, backend.device)
    with pytest.raises((ValueError, RuntimeError), match=named) as error:
        backend.ops.alignment_statistics(**arguments)
    assert "Expected" in str(error.value)


@pytest.mark.parametrize("case", ["x layout", "p layout", "probe_window layout"])
def test_rows_that_are_not_contiguous(backend: Backend, case: str) -> None:
    arguments = wrong(case, backend.device)
    if backend.name == "reference":
        got = backend.ops.alignment_statistics(**arguments)
        plain = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        assert torch.equal(got[0], backend.ops.alignment_statistics(**plain)[0])
    else:
        with pytest.raises((ValueError, RuntimeError), match=r"(?s)contiguous.*reference"):
            backend.ops.alignment_statistics(**arguments)


WRONG_EXTRAPOLATIONS = [
    f"{name} {how}"
    for name in ("p", "residual_window", "oldest", "probe_window", "newest", "weights", "out")
    for how in ("shape", "dtype", "half")
]


@pytest.mark.parametrize("case", WRONG_EXTRAPOLATIONS)
def test_errors_of_extrapolate_name_the_argument(backend: Backend, case: str) -> None:
    arguments = extrapolate_arguments(backend.device, size=8)
    arguments["out"] = torch.zeros_like(arguments["x"])
    name, how = case.split()
    value = arguments[name]
    if how == "shape":
        arguments[name] = value[..., :-1].contiguous()
    else:
        arguments[name] = value.to(torch.int64 if how == "dtype" else torch.float16)
    # What keeps the dtype of another one is judged by it.
    named = {"p half": "probe_window", "residual_window half": "oldest|out"}.get(case, name)
    with pytest.raises((ValueError, RuntimeError), match=rf"^({named}) has ") as error:
        backend.ops.extrapolate_residuals(**arguments)
    assert "Expected" in str(error.value)


def test_fp64_weights_are_for_fp64_data(backend: Backend) -> None:
    arguments = extrapolate_arguments(backend.device, size=8)
    arguments["weights"] = arguments["weights"].double()
    with pytest.raises((ValueError, RuntimeError), match=r"^weights has dtype .*float64.*float32"):
        backend.ops.extrapolate_residuals(**arguments)
    for name in ("x", "p", "residual_window"):
        plain = extrapolate_arguments(backend.device, size=8)
        wide = {"p": ("p", "probe_window"), "residual_window": ("residual_window", "oldest")}
        for widened in wide.get(name, (name,)):
            plain[widened] = plain[widened].double()
        plain["weights"] = plain["weights"].double() + 1e-12  # lost in fp32
        expected = reference.extrapolate_residuals(**{k: v.cpu() for k, v in plain.items()})
        assert torch.equal(backend.ops.extrapolate_residuals(**plain).cpu(), expected)


@pytest.mark.parametrize(
    "name", ["x", "p", "residual_window", "oldest", "probe_window", "weights", "out"]
)
def test_rows_of_extrapolate_that_are_not_contiguous(backend: Backend, name: str) -> None:
    arguments = extrapolate_arguments(backend.device, size=6)
    arguments["out"] = torch.zeros_like(arguments["x"])
    expected = backend.ops.extrapolate_residuals(**arguments).clone()
    arguments[name] = arguments[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    if backend.name == "reference":
        assert torch.equal(backend.ops.extrapolate_residuals(**arguments), expected)
    else:
        with pytest.raises((ValueError, RuntimeError), match=rf"(?s)^{name} .*contiguous"):
            backend.ops.extrapolate_residuals(**arguments)


REFUSED = [(*case, 1) for case in overlaps.SHIFTED]
REFUSED += [(*case, 0) for case in overlaps.SAME + overlaps.OF_ITSELF]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: "-".join(map(str, case)))
def test_memory_that_would_be_read_after_it_was_written_is_refused(
    backend: Backend, case: tuple[str, str, str, int]
) -> None:
    """On a GPU it would be a race. The reference computes before it writes."""
    if backend.name == "reference":
        pytest.skip("it computes before it writes")
    arguments = overlaps.arguments_of(*case, backend.device)
    before = [each.clone() for each in arguments.values() if isinstance(each, Tensor)]
    with pytest.raises((ValueError, RuntimeError), match=r"overlap"):
        getattr(backend.ops, case[0])(**arguments)
    after = [each for each in arguments.values() if isinstance(each, Tensor)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("case", overlaps.ALLOWED, ids="-".join)
def test_what_is_read_may_be_what_is_written(backend: Backend, case: tuple[str, str, str]) -> None:
    arguments = overlaps.arguments_of(*case, 0, backend.device)
    apart = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    getattr(backend.ops, case[0])(**arguments)
    getattr(backend.ops, case[0])(**apart)
    assert torch.equal(arguments[case[1]], apart[case[1]])


@pytest.mark.parametrize("operator", ["combine_residuals", "extrapolate_residuals"])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32, torch.float64])
def test_filled_in_tokens_end_at_the_largest_number_of_fp16(
    backend: Backend, operator: str, x_dtype: torch.dtype
) -> None:
    """Whole vectors and the rest behind them; wider tokens go on beyond it."""
    half = torch.tensor([35008.0, -35008.0, 32752.0, 0.5, math.nan]).repeat(7)[None]
    expected = torch.tensor([65504.0, -65504.0, 65504.0, 1.0, math.nan]).repeat(7)[None]
    half = half.to(backend.device)
    newest = torch.zeros(1, dtype=torch.int32, device=backend.device)
    weights = torch.ones(1, 3, device=backend.device)

    def call(x: Tensor, dtype: torch.dtype) -> Tensor:
        window = torch.stack([half, half]).to(dtype)
        if operator == "combine_residuals":
            return backend.ops.combine_residuals(x, window, newest, weights[:, 0])
        zeros = torch.zeros_like(torch.stack([x, x]))
        return backend.ops.extrapolate_residuals(x, x, window, window[0], zeros, newest, weights)

    x = half.to(x_dtype)
    got = call(x, torch.float16).cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()].half())
    assert call(x, torch.float32)[0, :2].tolist() == [70016.0, -70016.0]
    if operator == "combine_residuals":  # infinity is a number too large, too
        assert call(torch.full_like(x, math.inf), torch.float16)[0, 0] == 65504


def test_slices_of_one_allocation_are_no_overlap(backend: Backend) -> None:
    """x, p, y and the window interleaved, sample by sample."""
    flat = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).to(backend.device)
    x, p, y = flat[:, 0], flat[:, 1], flat[:, 2]
    windows = flat[:, 3:5].transpose(0, 1), flat[:, 5:7].transpose(0, 1)
    newest = torch.tensor([0, 1], dtype=torch.int32, device=backend.device)
    sums = torch.ones(2, 4, device=backend.device)
    separate = [t.cpu().clone() for t in (x, p, y, *windows, newest, sums)]
    backend.ops.record_residuals(x, p, y, *windows, newest, sums, False)
    reference.record_residuals(*separate, False)
    assert torch.equal(windows[0].cpu(), separate[3])
    assert torch.equal(windows[1].cpu(), separate[4])


def test_nothing_takes_part_in_autograd(backend: Backend) -> None:
    x, p, window, *rest = statistics_arguments(backend.device, 1, 32)
    for tensor in (x, p, window):
        tensor.requires_grad_()
    p_prev = torch.zeros_like(p).detach()
    sums, result = backend.ops.probe_statistics(x, p, p_prev, None, window, *rest)
    y = backend.ops.combine_residuals(x, window, rest[0], torch.ones(1, device=backend.device))
    others = (x, window, rest[0], torch.ones(1, 3, device=backend.device))
    extrapolated = backend.ops.extrapolate_residuals(x, p, window, *others)
    results = (sums, result, y, extrapolated, p_prev)
    assert not any(tensor.requires_grad for tensor in results)


def test_more_than_2_31_elements_by_batch_stride_0(backend: Backend) -> None:
    """33 samples of 2^26 elements each are one sample in memory."""
    if backend.name in ("reference", "emulated"):
        pytest.skip("too slow, or makes temporaries of every element")
    batch, size = 33, 2**26
    row = torch.ones(1, size, dtype=torch.bfloat16, device=backend.device)
    window = torch.full((1, 1, size), 0.5, dtype=torch.bfloat16, device=backend.device)
    x = row.expand(batch, size)
    newest = torch.zeros(batch, dtype=torch.int32, device=backend.device)
    entry_sums = torch.ones(batch, 4, device=backend.device)
    sums, _ = backend.ops.alignment_statistics(
        x, x, window.expand(2, batch, size), newest, entry_sums, 0.0, 2.0
    )
    # a = -0.5 and q = 0 everywhere: exact in fp32, since every partial sum is a multiple of 0.25.
    expected = torch.tensor([size / 4, 0.0, 0.0, 1.0, 2.0, size], device=backend.device)
    assert torch.equal(sums, expected.expand(batch, 6))


@pytest.mark.large
@pytest.mark.parametrize("operator", ["combine", "extrapolate"])
def test_y_of_4_gib(backend: Backend, operator: str) -> None:
    """One sample of 2^31 + 11 elements in bf16; its last ones are those that could be lost."""
    if backend.name in ("reference", "emulated"):
        pytest.skip("too slow, or makes temporaries of every element")
    size = 2**31 + 11
    x = torch.ones(1, size, dtype=torch.bfloat16, device=backend.device)
    window = torch.full((1, 1, size), 0.5, dtype=torch.bfloat16, device=backend.device)
    window[..., -1] = 2.0
    newest = torch.zeros(1, dtype=torch.int32, device=backend.device)
    both, ones = window.expand(2, 1, size), torch.ones(1, 3, device=backend.device)
    if operator == "combine":
        backend.ops.combine_residuals(x, both, newest, ones[:, 0], out=x)
        last, others = 3.0, 1.5
    else:  # p is x, and every entry the same: y = x + r - q
        backend.ops.extrapolate_residuals(x, x, both, window[0], both, newest, 2 * ones, out=x)
        last, others = -1.0, 0.5
    assert x[0, -1] == last
    assert x[0, :-1].eq(others).all()


# ---- the CPU backend alone ----


@pytest.fixture
def cpp() -> Backend:
    if why_not("cpp") is not None:
        pytest.skip(why_not("cpp"))
    return Backend("cpp")


def test_any_number_of_threads_gives_the_same_bits(cpp: Backend) -> None:
    arguments = statistics_arguments("cpu", 2, 500_007)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(cpp.ops.alignment_statistics(*arguments)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(sums, found[0]) for sums in found)


INSTRUCTION_SETS = """
import sys, torch
from dicache import _build_info, ops
torch.manual_seed(0)
values = torch.randint(-2**31, 2**31 - 1, (2, 70001), dtype=torch.int32).view(torch.float32)
found = [torch.tensor(list(_build_info.build_facts()["instruction_set"].encode()))]
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    x, p, y = (torch.randn(2, 70001).to(dtype) for _ in range(3))
    window, other = (torch.randn(2, 2, 70001).to(dtype) for _ in range(2))
    newest, sums = torch.tensor([0, 1], dtype=torch.int32), torch.ones(2, 4)
    found += ops.alignment_statistics(x, p, window, newest, sums, 0.0, 2.0)
    found += ops.probe_statistics(x, p, y.clone(), x.clone(), window, newest, sums, 0.0, 2.0)
    found.append(ops.combine_residuals(values, window, newest, torch.rand(2)).nan_to_num())
    read = (values, p, window, y, window, newest, torch.rand(2, 3))
    found.append(ops.extrapolate_residuals(*read).nan_to_num())
    ops.record_residuals(x, p, y, other, window, newest, sums, False)
    found += [other, window, newest, sums]
torch.save(found, sys.argv[1])
"""


def test_every_instruction_set_gives_the_same_bits(cpp: Backend, tmp_path) -> None:
    pytest.importorskip("dicache._build_info", reason="a wheel for all Pythons has none")
    found = {}
    for name in ("baseline", "avx2", "avx512"):
        path = tmp_path / f"{name}.pt"
        environment = {**os.environ, "DICACHE_INSTRUCTION_SET": name}
        command = [sys.executable, "-c", INSTRUCTION_SETS, str(path)]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        used, *values = torch.load(path)
        found[bytes(used.tolist()).decode()] = values
    assert "baseline" in found
    for values in found.values():
        for value, expected in zip(values, found["baseline"], strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_equals_torch_for_every_kind_of_number(cpp: Backend, dtype: torch.dtype) -> None:
    """All 65,536 patterns are read; subnormals, ties, overflow, infinity and NaN are written."""
    newest, gamma = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)[None]
    zeros = torch.zeros(2, 1, 65_536)
    read = cpp.ops.combine_residuals(patterns, zeros, newest, gamma)
    torch.testing.assert_close(read, patterns.float(), rtol=0, atol=0, equal_nan=True)
    near = torch.tensor([2.0**-25, 2.0**-24, 2.0**-14, 1.0, 65504.0, 65520.0, 3.39e38])
    steps = near[:, None] * (1 + torch.arange(-4096, 4096) * 2.0**-23)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32).view(torch.float32)
    special = torch.tensor([math.inf, math.nan, 0.0])
    values = torch.cat([steps.flatten(), bits, special])
    values = torch.cat([values, -values])[None]
    written, size = torch.zeros(2, 1, values.shape[1], dtype=dtype), values.shape
    unused = torch.zeros(2, *size), torch.zeros(1, 4)
    p, y = torch.zeros(size, dtype=dtype), torch.zeros(size)
    cpp.ops.record_residuals(-values, p, y, unused[0], written, newest, unused[1], True)
    expected = torch.zeros_like(values) + values  # 0 - x turns -0 into 0
    torch.testing.assert_close(written[0], expected.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- a GPU alone ----


@pytest.mark.gpu
@pytest.mark.parametrize("most_bytes", [None, 0])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_skipped_step_is_one_launch_or_two_and_no_copy(
    name: str, most_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One where tensors are small. The host reads what the launch writes to its memory."""
    if why_not(name) is not None:
        pytest.skip(why_not(name))
    if most_bytes is not None:
        monkeypatch.setattr("dicache.core.trajectory._ONE_LAUNCH_BYTES", most_bytes)
    config = DiCacheConfig(
        threshold=math.inf, retention_ratio=0.0, compute_last_step=False, backend=name
    )
    session = DiCacheSession(config)
    x, p, y = (torch.randn(2, 64, 96, device="cuda").bfloat16() for _ in range(3))

    def step() -> str:
        with session.step("cond") as step:
            if step.needs_probe:
                step.probe(x, p)
            if step.action == "reuse":
                step.reuse(x)
            else:
                step.record(x, p, y)
        return step.action

    assert [step() for _ in range(3)] == ["compute", "reuse", "reuse"]  # compiles and warms up
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):
        torch.ones(1, device="cuda")  # a process's first profile may miss events
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    ran = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert not any("Memcpy" in name for name in ran), ran
    assert len(ran) == (1 if most_bytes is None else 2), ran


# ---- the operators in torch ----


def sample_arguments(device: str = "cpu") -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    x, p, y, p_prev, x_prev, out = (draw(2, 5, 8) for _ in range(6))
    probes, residuals = draw(2, 2, 5, 8), draw(2, 2, 5, 8)
    newest = torch.tensor([0, 1], dtype=torch.int32, device=device)
    sums = draw(2, 4).abs()
    shared = (probes, newest, sums, 0.0, 2.0)
    extrapolated = (x, p, residuals, y, probes, newest, sums[:, :3])

    def out_of(columns: int) -> tuple:  # active, workspace, Results; the device's memory is one
        out = ops.make_results(x, p, columns)._replace(serial=3, promise=sums[0, :1])
        return None, None, *out._replace(mailbox=out.mailbox.to(device))

    return {
        "probe_statistics": (x, p, p_prev, x_prev, *shared),
        "probe_statistics_out": (x, p, p_prev, x_prev, *shared, True, *out_of(7)),
        "alignment_statistics": (x, p, *shared),
        "alignment_statistics_out": (x, p, *shared, True, *out_of(6)),
        "probe_and_combine": (x, p, p_prev, None, probes, residuals, *shared[1:]),
        "probe_and_combine_out": (
            *(x, p, None, None, probes, residuals, *shared[1:]),
            *(False, True, True, *out_of(6)),
        ),
        "finish_probe_statistics": (draw(2, 5).abs(), 0.0, 2.0),
        "finish_alignment_statistics": (draw(2, 6).abs(), 0.0, 2.0),
        "combine_residuals": (x, residuals, newest, sums[:, 0]),
        "combine_residuals_out": (x, residuals, newest, sums[:, 0], None, out),
        "extrapolate_residuals": (*extrapolated, None),
        "extrapolate_residuals_out": (*extrapolated, None, out),
        "record_residuals": (x, p, y, residuals, probes, newest, sums, False),
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ops.OPERATORS)
def test_opcheck(name: str, device: str) -> None:
    operator = getattr(torch.ops.dicache, name).default
    torch.library.opcheck(operator, sample_arguments(device)[name])


def test_the_operators_compile_into_one_graph() -> None:
    def step(x, p, y, residuals, probes, newest, sums):
        _, result = ops.alignment_statistics(x, p, probes, newest, sums, 0.0, 2.0)
        reused = ops.combine_residuals(x * 1.0, residuals, newest, result[-1, 1].expand(2))
        weights = result[-1, 1].expand(2, 3)[:1].clone().expand(2, 3)
        drawn = ops.extrapolate_residuals(x * 1.0, p, residuals, y, probes, newest, weights)
        ops.extrapolate_residuals(drawn, p, residuals, y, probes, newest, weights, out=drawn)
        ops.record_residuals(x, p, y, residuals, probes, newest, sums, False)
        return reused + 1, result, drawn + 1

    def arguments() -> tuple:
        drawn = sample_arguments()["record_residuals"]
        return tuple(t.clone() for t in drawn[:7])

    eager, compiled = arguments(), arguments()
    expected = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for value, wanted in zip((*got, *compiled), (*expected, *eager), strict=True):
        assert torch.equal(value, wanted)


def test_the_fastest_backend_of_the_device_is_the_default(cpp: Backend) -> None:
    """The dispatcher's CPU body is the compiled one: it refuses what only the reference takes."""
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.alignment_statistics(**wrong("x layout", "cpu"))


def test_sentinel_cases_notice_a_stray_write() -> None:
    case = Case(2, (5,), *[torch.float32] * 3, {"x": Layout(offset=1, gap=3)}, None, seed=0)
    x = case.tensor("x", torch.float32)
    assert case.surroundings_are_untouched()
    x.as_strided((1,), (1,), 0).fill_(SENTINEL + 1)
    assert not case.surroundings_are_untouched()
