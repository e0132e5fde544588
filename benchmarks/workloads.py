"""What the operator benchmarks run: sizes, tensors, counted bytes and cases.

A case is one operation (an operator, or a skipped step) by one implementation (a backend, the
reference compiled by torch.compile, or the published sequence of eager operations). Inputs are
random, never zero, and repeat bit by bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dicache import ops, reference


@dataclass(frozen=True)
class Size:
    """Hidden states of one model at one resolution, and the text tokens beside them."""

    name: str
    shape: tuple[int, int, int]  # [B, S, D]
    text_tokens: int
    description: str

    def tensor_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one tensor of the hidden states' shape."""
        return math.prod(self.shape) * dtype.itemsize


SMALL = Size("small", (1, 256, 64), 16, "for the cost of a call")
FLUX = Size("flux", (1, 4096, 3072), 512, "FLUX.1, 1024x1024")
WAN = Size("wan", (1, 32760, 1536), 512, "Wan 2.1-1.3B, 480x832, 81 frames")
HUNYUAN_VIDEO = Size("hunyuan-video", (1, 67320, 3072), 256, "HunyuanVideo, 544x960, 129 frames")
SIZES = {size.name: size for size in (SMALL, FLUX, WAN, HUNYUAN_VIDEO)}
# Bounds of gamma that the data below does not touch, so that a wrong gamma is not clipped to right.
LOW, HIGH = 0.0, 1.5
# copy x 2, delta_x 9, delta_y 9, copy x 2, q 3, two means of |a - b| 6 each, r_new - r_old 3,
# times gamma 2, plus r_old 3, plus x 3. The copy of the text comes on top.
PUBLISHED_PASSES = 48
_SLOW_ON_CPU = {
    "wan": ("torch.compile",),
    "hunyuan-video": ("reference", "published", "torch.compile"),
}


@dataclass(frozen=True)
class Operation:
    """Something to time: the tensors it takes, what it returns, the passes over memory it needs."""

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    passes: int  # tensors of the hidden states' size that are read or written
    launches: int
    run: Callable[..., tuple[Tensor, ...]]  # of a backend, then the arguments


@dataclass(frozen=True)
class Case:
    """An operation, by one implementation, at one size."""

    operation: Operation
    implementation: str
    size: Size
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        return f"{self.size.name}-{self.operation.name}-{self.implementation}"

    @property
    def is_slow_on_cpu(self) -> bool:
        """Whether it takes minutes there."""
        return self.implementation in _SLOW_ON_CPU.get(self.size.name, ())

    @property
    def passes(self) -> int:
        """Passes over memory that are counted for this implementation.

        Those that the operation needs: eager and compiled code that moves more is slow for it. The
        published sequence counts its own.
        """
        return PUBLISHED_PASSES if self.implementation == "published" else self.operation.passes

    @property
    def num_bytes(self) -> int:
        """The passes in bytes."""
        return self.passes * self.size.tensor_bytes(self.dtype)


# --- Operations ----------------------------------------------------------------------------------


