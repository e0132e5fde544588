"""The Triton kernels compute what the reference does: run on the CPU by Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so one test runs every `check_` function
of this file in a process of its own. Launches are cut to six programs with several blocks each:
otherwise no sample would be shared, and nothing would be reduced. Sums are compared with the
reference in fp64, stored tensors with the reference bit by bit. Only bf16 is an exception: the
interpreter truncates where a GPU rounds to nearest, so that its stores may be one unit off.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import overlaps
import pytest
import torch

from dicache import reference

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# (x, p, y)
DTYPES = {
    "fp32": (FP32, FP32, FP32),
    "fp16": (FP16, FP16, FP16),
    "bf16": (BF16, BF16, BF16),
    "fp64": (FP64, FP64, FP64),
    "fp32 bf16": (FP32, BF16, BF16),
    "fp16 fp32": (FP16, FP32, FP16),
    "fp32 fp64": (FP32, FP32, FP64),
}
BLOCK = 2048  # elements of a block; half of it with fp64
SIZES = (1, 37, BLOCK, 3 * BLOCK, 7 * BLOCK + 37)
RANGE = (-0.5, 1.5)  # exact in fp32: the interpreter rounds a launch's floats to it


def numpy_version():
    return tuple(int(part) for part in version("numpy").split(".")[:2])


def test_kernels_in_the_interpreter():
    if find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    if version("triton").startswith("3.6.") and numpy_version() >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    checks = subprocess.run(
        [*command, "-o", "python_functions=check_*", Path(__file__).name],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checks.returncode == 0, checks.stdout + checks.stderr


@pytest.fixture
def kernels(monkeypatch):
    from dicache import kernels
    from dicache.kernels import launch

    monkeypatch.setattr(launch, "max_programs", lambda device, resident: 6)
    monkeypatch.setattr(launch, "_known", {})
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what is not written shows
    yield kernels
    torch.use_deterministic_algorithms(False)


def make_step(dtypes=DTYPES["fp32"], batch=2, size=7 * BLOCK + 37, seed=0):
    """All tensors of one step, different from each other, with sums as record leaves them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda dtype, *lead: torch.randn(  # noqa: E731
        *lead, batch, size, generator=generator, dtype=FP64
    ).to(dtype)
    x, p, y = (draw(dtype) for dtype in dtypes)
    step = {"x": x, "p": p, "y": y, "p_prev": draw(p.dtype), "x_prev": draw(x.dtype)}
    step["probe_window"], step["residual_window"] = draw(p.dtype, 2), draw(y.dtype, 2)
    step["oldest"] = draw(y.dtype)
    step["newest"] = torch.randint(0, 2, (batch,), generator=generator, dtype=torch.int32)
    wide = FP64 if FP64 in dtypes else FP32
    step["entry_sums"] = size * (1 + torch.rand(batch, 4, generator=generator, dtype=FP64)).to(wide)
    return step


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def pick(step, *names):
    return [step[name] for name in names]


def in_fp64(step):
    wide = {name: FP64 if t.dtype.is_floating_point else t.dtype for name, t in step.items()}
    return {name: tensor.to(wide[name], copy=True) for name, tensor in step.items()}


def probe(module, step, minus=False, least_squares=False, **options):
    tensors = pick(step, "probe_window", "newest", "entry_sums")
    x_prev = step["x_prev"] if minus else None
    before = [*pick(step, "x", "p", "p_prev"), x_prev]
    return module.probe_statistics(*before, *tensors, *RANGE, least_squares, **options)


def align(module, step, **options):
    tensors = pick(step, "x", "p", "probe_window", "newest", "entry_sums")
    return module.alignment_statistics(*tensors, *RANGE, **options)


def combine(module, step, gamma, **options):
    tensors = pick(step, "x", "residual_window", "newest")
    return module.combine_residuals(*tensors, gamma, **options)


def extrapolate(module, step, weights, **options):
    names = ("x", "p", "residual_window", "oldest", "probe_window", "newest")
    return module.extrapolate_residuals(*pick(step, *names), weights, **options)


RECORDED = ("residual_window", "probe_window", "newest", "entry_sums")


def record(module, step, first, **options):
    tensors = pick(step, "x", "p", "y", *RECORDED)
    module.record_residuals(*tensors, first, **options)


