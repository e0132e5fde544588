"""The reference operators compute the formulas of their docstrings, for every dtype and layout.

The expected values are computed here in fp64, sample by sample, from the formulas alone.
"""

import math

import pytest
import torch
from fuzzing import draws
from hypothesis import given
from hypothesis import strategies as st

from dicache import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_step(batch, sequence, width, dtype=torch.float32, seed=0):
    """x, p, y, p_prev, x_prev [B, S, D] and the two windows [2, B, S, D], all different."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    tensors = {name: draw(batch, sequence, width) for name in ("x", "p", "y", "p_prev", "x_prev")}
    windows = {name: draw(2, batch, sequence, width) for name in ("probe", "residual")}
    newest = torch.randint(0, 2, (batch,), generator=generator, dtype=torch.int32)
    return tensors, windows, newest


def entries(window, newest, sample):
    """(old, new) of one sample in fp64."""
    new = int(newest[sample])
    return window[1 - new, sample].double(), window[new, sample].double()


def entry_sums(windows, newest):
    """The sums that `record_residuals` would have left for these windows."""
    rows = []
    for sample in range(newest.numel()):
        old, new = entries(windows["probe"], newest, sample)
        sizes = [r.abs().sum() for r in entries(windows["residual"], newest, sample)]
        d = new - old
        rows.append(torch.stack([d.abs().sum(), (d**2).sum(), *reversed(sizes)]))
    return torch.stack(rows)


def tolerance(dtype):
    # Sums of n <= 1000 terms in fp32 lose at most about n eps = 1000 * 6e-8; fp64 far less. The
    # operators accumulate low-precision inputs in fp32, so their own dtype does not enter.
    return 1e-12 if dtype == torch.float64 else 1e-4


@draws(40)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 9),
    width=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    minus=st.booleans(),
)
def test_probe_statistics(batch, sequence, width, dtype, minus):
    tensors, windows, newest = make_step(batch, sequence, width, dtype)
    x, p, p_prev, x_prev = (tensors[name] for name in ("x", "p", "p_prev", "x_prev"))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    sums, result = reference.probe_statistics(
        x,
        p,
        p_prev,
        x_prev if minus else None,
        windows["probe"],
        newest,
        entry_sums(windows, newest),
        0.5,
        1.5,
    )
    totals = torch.zeros(6, dtype=torch.float64)
    expected = []
    for sample in range(batch):
        old, new = entries(windows["probe"], newest, sample)
        q = p[sample].double() - x[sample].double()
        values = torch.stack(
            [
                (p[sample].double() - before["p_prev"][sample].double()).abs().sum(),
                before["p_prev"][sample].double().abs().sum(),
                (x[sample].double() - before["x_prev"][sample].double()).abs().sum(),
                before["x_prev"][sample].double().abs().sum(),
                (q - old).abs().sum(),
                (new - old).abs().sum(),
            ]
        )
        totals += values
        expected.append(values)
    for row, values in zip(result, [*expected, totals], strict=True):
        error = values[0] / values[1]
        if minus:
            error = abs(error - values[2] / values[3])
        gamma = (values[4] / values[5]).clamp(0.5, 1.5)
        assert float(row[0]) == pytest.approx(float(error), rel=tolerance(dtype), abs=1e-5)
        assert float(row[1]) == pytest.approx(float(gamma), rel=tolerance(dtype))
    assert sums.shape == (batch, 7 if minus else 5)
    assert torch.equal(p_prev, p)
    assert torch.equal(x_prev, x if minus else before["x_prev"])


@draws(40)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 9),
    width=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    to_probe=st.booleans(),
)
def test_alignment_statistics(batch, sequence, width, dtype, to_probe):
    tensors, windows, newest = make_step(batch, sequence, width, dtype)
    x, p = tensors["x"], tensors["p"]
    sums = entry_sums(windows, newest)
    _, result = reference.alignment_statistics(
        x, p, windows["probe"], newest, sums, -math.inf, math.inf, relative_to_probe=to_probe
    )
    stacked = []
    for sample in range(batch):
        old, new = entries(windows["probe"], newest, sample)
        wide = p[sample].double()
        stacked.append((wide - x[sample].double(), old, new, wide))
    stacked.append(tuple(torch.cat(parts) for parts in zip(*stacked, strict=True)))
    for row, (q, old, new, wide) in zip(result, stacked, strict=True):
        a, d = (q - old).flatten(), (new - old).flatten()
        gamma = torch.linalg.lstsq(d[:, None], a[:, None]).solution.item()
        scale = torch.linalg.vector_norm(wide if to_probe else q)
        error = torch.linalg.vector_norm(a - gamma * d) / scale
        assert float(row[1]) == pytest.approx(gamma, rel=1e-3, abs=1e-4)
        # A misfit near zero is a difference of large numbers: compare it on the scale of 1.
        assert float(row[0]) == pytest.approx(float(error), abs=3e-3)


def test_a_clipped_gamma_is_judged_by_the_misfit_that_it_leaves():
    tensors, windows, newest = make_step(1, 4, 8, torch.float64)
    x, p = tensors["x"], tensors["p"]
    old, new = entries(windows["probe"], newest, 0)
    p = x + old + 3.0 * (new - old)  # the trajectory is exact at gamma = 3
    sums = entry_sums(windows, newest)
    call = lambda high: reference.alignment_statistics(  # noqa: E731
        x, p, windows["probe"], newest, sums, 0.0, high
    )[1][-1]
    assert call(math.inf).tolist() == pytest.approx([0.0, 3.0], abs=1e-6)
    left = torch.linalg.vector_norm(2.0 * (new - old)) / torch.linalg.vector_norm(p - x)
    assert call(1.0).tolist() == pytest.approx([float(left), 1.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_residuals(dtype):
    tensors, windows, newest = make_step(3, 5, 7, dtype)
    x, gamma = tensors["x"], torch.tensor([0.0, 1.0, 1.25])
    y = reference.combine_residuals(x, windows["residual"], newest, gamma)
    assert y.dtype == dtype
    for sample in range(3):
        old, new = entries(windows["residual"], newest, sample)
        expected = x[sample].double() + old + float(gamma[sample]) * (new - old)
        # One rounding to the dtype; the wide sum itself is exact to a few fp32 eps.
        torch.testing.assert_close(y[sample].double(), expected, rtol=0.01, atol=0.05)
        if dtype == torch.float64:
            torch.testing.assert_close(y[sample], expected, rtol=1e-14, atol=1e-14)
    in_place = x.clone()
    out = reference.combine_residuals(in_place, windows["residual"], newest, gamma, out=in_place)
    assert out is in_place
    assert torch.equal(in_place, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extrapolate_residuals(dtype):
    tensors, windows, newest = make_step(3, 5, 7, dtype)
    x, p, oldest = (tensors[name] for name in ("x", "p", "y"))
    weights = torch.tensor([[0.0, 0.0, 0.0], [1.5, -0.75, 0.0], [-0.25, 0.5, 2.0]])
    read = (p, windows["residual"], oldest, windows["probe"], newest, weights)
    y = reference.extrapolate_residuals(x, *read)
    assert y.dtype == dtype
    for sample in range(3):
        b, a = entries(windows["residual"], newest, sample)
        _, q_a = entries(windows["probe"], newest, sample)
        wide, c = x[sample].double(), oldest[sample].double()
        w1, w2, w3 = weights[sample].tolist()
        # By the coefficient of each tensor, not by differences.
        predicted = (1 + w1) * a + (w2 - w1) * b - w2 * c + w3 * (p[sample].double() - wide - q_a)
        expected = wide + predicted
        torch.testing.assert_close(y[sample].double(), expected, rtol=0.01, atol=0.1)
        if dtype == torch.float64:
            torch.testing.assert_close(y[sample], expected, rtol=1e-13, atol=1e-13)
    in_place = x.clone()
    assert reference.extrapolate_residuals(in_place, *read, out=in_place) is in_place
    assert torch.equal(in_place, y)


def test_terms_of_extrapolate_are_added_from_left_to_right():
    """2^24 + 1 is a tie in fp32: a one that is added alone is lost, two at once are not."""
    ones, big = torch.ones(1, 1), torch.full((1, 1), 2.0**24)
    newest = torch.zeros(1, dtype=torch.int32)
    zeros = torch.zeros(2, 1, 1)
    # x = 2^24 + r_a = 1 is 2^24; + w1 (r_a - r_b) = 1 again is 2^24; - w2 (r_b - r_c) = -2^24.
    y = reference.extrapolate_residuals(
        big, big, torch.stack([ones, 0 * ones]), -big, zeros, newest, torch.tensor([[1.0, -1, 1]])
    )
    assert y == 0.0
    # The last term is rounded together with what is there: 2^24 - 2^24 + 1.
    y = reference.extrapolate_residuals(
        big, big + 2, zeros, big, zeros, newest, torch.tensor([[0.0, 1.0, 0.5]])
    )
    assert y == 1.0


def test_extrapolate_is_combine_where_two_steps_are_known():
    """r_c = r_b and w3 = 0: gamma = 1 + w1."""
    tensors, windows, newest = make_step(2, 4, 4, torch.float64)
    x, p, window = tensors["x"], tensors["p"], windows["residual"]
    oldest = torch.stack([entries(window, newest, sample)[0] for sample in range(2)])
    weights = torch.tensor([[0.5, 3.0, 0.0], [-0.25, 1.0, 0.0]])
    y = reference.extrapolate_residuals(x, p, window, oldest, windows["probe"], newest, weights)
    expected = reference.combine_residuals(x, window, newest, 1 + weights[:, 0])
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


def test_combine_makes_a_contiguous_tensor_whatever_x_is():
    """As the operator's fake says, which torch.compile plans with."""
    tensors, windows, newest = make_step(2, 4, 4)
    x, window = tensors["x"].transpose(1, 2), windows["residual"]
    for active in (None, torch.ones(2, dtype=torch.uint8)):
        y = reference.combine_residuals(x, window, newest, torch.ones(2), active)
        assert y.is_contiguous()
        y = reference.extrapolate_residuals(
            x, x, window, x, windows["probe"], newest, torch.ones(2, 3), active
        )
        assert y.is_contiguous()