def _probe_statistics(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, p, p_prev, probe_window, newest, entry_sums, workspace = tensors
    return backend.probe_statistics(
        x, p, p_prev, None, probe_window, newest, entry_sums, LOW, HIGH, workspace=workspace
    )


def _alignment_statistics(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    *tensors, workspace = tensors
    return backend.alignment_statistics(*tensors, LOW, HIGH, workspace=workspace)


def _probe_and_combine(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, p, *tensors, workspace = tensors
    return backend.probe_and_combine(x, p, None, None, *tensors, LOW, HIGH, workspace=workspace)


def _combine_residuals(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    *tensors, out = tensors
    return (backend.combine_residuals(*tensors, out=out),)


def _extrapolate_residuals(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    *tensors, out = tensors
    return (backend.extrapolate_residuals(*tensors, out=out),)


def _record_residuals(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    *tensors, workspace = tensors
    backend.record_residuals(*tensors, first=False, workspace=workspace)
    return ()


def _skipped_step(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, p, p_prev, probe_window, residual_window, *rest = tensors
    _, result = _probe_statistics(backend, x, p, p_prev, probe_window, *rest)
    return _reuse(backend, result, x, residual_window, rest[0])


def _skipped_step_default(backend: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, p, probe_window, residual_window, *rest = tensors
    _, result = _alignment_statistics(backend, x, p, probe_window, *rest)
    return _reuse(backend, result, x, residual_window, rest[0])


def _reuse(
    backend: Any, result: Tensor, x: Tensor, residual_window: Tensor, newest: Tensor
) -> tuple[Tensor, ...]:
    error, gamma = result[-1, 0], result[-1, 1]
    # As in a session: y is allocated, and one gamma serves the whole batch.
    y = backend.combine_residuals(x, residual_window, newest, gamma.expand(x.shape[0]))
    return error, gamma, y


def published_step(
    x: Tensor,
    p: Tensor,
    text: Tensor,
    p_prev: Tensor,
    x_prev: Tensor,
    probe_window: Tensor,
    residual_window: Tensor,
) -> tuple[Tensor, ...]:
    """A skipped step as the published scripts do it, operation by operation.

    Written from the paper's formulas and a count of those scripts' operations. It leaves out their
    wait for the device, which is in their favour here. The newest window entry has to be 1.
    """
    kept_x, kept_text = x.clone(), text.clone()
    _delta_x = (x - x_prev).abs().mean() / x_prev.abs().mean()  # computed, and unused by default
    error = (p - p_prev).abs().mean() / p_prev.abs().mean()
    original_x = x.clone()
    q = p - original_x
    (q_old, q_new), (r_old, r_new) = probe_window, residual_window
    gamma = (q - q_old).abs().mean() / (q_new - q_old).abs().mean()
    gamma = gamma.clip(LOW, HIGH)
    y = kept_x + (r_old + gamma * (r_new - r_old))
    del kept_text  # alive until here, as in a step that may still go on
    return error, gamma, y


def _operator(
    name: str, arguments: str, outputs: str, run: Callable[..., tuple[Tensor, ...]]
) -> Operation:
    passes = sum(ops.MEMORY_PASSES[name])
    return Operation(name, tuple(arguments.split()), tuple(outputs.split()), passes, 1, run)


def _step(
    name: str, statistics: str, arguments: str, run: Callable[..., tuple[Tensor, ...]]
) -> Operation:
    passes = sum(ops.MEMORY_PASSES[statistics]) + sum(ops.MEMORY_PASSES["combine_residuals"])
    return Operation(
        name, tuple(arguments.split()), ("step_error", "step_gamma", "y"), passes, 2, run
    )


_WINDOW = "probe_window newest entry_sums workspace"
_BOTH_WINDOWS = "probe_window residual_window newest entry_sums workspace"
_OPERATIONS = (
    _operator("probe_statistics", f"x p p_prev {_WINDOW}", "sums result", _probe_statistics),
    _operator("alignment_statistics", f"x p {_WINDOW}", "sums result", _alignment_statistics),
    _operator("probe_and_combine", f"x p {_BOTH_WINDOWS}", "sums result y", _probe_and_combine),
    _operator("combine_residuals", "x residual_window newest gamma out", "out", _combine_residuals),
    _operator(
        "extrapolate_residuals",
        "x p residual_window oldest probe_window newest weights out",
        "out",
        _extrapolate_residuals,
    ),
    _operator(
        "record_residuals",
        "x p y residual_window probe_window newest entry_sums workspace",
        "",
        _record_residuals,
    ),
    # The published rules, which `published_step` does too, and the rules of DiCacheConfig().
    _step("skipped_step", "probe_statistics", f"x p p_prev {_BOTH_WINDOWS}", _skipped_step),
    _step(
        "skipped_step_default",
        "alignment_statistics",
        f"x p {_BOTH_WINDOWS}",
        _skipped_step_default,
    ),
)
OPERATIONS = {operation.name: operation for operation in _OPERATIONS}
OPERATORS = tuple(ops.MEMORY_PASSES)
_PUBLISHED_ARGUMENTS = ("x", "p", "text", "p_prev", "x_prev", "probe_window", "residual_window")
_COPY_ARGUMENTS = ("x", "out")


# --- Implementations -----------------------------------------------------------------------------


def backends(device: torch.device) -> list[str]:
    """Backends of the operators that run on this device, the reference last.

    Triton's interpreter is left out: it is there for tests, and its times mean nothing.
    """
    found = []
    for name in ("cuda", "triton", "cpp", "reference"):
        if name == "triton" and device.type == "cpu":
            continue
        try:
            ops.resolve_backend(name, device)
        except ValueError:
            continue
        found.append(name)
    return found


def cases(
    device: torch.device, sizes: list[Size], implementations: list[str] | None = None
) -> Iterator[Case]:
    """Every operation by every implementation that does it, size by size."""
    everything = [*backends(device), "published", "torch.compile"]
    for size in sizes:
        for operation in OPERATIONS.values():
            for implementation in everything:
                if implementations is not None and implementation not in implementations:
                    continue
                if implementation != "published" or operation.name == "skipped_step":
                    yield Case(operation, implementation, size)


def bind(case: Case, tensors: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The case on these tensors, ready to call."""
    if case.implementation == "published":
        return functools.partial(published_step, *_pick(tensors, _PUBLISHED_ARGUMENTS))
    arguments = _pick(tensors, case.operation.arguments)
    if case.implementation == "torch.compile":
        return functools.partial(_compiled(case.operation.name, case.size), *arguments)
    backend: ModuleType = ops.resolve_backend(case.implementation, arguments[0].device)
    return functools.partial(case.operation.run, backend, *arguments)


def bind_copy(tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    """`out.copy_(x)`: the rate that every other one is compared with."""
    return functools.partial(tensors["out"].copy_, tensors["x"])


@functools.lru_cache(maxsize=1)
def _compiled(operation: str, size: Size) -> Callable[..., tuple[Tensor, ...]]:
    torch._dynamo.reset()  # the sizes would add up to dynamo's limit of recompilations
    run = functools.partial(OPERATIONS[operation].run, reference)
    return torch.compile(run, dynamic=False, fullgraph=True)


def _pick(tensors: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    return [tensors[name] for name in names]


# --- Tensors -------------------------------------------------------------------------------------

_PERIOD = 1_000_003  # prime: no two rows, pages or blocks hold the same values


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """The tensors that a case works on, with residuals that differ from each other like a run's.

    Normal values are drawn for one period and repeated: drawing them all takes minutes on a CPU.
    """
    published = case.implementation == "published"
    names = _PUBLISHED_ARGUMENTS if published else case.operation.arguments
    return make_named_tensors(names, case.size, device, seed, case.dtype)


def make_copy_tensors(size: Size, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Source and target of a copy."""
    return make_named_tensors(_COPY_ARGUMENTS, size, device, seed)


def make_named_tensors(
    names: tuple[str, ...],
    size: Size,
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The named tensors of one step; windows are [2, B, S, D] and their newest entry is 1."""
    batch, tokens, width = size.shape
    generator = torch.Generator().manual_seed(seed)
    length = min(_PERIOD, batch * tokens * width)

    def noise() -> Tensor:
        return torch.randn(length, generator=generator)

    def spread(*periods: Tensor) -> Tensor:
        whole = [_repeat(period, size.shape, dtype, device) for period in periods]
        return whole[0] if len(whole) == 1 else torch.stack(whole)

    x, p = noise(), noise() / 2
    p += x
    makers: dict[str, Callable[[], Tensor]] = {
        "x": lambda: spread(x),
        "p": lambda: spread(p),
        "y": lambda: spread(x + noise()),
        "x_prev": lambda: spread(x + 0.1 * noise()),
        "p_prev": lambda: spread(p + 0.1 * noise()),
        "probe_window": lambda: spread(0.4 * noise(), 0.45 * noise()),
        "residual_window": lambda: spread(0.8 * noise(), 0.9 * noise()),
        "oldest": lambda: spread(0.7 * noise()),
        "text": lambda: _repeat(noise(), (batch, size.text_tokens, width), dtype, device),
        # NaN: what is not written is found.
        "out": lambda: torch.full(size.shape, math.nan, dtype=dtype, device=device),
        "gamma": lambda: torch.full((batch,), 1.1, device=device),
        "weights": lambda: torch.tensor([0.3, -0.2, 0.6], device=device).expand(batch, 3),
        "newest": lambda: torch.ones(batch, dtype=torch.int32, device=device),
    }
    tensors = {name: makers[name]() for name in names if name in makers}
    if "entry_sums" in names:
        tensors["entry_sums"] = entry_sums_of(tensors["probe_window"])
    if "workspace" in names:
        tensors["workspace"] = ops.make_workspace(tensors["x"])
    return tensors


def _repeat(
    period: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    whole = torch.empty(math.prod(shape), dtype=dtype, device=device)
    period = period.to(device=device, dtype=dtype)
    turns, rest = divmod(len(whole), len(period))
    whole[: turns * len(period)].view(turns, len(period)).copy_(period)
    whole[turns * len(period) :].copy_(period[:rest])
    return whole.view(shape)


def entry_sums_of(probe_window: Tensor) -> Tensor:
    d = (probe_window[1].float() - probe_window[0].float()).flatten(1)  # [B, S D]
    # sum|r| of both entries is only asked for being finite.
    finite = torch.ones(len(d), device=d.device)
    return torch.stack([d.abs().sum(1), d.square().sum(1), finite, finite], dim=1)


def num_sets(case_bytes: int, device: torch.device) -> int:
    """Sets of tensors to rotate over: more than four times the last cache, two at least.

    At most 32, so a small size does stay in the cache: what it shows is the cost of a launch.
    """
    return min(32, max(2, math.ceil(4 * cache_bytes(device) / case_bytes)))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20