def assert_sums(actual, expected, size):
    """n additions in fp32 lose at most n eps of sum|v|; pairs of blocks and lanes far less."""
    eps = torch.finfo(actual.dtype).eps
    # <a, d> cancels: compare with the largest sum of the row, which bounds its terms.
    scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=1)
    assert ((actual.double() - expected).abs() <= 32 * eps * scale).all(), size


def assert_stored(actual, expected):
    """Bit by bit; to one unit (at most 2^-7) for bf16, which the interpreter truncates."""
    if actual.dtype == BF16:
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("minus", "least_squares"), [(False, False), (True, True)])
def check_probe_statistics(kernels, dtypes, minus, least_squares):
    for batch, size in zip((1, 2, 3, 2, 1), SIZES, strict=True):
        step = make_step(dtypes, batch, size)
        expected, _ = probe(reference, in_fp64(step), minus, least_squares)
        before = clone(step)
        sums, result = probe(kernels, step, minus, least_squares)
        assert sums.dtype == result.dtype == (FP64 if FP64 in dtypes[:2] else FP32)
        assert_sums(sums, expected, size)
        finished = reference.finish_probe_statistics(sums.double(), *RANGE)
        torch.testing.assert_close(result.double(), finished, rtol=1e-6, atol=1e-6)
        assert torch.equal(step.pop("p_prev"), before["p"])
        assert torch.equal(step.pop("x_prev"), before["x" if minus else "x_prev"])
        assert all(torch.equal(step[name], before[name]) for name in step)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("to_probe", [False, True])
def check_alignment_statistics(kernels, dtypes, to_probe):
    for batch, size in zip((1, 2, 3, 2, 1), SIZES, strict=True):
        step = make_step(dtypes, batch, size)
        expected, _ = align(reference, in_fp64(step))
        before = clone(step)
        sums, result = align(kernels, step, relative_to_probe=to_probe)
        assert_sums(sums, expected, size)
        finished = reference.finish_alignment_statistics(sums.double(), *RANGE, to_probe)
        torch.testing.assert_close(result.double(), finished, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(step[name], before[name]) for name in step)


@pytest.mark.parametrize("columns", [5, 6, 7])
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("batch", [0, 1, 3, 63, 64, 130])
def check_finish(kernels, columns, dtype, batch):
    generator = torch.Generator().manual_seed(batch)
    sums = torch.rand(batch, columns, generator=generator, dtype=dtype) + 0.5
    name = "finish_alignment_statistics" if columns == 6 else "finish_probe_statistics"
    # An infinite upper bound, and sums that are a view.
    sums = torch.stack([sums, sums], dim=1)[:, 0]
    actual = getattr(kernels, name)(sums, 0.5, float("inf"))
    expected = getattr(reference, name)(sums, 0.5, float("inf"))
    # The misfit is a difference of numbers near 1: its root loses half of the digits near 0.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def check_combine_residuals(kernels, dtypes):
    for batch, size in zip((1, 2, 3, 2, 1), SIZES, strict=True):
        step = make_step(dtypes, batch, size)
        gamma = torch.linspace(0.3, 1.7, batch)
        assert_stored(combine(kernels, step, gamma), combine(reference, step, gamma))
        one = torch.tensor([1.25]).expand(batch)
        assert_stored(combine(kernels, step, one), combine(reference, step, one))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def check_extrapolate_residuals(kernels, dtypes):
    for batch, size in zip((1, 2, 3, 2, 1), SIZES, strict=True):
        step = make_step(dtypes, batch, size)
        rows = torch.linspace(-1.3, 1.7, 5 * batch).view(batch, 5)[:, 1:4]
        for weights in (rows, rows[:1].expand(batch, 3)):
            expected = extrapolate(reference, step, weights)
            assert_stored(extrapolate(kernels, step, weights), expected)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("first", [False, True])
def check_record_residuals(kernels, dtypes, first):
    for batch, size in zip((1, 2, 3, 2, 1), SIZES, strict=True):
        step = make_step(dtypes, batch, size)
        expected = clone(step)
        record(reference, expected, first)
        previous = step["entry_sums"][:, 2].clone()
        record(kernels, step, first)
        assert torch.equal(step["newest"], expected["newest"])
        for name in ("residual_window", "probe_window"):
            assert_stored(step[name], expected[name])
        # The sums are of the entries as they are stored, so the expectation starts from these.
        rows = range(batch)
        new = step["newest"].long()
        q_new, q_old = (step["probe_window"][entry, rows].double() for entry in (new, 1 - new))
        size_new = step["residual_window"][new, rows].double().abs().sum(dim=1)
        d = q_new - q_old
        older = size_new if first else previous.double()
        sums = torch.stack([d.abs().sum(dim=1), (d * d).sum(dim=1), size_new, older], dim=1)
        assert_sums(step["entry_sums"], sums, size)