def test_combine_returns_the_recorded_dtype_for_a_wider_input():
    tensors, windows, newest = make_step(1, 2, 3, torch.bfloat16)
    y = reference.combine_residuals(
        tensors["x"].float(), windows["residual"], newest, torch.ones(1)
    )
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("first", [False, True])
def test_record_residuals(first):
    tensors, windows, newest = make_step(2, 3, 5, torch.float64)
    x, p, y = (tensors[name] for name in ("x", "p", "y"))
    before = {name: window.clone() for name, window in windows.items()}
    was, sums = newest.clone(), entry_sums(windows, newest)
    reference.record_residuals(x, p, y, windows["residual"], windows["probe"], newest, sums, first)
    assert torch.equal(newest, 1 - was)
    for name, residual in (("residual", y - x), ("probe", p - x)):
        for sample in range(2):
            old, new = entries(windows[name], newest, sample)
            assert torch.equal(new, residual[sample])
            kept = residual[sample] if first else before[name][was[sample], sample]
            assert torch.equal(old, kept)
    torch.testing.assert_close(sums, entry_sums(windows, newest))


def test_record_works_on_inputs_parked_in_the_slots_that_it_overwrites():
    tensors, windows, newest = make_step(2, 3, 5)
    newest.fill_(1)
    parked = {name: window.clone() for name, window in windows.items()}
    sums, parked_sums = torch.zeros(2, 4), torch.zeros(2, 4)
    x, p, y = (tensors[name] for name in ("x", "p", "y"))
    held_x, held_p = parked["residual"][0].copy_(x), parked["probe"][0].copy_(p)
    reference.record_residuals(
        x, p, y, windows["residual"], windows["probe"], newest.clone(), sums, False
    )
    reference.record_residuals(
        held_x, held_p, y, parked["residual"], parked["probe"], newest, parked_sums, False
    )
    assert torch.equal(parked["residual"], windows["residual"])
    assert torch.equal(parked["probe"], windows["probe"])
    assert torch.equal(sums, parked_sums)


