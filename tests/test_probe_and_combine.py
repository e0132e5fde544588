"""Statistics and combination in one call: the bits of the two operators, and the host's letter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fuzzing import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from operator_backends import Backend, why_not
from operator_cases import Case, Layout, cases
from torch import Tensor

from dicache import ops, reference

FUZZ = draws(40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
KINDS = ["alignment", "delta_y", "delta_minus"]


def equal(left: Tensor, right: Tensor) -> bool:
    """In every bit, but for those of NaN."""
    same = (left == right) | (left.isnan() & right.isnan())
    return left.dtype == right.dtype and left.shape == right.shape and bool(same.all())


class Call:
    """Arguments of one drawn call; `one` and `two` make it in one call and in two."""

    def __init__(self, case: Case, kind: str, flag: bool, by_sample: bool, backend: Backend):
        case.device = backend.device
        self.backend, self.kind, self.flag, self.by_sample = backend, kind, flag, by_sample
        case.layouts["p_prev"].shared = case.layouts["x_prev"].shared = False
        if torch.float64 in (case.x_dtype, case.p_dtype, case.y_dtype):
            case.p_dtype = case.y_dtype = torch.float64
        self.x, self.p = case.tensor("x", case.x_dtype), case.tensor("p", case.p_dtype)
        self.p_prev = case.tensor("p_prev", case.p_dtype)
        self.x_prev = case.tensor("x_prev", case.x_dtype)
        self.probes = case.tensor("probe_window", case.p_dtype, entries=2)
        self.residuals = case.tensor("residual_window", case.y_dtype, entries=2)
        self.newest, self.sums = case.newest(), case.entry_sums()
        self.active, self.case = case.active_flags(), case
        self.before = self.p_prev.clone(), self.x_prev.clone()

    @property
    def previous(self) -> tuple[Tensor | None, Tensor | None]:
        return {
            "alignment": (None, None),
            "delta_y": (self.p_prev, None),
            "delta_minus": (self.p_prev, self.x_prev),
            "x_prev alone": (None, self.x_prev),
        }[self.kind]

    def one(self, **options: Any) -> tuple[Tensor, ...]:
        found = self.backend.ops.probe_and_combine(
            self.x, self.p, *self.previous, self.probes, self.residuals, self.newest, self.sums,
            0.5, 1.5, self.flag, self.flag, self.by_sample, self.active, **options,
        )  # fmt: skip
        return (*found, *self.left())

    def two(self) -> tuple[Tensor, ...]:
        rest = (self.probes, self.newest, self.sums, 0.5, 1.5, self.flag, self.active)
        if self.kind == "alignment":
            sums, result = self.backend.ops.alignment_statistics(self.x, self.p, *rest)
        else:
            sums, result = self.backend.ops.probe_statistics(self.x, self.p, *self.previous, *rest)
        gamma = result[:-1, 1] if self.by_sample else result[-1:, 1].expand(self.case.batch)
        y = self.backend.ops.combine_residuals(
            self.x, self.residuals, self.newest, gamma, self.active
        )
        return (sums, result, y, *self.left())

    def left(self) -> tuple[Tensor, Tensor]:
        """What is left in p_prev and x_prev, which are as before again."""
        left = self.p_prev.clone(), self.x_prev.clone()
        self.p_prev.copy_(self.before[0])
        self.x_prev.copy_(self.before[1])
        return left


@FUZZ
@given(
    case=cases(),
    kind=st.sampled_from(KINDS),
    flag=st.booleans(),
    by_sample=st.booleans(),
    same=st.booleans(),
)
def test_one_call_has_the_bits_of_two(
    backend: Backend,
    case: Case,
    kind: str,
    flag: bool,
    by_sample: bool,
    same: bool,
) -> None:
    """`same`: x, p and residuals in one dtype, which is one launch."""
    if same:
        case.p_dtype = case.y_dtype = case.x_dtype
    call = Call(case, kind, flag, by_sample, backend)
    for found, expected in zip(call.one(), call.two(), strict=True):
        assert equal(found, expected)
    assert case.surroundings_are_untouched()


def plain(backend: Backend, batch: int = 2, size: int = 70_001, **changes: Any) -> Call:
    layouts = {"p_prev": Layout(), "x_prev": Layout()}
    case = Case(batch, (size,), *[torch.bfloat16] * 3, layouts, None, seed=4)
    options = {"kind": "alignment", "flag": False, "by_sample": False, **changes}
    return Call(case, **options, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_a_workspace_serves_all_launches(backend: Backend, kind: str) -> None:
    """Those that wait for their grid, again and again, and those that do not in between."""
    call = plain(backend, kind=kind)
    workspace = backend.workspace(call.x)
    expected = call.two()
    for _ in range(3):
        found = call.one(workspace=workspace)
        assert all(map(equal, found, expected))
        sums, _ = backend.ops.alignment_statistics(
            call.x, call.p, call.probes, call.newest, call.sums, 0.5, 1.5, workspace=workspace
        )
        assert sums.isfinite().all()
    assert workspace[:4].eq(0).all()


@pytest.mark.parametrize("batch", [0, 1, 40])
@pytest.mark.parametrize("size", [0, 1])
def test_empty_batches_and_samples(backend: Backend, batch: int, size: int) -> None:
    x = torch.ones(batch, size, device=backend.device)
    window = torch.zeros(2, batch, size, device=backend.device)
    newest = torch.zeros(batch, dtype=torch.int32, device=backend.device)
    entry_sums = torch.ones(batch, 4, device=backend.device)
    sums, result, y = backend.ops.probe_and_combine(
        x, x, None, None, window, window, newest, entry_sums, 0.0, 2.0
    )
    assert torch.equal(y, x)
    expected, _ = reference.alignment_statistics(
        x.cpu(), x.cpu(), window.cpu(), newest.cpu(), entry_sums.cpu(), 0.0, 2.0
    )
    assert torch.equal(sums.cpu(), expected)
    assert result.shape == (batch + 1, 2)


# ---- results and the mailbox ----

STATISTICS = [*KINDS, "probe_and_combine"]


def call_with(
    backend: Backend,
    what: str,
    dtype: torch.dtype,
    columns: int | None = None,
    **changes: Any,
) -> tuple[ops.Results, tuple[Tensor, Tensor]]:
    """The results that were given, and those of the same call without them."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(backend.device, dtype)  # noqa: E731
    x, p, p_prev, x_prev, window = *(draw(3, 9000) for _ in range(4)), draw(2, 3, 9000)
    newest = torch.tensor([0, 1, 0], dtype=torch.int32, device=backend.device)
    shared = (newest, torch.ones(3, 4, device=backend.device), 0.0, 2.0)
    columns = columns or {"delta_y": 5, "delta_minus": 7}.get(what, 6)
    out = ops.make_results(x, p, columns)._replace(serial=7)._replace(**changes)
    out.sums.fill_(-1)
    out.result.fill_(-1)

    def call(out: ops.Results | None) -> tuple[Tensor, ...]:
        if what == "alignment":
            return backend.ops.alignment_statistics(x, p, window, *shared, out=out)
        if what == "probe_and_combine":
            given = (x, p, None, None, window, window, *shared)
            return backend.ops.probe_and_combine(*given, out=out)
        previous = p_prev.clone(), x_prev.clone() if what == "delta_minus" else None
        return backend.ops.probe_statistics(x, p, *previous, window, *shared, out=out)

    expected, found = call(None), call(out)
    assert found[0] is out.sums and found[1] is out.result
    if what == "probe_and_combine":
        assert torch.equal(found[2], expected[2])
    if x.is_cuda:
        torch.cuda.synchronize()
    return out, expected[:2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("what", STATISTICS)
@pytest.mark.parametrize(
    "promise", [None, torch.tensor([7_000_000_001]), torch.tensor(0.7).bfloat16()]
)
def test_the_mailbox_holds_what_the_call_left(
    backend: Backend,
    what: str,
    dtype: torch.dtype,
    promise: Tensor | None,
) -> None:
    if promise is not None:
        promise = promise.to(backend.device)
    out, (sums, result) = call_with(backend, what, dtype, promise=promise)
    assert torch.equal(out.sums, sums)
    assert torch.equal(out.result, result)
    assert out.mailbox[:4].view(torch.int32).item() == 7
    assert torch.equal(out.mailbox[16:].view(result.dtype).view(4, 2), result.cpu())
    if promise is not None:
        raw = out.mailbox[8 : 8 + promise.element_size()]
        assert raw.view(promise.dtype).item() == promise.item()


@pytest.mark.parametrize("what", STATISTICS)
def test_results_without_a_mailbox(backend: Backend, what: str) -> None:
    out, (sums, result) = call_with(backend, what, torch.float32, mailbox=None, serial=0)
    assert torch.equal(out.sums, sums)
    assert torch.equal(out.result, result)


WRONG = {
    "sums": {"columns": 4},
    "result": {"result": torch.zeros(3, 2)},
    "mailbox": {"mailbox": torch.zeros(40, dtype=torch.uint8)},
    "mailbox of another dtype": {"mailbox": torch.zeros(48)},
    "serial": {"serial": 0},
    "promise": {"promise": torch.zeros(2)},
    "promise of 16 bytes": {"promise": torch.zeros((), dtype=torch.complex128)},
}


@pytest.mark.parametrize("what", STATISTICS)
@pytest.mark.parametrize("name", WRONG)
def test_errors_name_what_was_given(backend: Backend, what: str, name: str) -> None:
    changes = dict(WRONG[name])
    for key, value in changes.items():
        if isinstance(value, Tensor) and key != "mailbox":
            changes[key] = value.to(backend.device)
        elif isinstance(value, Tensor) and backend.device == "cuda":
            changes[key] = value.pin_memory()
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)^{name.split()[0]} .*Expected"):
        call_with(backend, what, torch.float32, **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton", "reference"])
def test_a_mailbox_that_a_gpu_cannot_write_is_refused(name: str) -> None:
    """It would end the process's work on that GPU."""
    if why_not(name) is not None:
        pytest.skip(why_not(name))
    on_gpu = Backend(name)
    on_gpu.device = "cuda"
    pageable = torch.zeros(80, dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match=r"mailbox .*pinned"):
        call_with(on_gpu, "alignment", torch.float32, mailbox=pageable)


def test_fp64_in_one_half_alone_is_refused(backend: Backend) -> None:
    call = plain(backend, size=64)
    call.residuals = call.residuals.double()
    with pytest.raises((ValueError, RuntimeError), match=r"^p has dtype .*float64 in both"):
        call.one()
    call = plain(backend, size=64)
    call.kind = "x_prev alone"
    with pytest.raises((ValueError, RuntimeError), match=r"^x_prev is given without p_prev"):
        call.one()


def test_what_is_not_finite_reaches_y(backend: Backend) -> None:
    """Gamma is NaN then, and so are the tokens: nobody takes them for good ones."""
    call = plain(backend, size=9000, by_sample=True)
    call.probes[1, 1, 8999] = math.nan
    _, result, y, *_ = call.one()
    assert result[0].isfinite().all() and y[0].isfinite().all()
    assert result[1, 1].isnan() and y[1].isnan().all()