def check_record_over_its_own_inputs(kernels):
    """x and p may lie in the very slots that record overwrites."""
    for first in (False, True):
        step = make_step(batch=1)
        slot = 1 - int(step["newest"])
        expected = clone(step)
        record(reference, expected, first)
        step["residual_window"][slot].copy_(step["x"])
        step["probe_window"][slot].copy_(step["p"])
        step |= {"x": step["residual_window"][slot], "p": step["probe_window"][slot]}
        record(kernels, step, first)
        for name in ("residual_window", "probe_window", "newest"):
            assert torch.equal(step[name], expected[name])


def check_combine_over_x(kernels):
    step = make_step()
    gamma = torch.tensor([1.25, 0.5])
    expected = combine(reference, step, gamma)
    assert combine(kernels, step, gamma, out=step["x"]) is step["x"]
    assert torch.equal(step["x"], expected)


def check_extrapolate_over_x(kernels):
    step = make_step()
    weights = torch.tensor([[1.25, 0.5, -1.0], [0.5, 0.0, 2.0]])
    expected = extrapolate(reference, step, weights)
    assert extrapolate(kernels, step, weights, out=step["x"]) is step["x"]
    assert torch.equal(step["x"], expected)


def check_extrapolate_with_fp64_weights(kernels):
    """They are read as they are where data is fp64, and lose their last digits nowhere."""
    step = make_step(DTYPES["fp64"])
    weights = torch.tensor([[1.25, 0.5, -1.0], [0.5, 0.0, 2.0]], dtype=FP64) + 1e-12
    expected = extrapolate(reference, step, weights)
    assert torch.equal(extrapolate(kernels, step, weights), expected)


def spread(tensor, offset):
    """The same values in a larger buffer: strided samples and entries, `offset` elements in."""
    *lead, size = tensor.shape
    buffer = torch.full((*lead, size + 24), torch.nan, dtype=tensor.dtype)
    buffer = buffer[..., offset : offset + size]
    return buffer.copy_(tensor)


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def check_strided_and_unaligned_views(kernels, name, offset):
    """Layout changes no bit of any result, and nothing outside a view is touched."""
    step = make_step(DTYPES[name])
    views = {n: spread(t, offset) if t.shape[-1] > 4 else t.clone() for n, t in step.items()}
    gamma = torch.tensor([1.25, 0.5])
    for call in (
        lambda tensors: probe(kernels, tensors, minus=True),
        lambda tensors: align(kernels, tensors),
        lambda tensors: [combine(kernels, tensors, gamma)],
        lambda tensors: [extrapolate(kernels, tensors, gamma[:, None] * torch.ones(2, 3))],
        lambda tensors: [record(kernels, tensors, first=False)],
    ):
        for actual, expected in zip(call(views), call(step), strict=True):
            assert actual is expected is None or torch.equal(actual, expected)
        assert all(torch.equal(views[n], step[n]) for n in step)
    for view in views.values():
        if view.shape[-1] > 4:
            whole = torch.as_strided(
                view, (*view.shape[:-1], view.shape[-1] + 24), view.stride(), 0
            )
            assert whole.isnan().sum() == 24 * view.shape[:-1].numel()


def check_samples_that_are_one(kernels):
    """x expanded over the batch: stride 0."""
    step = make_step()
    expanded = step | {"x": step["x"][:1].expand(2, -1)}
    plain = step | {"x": expanded["x"].contiguous()}
    assert torch.equal(align(kernels, expanded)[0], align(kernels, plain)[0])