def test_zero_denominators():
    tensors, windows, newest = make_step(1, 2, 3)
    x, zero = tensors["x"], torch.zeros(1, 2, 3)
    windows["probe"][1] = windows["probe"][0]  # d = 0
    sums = entry_sums(windows, newest)
    args = (windows["probe"], newest, sums, 0.0, math.inf)
    _, result = reference.probe_statistics(x, tensors["p"], zero.clone(), None, *args)
    assert result[-1, 1] == 1.0  # whatever the numerator
    assert result[-1, 0] == math.inf  # x / 0 stays as it is
    _, result = reference.probe_statistics(x, zero, zero.clone(), None, *args)
    assert result[-1, 0].isnan()  # 0 / 0
    _, result = reference.alignment_statistics(x, tensors["p"], *args)
    assert result[-1, 1] == 1.0
    _, result = reference.alignment_statistics(x, x, *args)  # q = 0
    assert not result[-1, 0].isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["p", "probe", "residual"])
def test_non_finite_values_reach_the_result(value, where):
    tensors, windows, newest = make_step(2, 2, 3)
    target = tensors["p"] if where == "p" else windows[where][0]
    target[1, 0, 0] = value
    args = (windows["probe"], newest, entry_sums(windows, newest), 1.0, 1.5)
    x, p = tensors["x"], tensors["p"]
    for result in (
        reference.probe_statistics(x, p, tensors["p_prev"], None, *args)[1],
        reference.alignment_statistics(x, p, *args)[1],
    ):
        assert result[0].isfinite().all()  # the other sample is not touched
        assert not result[1].isfinite().all()
        assert not result[2].isfinite().all()


