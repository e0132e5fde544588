"""Calls of the operators, for tests of compiled code: drawn once, made by several bodies."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from operator_cases import Case, Layout
from torch import Tensor

from dicache import ops

WRITTEN = {
    "probe": ("p_prev", "x_prev"),
    "alignment": (),
    "probe_and_combine": ("p_prev", "x_prev"),
    "combine": ("out",),
    "extrapolate": ("out",),
    "record": ("residual_window", "probe_window"),
}
NAMES = ("x", "p", "y", "p_prev", "x_prev", "probe_window", "residual_window", "oldest", "out")
LOW, HIGH = 0.25, 1.5


@dataclass
class Call:
    """One drawn call of an operator; `make` makes it with new tensors of the same values."""

    operator: str
    case: Case
    options: dict[str, Any]
    scale: float = 1.0  # of all values: fp16 saturates at 65504
    special: float = 0.0  # of x, at one place, if it is not 0: infinity or NaN
    exact: dict[str, Tensor] = field(default_factory=dict)  # outputs that have no choice
    sums: dict[str, Tensor] = field(default_factory=dict)  # outputs that depend on an order

    def make(self, functions: Any) -> Call:
        """The same call by other functions, with what it gave."""
        case = Case(**{**vars(self.case), "allocations": {}})
        made = Call(self.operator, case, self.options, self.scale, self.special)
        getattr(made, f"_{self.operator}")(functions, case, self.options)
        assert case.surroundings_are_untouched()
        return made

    def tensor(self, name: str, dtype: torch.dtype, entries: int = 1) -> Tensor:
        tensor = self.case.tensor(name, dtype, entries)
        if self.scale != 1.0:
            # Samples may lie in one place: batch stride 0.
            one = tensor.narrow(-self._axes, 0, 1) if tensor.stride(-self._axes) == 0 else tensor
            one *= self.scale
        if name == "x" and self.special != 0.0:
            tensor[0].view(-1)[-1] = self.special
        return tensor

    @property
    def _axes(self) -> int:
        return len(self.case.shape) + 1  # of one entry, with the batch

    def _probe(self, functions, case, options) -> None:
        x, p = self.tensor("x", case.x_dtype), self.tensor("p", case.p_dtype)
        p_prev, x_prev = self.tensor("p_prev", case.p_dtype), self.tensor("x_prev", case.x_dtype)
        sums, result = functions.probe_statistics(
            x, p, p_prev, x_prev if options["minus"] else None,
            self.tensor("probe_window", case.p_dtype, 2), case.newest(),
            case.entry_sums(options["wide_sums"]), LOW, HIGH, options["least_squares"],
            case.active_flags(),
        )  # fmt: skip
        self.sums = {"sums": sums, "result": result}
        self.exact = {"p_prev": p_prev, "x_prev": x_prev}

    def _alignment(self, functions, case, options) -> None:
        sums, result = functions.alignment_statistics(
            self.tensor("x", case.x_dtype), self.tensor("p", case.p_dtype),
            self.tensor("probe_window", case.p_dtype, 2), case.newest(),
            case.entry_sums(options["wide_sums"]), LOW, HIGH, options["relative_to_probe"],
            case.active_flags(),
        )  # fmt: skip
        self.sums = {"sums": sums, "result": result}

    def _probe_and_combine(self, functions, case, options) -> None:
        x, p = self.tensor("x", case.x_dtype), self.tensor("p", case.p_dtype)
        p_prev, x_prev = self.tensor("p_prev", case.p_dtype), self.tensor("x_prev", case.x_dtype)
        previous = (p_prev, x_prev if options["minus"] else None)
        probes = self.tensor("probe_window", case.p_dtype, 2)
        residuals = self.tensor("residual_window", case.y_dtype, 2)
        columns = 6 if not options["published"] else 7 if options["minus"] else 5
        promise = torch.tensor([3, 4], dtype=torch.int64)[1:]
        out = ops.make_results(x, p, columns)._replace(serial=9, promise=promise)
        given = (case.newest(), case.entry_sums(options["wide_sums"]), LOW, HIGH)
        given += (options["least_squares"], options["relative_to_probe"], options["by_sample"])
        sums, result, y = functions.probe_and_combine(
            x, p, *(previous if options["published"] else (None, None)), probes, residuals, *given,
            case.active_flags(), None, out,
        )  # fmt: skip
        gamma = result[:-1, 1] if options["by_sample"] else result[-1:, 1].expand(case.batch)
        flags = case.active_flags()
        assert equal_bits(y, ops.combine_residuals(x, residuals, given[0], gamma, flags))
        letter = out.mailbox
        assert (letter[:4].view(torch.int32).item(), letter[8:16].view(torch.int64).item()) == (
            9,
            4,
        )
        assert equal_bits(letter[16:].view(result.dtype), result.flatten())
        self.sums = {"sums": sums, "result": result}
        self.exact = {"p_prev": p_prev, "x_prev": x_prev}

    def _out(self, x: Tensor, options: dict[str, Any]) -> Tensor | None:
        """None, another tensor, or x itself."""
        if options["out"] == "x" and x.dtype == self.case.y_dtype:
            return x
        if options["out"] == "new":
            return None
        return self.case.tensor("out", self.case.y_dtype, fill=False)

    def _combine(self, functions, case, options) -> None:
        x = self.tensor("x", case.x_dtype)
        window = self.tensor("residual_window", case.y_dtype, 2)
        wide = torch.float64 in (case.x_dtype, case.y_dtype) and options["wide_sums"]
        weights = case.weights(options["one_gamma"], wide)
        out = functions.combine_residuals(
            x, window, case.newest(), weights[:, 0], case.active_flags(), self._out(x, options)
        )
        self.exact = {"y": out}

    def _extrapolate(self, functions, case, options) -> None:
        x, p = self.tensor("x", case.x_dtype), self.tensor("p", case.p_dtype)
        dtypes = (case.x_dtype, case.p_dtype, case.y_dtype)
        weights = case.weights(
            options["one_gamma"], torch.float64 in dtypes and options["wide_sums"]
        )
        out = functions.extrapolate_residuals(
            x, p, self.tensor("residual_window", case.y_dtype, 2),
            self.tensor("oldest", case.y_dtype), self.tensor("probe_window", case.p_dtype, 2),
            case.newest(), weights, case.active_flags(), self._out(x, options),
        )  # fmt: skip
        self.exact = {"y": out}

    def _record(self, functions, case, options) -> None:
        x, p = self.tensor("x", case.x_dtype), self.tensor("p", case.p_dtype)
        y = self.tensor("y", case.y_dtype)
        r = self.tensor("residual_window", case.y_dtype, 2)
        q = self.tensor("probe_window", case.p_dtype, 2)
        newest, entry_sums = case.newest(), case.entry_sums(options["wide_sums"])
        if options["parked"]:  # in the slots that are overwritten
            newest[:] = newest[0]
            older = 1 - int(newest[0])
            q[older] = p
            p = q[older]
            if x.dtype == r.dtype:
                r[older] = x
                x = r[older]
        functions.record_residuals(
            x, p, y, r, q, newest, entry_sums, options["first"], case.active_flags()
        )
        self.exact = {"residual_window": r, "probe_window": q, "newest": newest}
        self.sums = {"entry_sums": entry_sums}


def draw(
    rng: random.Random,
    operator: str,
    dtypes: tuple[torch.dtype, ...],
    most: int = 5000,
    **fixed: Any,
) -> Call:
    """A call on tensors of these dtypes of x, p and y, with sizes around every boundary."""
    batch = rng.choice([1, 1, 2, 2, 3, 11])
    size = rng.choice(
        [
            rng.randint(1, 40),
            2048 * rng.randint(1, max(1, most // 2048 // batch)) + rng.choice([-3, 0, 1, 8]),
            rng.randint(1, most // batch),
        ]
    )
    width = rng.choice([1, 1, 8])
    layouts = {
        name: Layout(
            offset=rng.choice([0, 0, 0, 8, 1, 3]),
            gap=rng.choice([0, 0, 8, 5]),
            shared=name not in WRITTEN[operator] and rng.random() < 0.15,
        )
        for name in NAMES
    }
    if rng.random() < 0.5:  # all of them aligned: otherwise few calls would be
        size = -(-size // 8) * 8
        layouts = {name: Layout(shared=layout.shared) for name, layout in layouts.items()}
    options = {
        "minus": rng.random() < 0.5,
        "least_squares": rng.random() < 0.5,
        "relative_to_probe": rng.random() < 0.5,
        "first": rng.random() < 0.4,
        "parked": rng.random() < 0.4,
        "out": rng.choice(["new", "given", "x"]),
        "wide_sums": rng.random() < 0.3,
        "one_gamma": rng.random() < 0.3,
        "by_sample": rng.random() < 0.5,
        "published": rng.random() < 0.5,
    }
    options |= fixed
    if options["out"] == "x":
        layouts["x"].shared = False
    active = tuple(rng.randint(0, 1) for _ in range(batch)) if rng.random() < 0.4 else None
    shape = (size,) if width == 1 else (max(1, size // width), width)
    case = Case(batch, shape, *dtypes, layouts, active, rng.randrange(10_000))
    special = rng.choice([0.0, 0.0, 0.0, float("inf"), float("nan")])
    return Call(operator, case, options, rng.choice([1.0, 1.0, 3e4]), special)


def equal_bits(found: Tensor, expected: Tensor) -> bool:
    """The same bits, but for those of a NaN, of which nothing is promised."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    bits = found.contiguous().view(integer) == expected.contiguous().view(integer)
    return bool((bits | ((found != found) & (expected != expected))).all())