def check_inactive_samples(kernels):
    """Their sums are zero and their buffers stay; the others' results do not change."""
    active = torch.tensor([1, 0, 1], dtype=torch.uint8)
    on = active.bool()
    gamma = torch.tensor([1.25, 0.5, 2.0])
    step, everything = make_step(batch=3), make_step(batch=3)
    before = clone(step)
    for call, options in ((probe, {"minus": True}), (align, {})):
        sums, result = call(kernels, step, active=active, **options)
        all_sums, _ = call(kernels, everything, **options)
        assert torch.equal(sums[on], all_sums[on])
        assert (sums[1] == 0).all()
        assert result[1, 1] == 1
    y = combine(kernels, step, gamma, active=active)
    assert torch.equal(y[on], combine(kernels, everything, gamma)[on])
    assert (y[1] == 0).all()
    out = torch.full_like(y, 7)
    combine(kernels, step, gamma, active=active, out=out)
    assert torch.equal(out[on], y[on])
    assert (out[1] == 7).all()
    weights = gamma[:, None].expand(3, 3).contiguous()
    y = extrapolate(kernels, step, weights, active=active)
    assert torch.equal(y[on], extrapolate(kernels, everything, weights)[on])
    assert (y[1] == 0).all()
    out = torch.full_like(y, 7)
    extrapolate(kernels, step, weights, active=active, out=out)
    assert torch.equal(out[on], y[on])
    assert (out[1] == 7).all()
    for first in (True, False):
        record(kernels, step, first, active=active)
        record(kernels, everything, first)
        assert step["newest"][1] == before["newest"][1]  # turned twice it would be right again
    for buffer in ("p_prev", "x_prev", *RECORDED):
        axis = int(buffer.endswith("_window"))
        select = lambda tensor, rows, axis=axis: tensor.movedim(axis, 0)[rows]  # noqa: E731
        assert torch.equal(select(step[buffer], 1), select(before[buffer], 1)), buffer
        assert torch.equal(select(step[buffer], on), select(everything[buffer], on)), buffer


@pytest.mark.parametrize("name", ["fp32", "fp64"])
def check_workspace(kernels, name):
    """What lies behind the ticket does not matter, and the ticket is zero after every launch."""
    from dicache import ops

    step = make_step(DTYPES[name])
    workspace = ops.make_workspace(step["x"])
    assert workspace.numel() > 0
    workspace[128:] = 255  # NaN in fp32 and fp64
    results = []
    for given in (None, workspace, workspace):
        tensors = clone(step)
        results.append([*probe(kernels, tensors, True, workspace=given)])
        results[-1] += align(kernels, tensors, workspace=given)
        record(kernels, tensors, False, workspace=given)
        results[-1] += tensors.values()
        assert (workspace[:128] == 0).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def check_a_value_that_is_not_finite(kernels, bad):
    """It reaches gamma as NaN, of its own sample and of the batch alone, past every clip."""
    for position in (3 * BLOCK + 5, 7 * BLOCK + 36):  # in a whole block, in the partial one
        step = make_step()
        step["p"][1, position] = bad
        for call in (align, probe):
            _, result = call(kernels, clone(step))
            assert result[:, 1].isnan().tolist() == [False, True, True]
        record(kernels, step, first=True)
        assert step["entry_sums"][:, 0].isfinite().tolist() == [True, False]
        step = make_step()
        step["y"][1, position] = bad
        record(kernels, step, first=False)
        for call in (align, probe):
            _, result = call(kernels, clone(step))
            assert result[:, 1].isnan().tolist() == [False, True, True]
        record(kernels, step | {"y": step["x"]}, first=False)  # bad is now in the older entry
        assert align(kernels, step)[1][:, 1].isnan().tolist() == [False, True, True]


def check_zero_denominators(kernels):
    """Equal entries give gamma 1 before the clip; a zero denominator of the error stays visible."""
    step = make_step()
    record(kernels, step, first=True)
    assert (step["entry_sums"][:, :2] == 0).all()
    for call in (align, probe):
        assert (call(kernels, clone(step))[1][:, 1] == 1).all()
    zeros = step | {"p": step["x"], "p_prev": torch.zeros_like(step["p_prev"])}
    assert align(kernels, zeros)[1][:, 0].isinf().all()
    assert probe(kernels, zeros)[1][:, 0].isinf().all()


@pytest.mark.parametrize(("batch", "size"), [(0, 5), (2, 0), (0, 0)])
def check_nothing_to_do(kernels, batch, size):
    """Empty tensors give the reference's zero sums and its (NaN, 1)."""
    step = make_step(batch=batch, size=size)
    step["entry_sums"].fill_(0)
    for call in (align, probe):
        for actual, expected in zip(call(kernels, step), call(reference, step), strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)
    assert combine(kernels, step, torch.ones(batch)).shape == (batch, size)
    assert extrapolate(kernels, step, torch.ones(batch, 3)).shape == (batch, size)
    expected = clone(step)
    record(reference, expected, first=True)
    record(kernels, step, first=True)
    assert all(torch.equal(step[name], expected[name]) for name in RECORDED)