def test_inactive_samples_keep_their_buffers():
    tensors, windows, newest = make_step(2, 2, 3)
    active = torch.tensor([0, 1], dtype=torch.uint8)
    sums = entry_sums(windows, newest).float()
    before = {
        "p_prev": tensors["p_prev"].clone(),
        "newest": newest.clone(),
        "sums": sums.clone(),
        **{name: window.clone() for name, window in windows.items()},
    }
    x, p, y = (tensors[name] for name in ("x", "p", "y"))
    args = (windows["probe"], newest, sums, 1.0, 1.5)
    got, result = reference.probe_statistics(x, p, tensors["p_prev"], None, *args, active=active)
    assert torch.equal(tensors["p_prev"][0], before["p_prev"][0])
    assert torch.equal(tensors["p_prev"][1], p[1])
    assert torch.equal(got[0], torch.zeros(5))
    torch.testing.assert_close(result[2], result[1])  # the batch is its active samples
    out = torch.full_like(x, 7.0)
    reference.combine_residuals(
        x, windows["residual"], newest, torch.ones(2), active=active, out=out
    )
    assert torch.equal(out[0], torch.full_like(x[0], 7.0))
    assert not torch.equal(out[1], torch.full_like(x[1], 7.0))
    reference.record_residuals(
        x, p, y, windows["residual"], windows["probe"], newest, sums, False, active
    )
    for name, now in (("newest", newest), ("sums", sums)):
        assert torch.equal(now[0], before[name][0])
    for name in ("probe", "residual"):
        assert torch.equal(windows[name][:, 0], before[name][:, 0])
        assert not torch.equal(windows[name][:, 1], before[name][:, 1])