def assert_equal(found: Call, expected: Call, functions: Any) -> None:
    """Stored elements to the bit; sums to rounding; results by `functions` from the sums found."""
    for name, tensor in found.exact.items():
        assert equal_bits(tensor, expected.exact[name]), (name, found.case, found.options)
    for name in set(found.sums) - {"result"}:
        sums, other = found.sums[name].double(), expected.sums[name].double()
        wide = found.sums[name].dtype == torch.float64 and found.case.wide
        # Products are rounded like sums of their magnitudes, which stand in the same row.
        size = other.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
        close = (sums - other).abs() <= (1e-12 if wide else 3e-5) * (other.abs() + size)
        same = close | (sums == other) | (sums.isnan() & other.isnan())
        assert same.all(), (name, sums, other, found.case, found.options)
    if "result" in found.sums:
        operator, options = found.operator, found.options
        if operator == "probe_and_combine":
            operator = "probe" if options["published"] else "alignment"
        rule = (options["relative_to_probe"],) if operator == "alignment" else ()
        finish = getattr(functions, f"finish_{operator}_statistics")
        result = finish(found.sums["sums"], LOW, HIGH, *rule)
        torch.testing.assert_close(
            found.sums["result"], result, rtol=2e-5, atol=2e-5, equal_nan=True
        )
        # Samples on their own: nothing is added up, and every operation is rounded correctly.
        assert equal_bits(found.sums["result"][:-1], result[:-1]), (found.case, found.options)


class InTwo:
    """`probe_and_combine` by two operators of a backend."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def probe_and_combine(
        self, x, p, p_prev, x_prev, probes, residuals, newest, entry_sums, low, high,
        least_squares, relative_to_probe, by_sample, active, workspace, out,
    ):  # fmt: skip
        rest = (probes, newest, entry_sums, low, high)
        if p_prev is None:
            last = (relative_to_probe, active, workspace, out)
            sums, result = self.functions.alignment_statistics(x, p, *rest, *last)
        else:
            last = (least_squares, active, workspace, out)
            sums, result = self.functions.probe_statistics(x, p, p_prev, x_prev, *rest, *last)
        gamma = result[:-1, 1] if by_sample else result[-1:, 1].expand(x.shape[0])
        return (
            sums, result, self.functions.combine_residuals(x, residuals, newest, gamma, active)
        )  # fmt: skip


def assert_same_bits(found: Call, again: Call) -> None:
    """Two schedules of one launch."""
    for outputs, others in ((found.exact, again.exact), (found.sums, again.sums)):
        for name, tensor in outputs.items():
            assert equal_bits(tensor, others[name]), (name, found.case, found.options)