def check_more_samples_than_programs(kernels):
    """Every sample then has one program, and the launch needs room for all of them."""
    step = make_step(batch=20, size=33)
    expected, _ = align(reference, in_fp64(step))
    assert_sums(align(kernels, step)[0], expected, 33)
    expected = clone(step)
    record(reference, expected, first=False)
    record(kernels, step, first=False)
    assert torch.equal(step["probe_window"], expected["probe_window"])
    assert torch.equal(step["newest"], expected["newest"])


def check_arguments(kernels):
    """Rows that are not contiguous and a workspace without room are refused, with the reason."""
    step = make_step()
    small = torch.zeros(128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="make_workspace"):
        align(kernels, step, workspace=small)
    with pytest.raises(ValueError, match="x has shape .* contiguous"):
        align(kernels, step | {"x": torch.randn(7 * BLOCK + 37, 2).T})
    with pytest.raises(ValueError, match="weights has shape .* contiguous"):
        extrapolate(kernels, step, torch.ones(3, 2).T)
    with pytest.raises(ValueError, match="newest has shape"):
        align(kernels, step | {"newest": torch.zeros(4, dtype=torch.int32)[::2]})


@pytest.mark.parametrize("case", overlaps.SHIFTED + overlaps.SAME + overlaps.OF_ITSELF)
def check_memory_that_is_written_too_early_is_refused(kernels, case):
    shift = 1 if case in overlaps.SHIFTED else 0
    with pytest.raises(ValueError, match="overlap"):
        getattr(kernels, case[0])(**overlaps.arguments_of(*case, shift, "cpu"))


@pytest.mark.parametrize("case", overlaps.ALLOWED)
def check_what_is_read_may_be_what_is_written(kernels, case):
    arguments = overlaps.arguments_of(*case, 0, "cpu")
    apart = {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    getattr(kernels, case[0])(**arguments)
    getattr(kernels, case[0])(**apart)
    assert torch.equal(arguments[case[1]], apart[case[1]])


@pytest.mark.parametrize("narrow", [FP16, BF16])
def check_fp64_comes_to_16_bits_by_way_of_fp32(kernels, narrow):
    """Just above the middle of two numbers: one rounding goes up, two end at the even one."""
    middle = 2.0 ** -(11 if narrow is FP16 else 8)
    x = torch.full((1, 4), 1 + middle + 2.0**-40, dtype=FP64)
    window = torch.zeros(2, 1, 4, dtype=narrow)
    newest = torch.zeros(1, dtype=torch.int32)
    assert kernels.combine_residuals(x, window, newest, torch.ones(1)).eq(1.0).all()
    p, y = torch.zeros(1, 4, dtype=narrow), torch.zeros(1, 4, dtype=FP64)
    q, r, sums = window.clone(), torch.zeros(2, 1, 4, dtype=FP64), torch.zeros(1, 4, dtype=FP64)
    kernels.record_residuals(-x, p, y, r, q, newest, sums, True)
    assert q.eq(1.0).all() and sums[0, 0] == 0


@pytest.mark.parametrize("dtypes", [(FP16, FP16, FP16), (FP64, FP32, FP16)])
def check_filled_in_tokens_end_at_the_largest_number_of_fp16(kernels, dtypes):
    """What rounds to infinity, both ways, and NaN, in a whole block and in the rest behind it."""
    x = torch.tensor([32752.0, -32752.0, 32768.0, -40000.0, float("nan"), 1.0])
    x = x.repeat(BLOCK)[None].to(dtypes[0])
    window, newest = x.to(dtypes[2]).repeat(2, 1, 1), torch.zeros(1, dtype=torch.int32)
    arguments = (x, window, newest, torch.ones(1))
    expected = reference.combine_residuals(*arguments)
    assert expected[0, :4].tolist() == [65504, -65504, 65504, -65504] and expected[0, 4].isnan()
    got = kernels.combine_residuals(*arguments)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))
    p, q = x.to(dtypes[1]), x.to(dtypes[1]).repeat(2, 1, 1)
    arguments = (x, p, window, window[0], q, newest, torch.ones(1, 3))
    got, expected = (each.extrapolate_residuals(*arguments) for each in (kernels, reference))
    assert torch.equal(got.isnan(), expected.isnan()) and not expected.isinf().any()
    assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))
