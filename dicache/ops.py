"""The caching path as operators: what engine writers import.

    from dicache import ops

    sums, result = ops.alignment_statistics(x, p, probe_window, newest, entry_sums, low, high)
    y = ops.combine_residuals(x, residual_window, newest, gamma=result[-1, 1].expand(batch))
    ops.record_residuals(x, p, y, residual_window, probe_window, newest, entry_sums, first=False)

Every function is one `torch.library` operator in the namespace `dicache`, with a fake for
torch.compile: one launch on a GPU (`probe_and_combine` two, where one is refused), results stay on
the device, and nothing waits for it. Notation, arguments and exact rules are those of
`dicache.reference`, which also is the body that runs where no faster one does. The dispatcher takes
the body by device: C++ on the CPU (`cpp`), CUDA C++ on NVIDIA (`cuda`), else Triton (`triton`),
else the reference.

Every backend gives bitwise equal results from run to run on one machine; `combine_residuals`,
`extrapolate_residuals` and the windows of `record_residuals` are bitwise equal between backends
too. Sums are added in another order by each, so they agree to rounding. Schemas are defined here,
once; csrc/ and kernels/ implement them. Bad arguments raise `ValueError` (`RuntimeError` in the
compiled bodies). No operator takes part in autograd.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .workspace import Results, interprets_triton, make_results, make_workspace

__all__ = [
    "MEMORY_PASSES",
    "OPERATORS",
    "Results",
    "alignment_statistics",
    "backend_status",
    "combine_residuals",
    "extrapolate_residuals",
    "finish_alignment_statistics",
    "finish_probe_statistics",
    "make_results",
    "make_workspace",
    "probe_and_combine",
    "probe_statistics",
    "record_residuals",
    "resolve_backend",
]

# What the operators that write a `Results` take behind the others' arguments.
_OUT = (
    "Tensor? active, Tensor(w!)? workspace, Tensor(s!) sums, Tensor(r!) result, "
    "Tensor(m!)? mailbox, int serial, Tensor? promise"
)
SCHEMAS = (
    "probe_statistics(Tensor x, Tensor p, Tensor(a!) p_prev, Tensor(b!)? x_prev, "
    "Tensor probe_window, Tensor newest, Tensor entry_sums, float low, float high, "
    "bool least_squares=False, Tensor? active=None, Tensor(c!)? workspace=None) "
    "-> (Tensor, Tensor)",
    "probe_statistics_out(Tensor x, Tensor p, Tensor(a!) p_prev, Tensor(b!)? x_prev, "
    "Tensor probe_window, Tensor newest, Tensor entry_sums, float low, float high, "
    f"bool least_squares, {_OUT}) -> ()",
    "alignment_statistics(Tensor x, Tensor p, Tensor probe_window, Tensor newest, "
    "Tensor entry_sums, float low, float high, bool relative_to_probe=False, "
    "Tensor? active=None, Tensor(a!)? workspace=None) -> (Tensor, Tensor)",
    "alignment_statistics_out(Tensor x, Tensor p, Tensor probe_window, Tensor newest, "
    f"Tensor entry_sums, float low, float high, bool relative_to_probe, {_OUT}) -> ()",
    "probe_and_combine(Tensor x, Tensor p, Tensor(a!)? p_prev, Tensor(b!)? x_prev, "
    "Tensor probe_window, Tensor residual_window, Tensor newest, Tensor entry_sums, float low, "
    "float high, bool least_squares=False, bool relative_to_probe=False, bool by_sample=False, "
    "Tensor? active=None, Tensor(c!)? workspace=None) -> (Tensor, Tensor, Tensor)",
    "probe_and_combine_out(Tensor x, Tensor p, Tensor(a!)? p_prev, Tensor(b!)? x_prev, "
    "Tensor probe_window, Tensor residual_window, Tensor newest, Tensor entry_sums, float low, "
    f"float high, bool least_squares, bool relative_to_probe, bool by_sample, {_OUT}) -> Tensor",
    "finish_probe_statistics(Tensor sums, float low, float high) -> Tensor",
    "finish_alignment_statistics(Tensor sums, float low, float high, "
    "bool relative_to_probe=False) -> Tensor",
    "combine_residuals(Tensor x, Tensor residual_window, Tensor newest, Tensor gamma, "
    "Tensor? active=None) -> Tensor",
    "combine_residuals_out(Tensor x, Tensor residual_window, Tensor newest, Tensor gamma, "
    "Tensor? active, Tensor(a!) out) -> ()",
    "extrapolate_residuals(Tensor x, Tensor p, Tensor residual_window, Tensor oldest, "
    "Tensor probe_window, Tensor newest, Tensor weights, Tensor? active=None) -> Tensor",
    "extrapolate_residuals_out(Tensor x, Tensor p, Tensor residual_window, Tensor oldest, "
    "Tensor probe_window, Tensor newest, Tensor weights, Tensor? active, Tensor(a!) out) -> ()",
    "record_residuals(Tensor x, Tensor p, Tensor y, Tensor(a!) residual_window, "
    "Tensor(b!) probe_window, Tensor(c!) newest, Tensor(d!) entry_sums, bool first, "
    "Tensor? active=None, Tensor(e!)? workspace=None) -> ()",
)
OPERATORS = tuple(schema.partition("(")[0] for schema in SCHEMAS)

# Tensors of the hidden states' size that one launch (reads, writes). delta_minus, least squares
# and a first entry add to it, as the functions' docstrings say.
MEMORY_PASSES = {
    "probe_statistics": (4, 1),
    "alignment_statistics": (4, 0),
    "probe_and_combine": (7, 1),
    "combine_residuals": (3, 1),
    "extrapolate_residuals": (6, 1),
    "record_residuals": (4, 2),
}


def probe_statistics(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor,
    x_prev: Tensor | None,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    least_squares: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Results | None = None,
) -> tuple[Tensor, Tensor]:
    """Error and gamma of the published rules; stores p (and x) for the next step.

        delta_y = sum|p - p_prev| / sum|p_prev|        error = delta_y, or |delta_y - delta_x|
        gamma   = clip(sum|q - q_old| / sum|q_new - q_old|, low, high)

    Memory passes: reads x, p, p_prev, q_old and writes p_prev, 5; with `x_prev` 7; `least_squares`
    reads q_new as well. Arguments and errors: `dicache.reference.probe_statistics`. For a decision
    over several GPUs, add up the sums and call `finish_probe_statistics`.

    Returns:
        sums [B, 5] or [B, 7], and result [B + 1, 2] = (error, gamma), the whole batch last.
    """
    rest = (probe_window, newest, entry_sums, low, high, least_squares, active, workspace)
    if out is None:
        return _probe_statistics(x, p, p_prev, x_prev, *rest)
    _probe_statistics_out(x, p, p_prev, x_prev, *rest, *out)
    return out.sums, out.result


def alignment_statistics(
    x: Tensor,
    p: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    relative_to_probe: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Results | None = None,
) -> tuple[Tensor, Tensor]:
    """Error and gamma of the verified alignment: how well the trajectory predicts the probe.

        a = q - q_old     d = q_new - q_old     gamma = clip(<a, d> / <d, d>, low, high)
        error = ||a - gamma d|| / ||q||, or / ||p|| with `relative_to_probe`

    Memory passes: reads x, p, q_old, q_new, 4; writes nothing. Arguments and errors:
    `dicache.reference.alignment_statistics`. For a decision over several GPUs, add up the sums and
    call `finish_alignment_statistics`.

    Returns:
        sums [B, 6], and result [B + 1, 2] = (error, gamma), the whole batch last.
    """
    rest = (newest, entry_sums, low, high, relative_to_probe, active, workspace)
    if out is None:
        return _alignment_statistics(x, p, probe_window, *rest)
    _alignment_statistics_out(x, p, probe_window, *rest, *out)
    return out.sums, out.result


def probe_and_combine(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor | None,
    x_prev: Tensor | None,
    probe_window: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    least_squares: bool = False,
    relative_to_probe: bool = False,
    by_sample: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Results | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole skipped step in one launch: statistics, gamma, and the tokens that are filled in.

    With `p_prev` the statistics of `probe_statistics`, else those of `alignment_statistics`; then
    `combine_residuals` with each sample's gamma (`by_sample`) or the batch's. The same bits as
    these operators have. On a GPU it is a cooperative launch, whose blocks wait for each other. Two
    launches it is where not all of them can be resident (a batch of more samples than the device
    has blocks, a part of a GPU), and where x, p and the residuals have several dtypes.

    It pays where launches cost as much as their bytes, up to some 32 MB a tensor. With a mailbox
    in `out` the host has (error, gamma) before y is done.

    Memory passes: those of the two operators, 8, 9 (`p_prev`) or 11. Arguments and errors:
    `dicache.reference.probe_and_combine`.

    Returns:
        sums [B, 5, 6 or 7], result [B + 1, 2] = (error, gamma), and y [B, ...].
    """
    given = (x, p, p_prev, x_prev, probe_window, residual_window, newest, entry_sums, low, high)
    rest = (least_squares, relative_to_probe, by_sample, active, workspace)
    if out is None:
        return _probe_and_combine(*given, *rest)
    return out.sums, out.result, _probe_and_combine_out(*given, *rest, *out)


def finish_probe_statistics(sums: Tensor, low: float, high: float) -> Tensor:
    """(error, gamma) [B + 1, 2] from the sums of `probe_statistics`, after an all-reduce if any.

    One small launch. `dicache.reference.finish_probe_statistics` says what the columns are.
    """
    return _finish_probe_statistics(sums, low, high)


def finish_alignment_statistics(
    sums: Tensor, low: float, high: float, relative_to_probe: bool = False
) -> Tensor:
    """(error, gamma) [B + 1, 2] from the sums of `alignment_statistics`; one small launch."""
    return _finish_alignment_statistics(sums, low, high, relative_to_probe)


def combine_residuals(
    x: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    gamma: Tensor,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x + r_old + gamma (r_new - r_old), in the window's dtype; gamma [B] stays on the device.

    Memory passes: reads x, r_old, r_new and writes y, 4. `out` may be x itself. Arguments and
    errors: `dicache.reference.combine_residuals`.
    """
    if out is None:
        return _combine_residuals(x, residual_window, newest, gamma, active)
    _combine_residuals_out(x, residual_window, newest, gamma, active, out)
    return out


def extrapolate_residuals(
    x: Tensor,
    p: Tensor,
    residual_window: Tensor,
    oldest: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    weights: Tensor,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (q - q_a), in the residuals' dtype.

    r_a, r_b, r_c are the residuals of the three last computed steps, the newest first: the two
    entries of `residual_window` and `oldest`. q_a is the newer entry of `probe_window`. The weights
    [B, 3] stay on the device.

    Memory passes: reads x, p, r_a, r_b, r_c, q_a and writes y, 7. `out` may be x itself. Arguments
    and errors: `dicache.reference.extrapolate_residuals`.
    """
    given = (x, p, residual_window, oldest, probe_window, newest, weights, active)
    if out is None:
        return _extrapolate_residuals(*given)
    _extrapolate_residuals_out(*given, out)
    return out


def record_residuals(
    x: Tensor,
    p: Tensor,
    y: Tensor,
    residual_window: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    first: bool,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """Push (r, q) = (y - x, p - x) over the older window entry, and turn `newest` to it.

    Memory passes: reads x, p, y, q_new and writes r, q, 6; a first entry is written twice, and 7
    passes. x and p may be the very slots that are overwritten. Arguments and errors:
    `dicache.reference.record_residuals`.
    """
    _record_residuals(
        x, p, y, residual_window, probe_window, newest, entry_sums, first, active, workspace
    )


def backend_status() -> dict[str, str]:
    """For every backend name `"available"`, or the reason why it cannot run here."""
    status = {"reference": "available", "cpp": _load_error["_C"] or "available"}
    status["cuda"] = _load_error["_C_cuda"] or _no_gpu() or "available"
    status["triton"] = _no_triton() or "available"
    return status


def resolve_backend(name: str, device: torch.device | None = None) -> ModuleType:
    """The module whose functions are the operators of backend `name` (`DiCacheConfig.backend`).

    Args:
        name: "auto" takes the fastest body for each tensor's device.
        device: Where the tensors are; `None` checks only that the backend is there.

    Raises:
        ValueError: The backend is not there, or not for this device; the message says why and what
            to do.
    """
    if name == "auto":
        return sys.modules[__name__]
    status = backend_status()
    if status.get(name) != "available":
        reason = status.get(name, "there is no backend of this name")
        available = ", ".join(["auto", *(key for key in status if status[key] == "available")])
        raise ValueError(f"backend={name!r} cannot be used: {reason}. Available: {available}.")
    expected = {"cpp": "cpu", "cuda": "cuda"}.get(name)
    if device is not None and expected is not None and device.type != expected:
        raise ValueError(
            f"backend={name!r} works on {expected} tensors, and these are on {device}. Use "
            f"backend='auto', which takes the fastest one for each device."
        )
    if name == "reference":
        return reference
    if name == "triton":
        from . import kernels

        return kernels
    return sys.modules[__name__]


def why_slow(device: torch.device) -> str | None:
    """Why nothing faster than plain PyTorch runs on this device; `None` if something does.

    Only of devices that this package has faster bodies for.
    """
    if device.type == "cuda":
        return _load_error["_C_cuda"] if _no_triton() else None
    return _load_error["_C"] if device.type == "cpu" else None


def _no_gpu() -> str | None:
    """Why the CUDA operators that were built cannot run here; `None` if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    built = build_record().get("cuda_architectures")
    capability = torch.cuda.get_device_capability()
    if built is None or _covers(built, capability):
        return None
    return f"built for {built}, and this GPU is {capability[0]}.{capability[1]}"


def build_record() -> dict[str, Any]:
    """What setup.py noted of its build: facts, and `missing`, why a module is not there.

    Empty where nothing was compiled. It is no module, since it holds for every version of Python.
    """
    try:
        return json.loads((Path(__file__).parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _covers(built: str, capability: tuple[int, int]) -> bool:
    """Whether code built for "8.0;9.0+PTX" runs on a GPU: same major version, or from its PTX.

    "9.0a" is for that GPU alone and "10.0f" for its family, their PTX too. Where no entry is a
    number nobody can tell, and the driver will.
    """
    entries = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", built)
    for major, minor, kind, ptx in entries:
        version = int(major), int(minor)
        is_near = version[0] == capability[0] or (ptx and not kind)
        if version == capability or (kind != "a" and is_near and version <= capability):
            return True
    return not entries


def _no_triton() -> str | None:
    """Why Triton cannot run here; `None` if it can. Does not import it."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() or torch.xpu.is_available() or interprets_triton():
        return None
    return "no GPU that Triton could run on (TRITON_INTERPRET=1 runs it on the CPU, slowly)"


def _load(extension: str) -> str | None:
    """Load a compiled extension of this package; why it is not there, or `None`."""
    for path in sorted(Path(__file__).parent.glob(f"{extension}.*")):
        if path.suffix in (".so", ".pyd", ".dylib"):
            reason = _no_gpu() if extension == "_C_cuda" and torch.cuda.is_available() else None
            if reason is not None:
                return reason  # registered, it would stand in Triton's way
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return f"{path.name} does not load: {error}"
            return None
    if extension == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    wanted = "cuda" if extension == "_C_cuda" else "cpu"
    isolated = "nothing was compiled here, as where pip builds in isolation, without torch"
    reason = build_record().get("missing", {}).get(extension, isolated)
    return (
        f"dicache.{extension} was not built: {reason}. DICACHE_BUILD={wanted} pip install "
        f"--no-build-isolation ... builds it or says why not"
    )


def _register_python_bodies() -> None:
    """The reference for every device, and Triton where it can run and nothing compiled does."""
    for name in OPERATORS:
        _LIBRARY.impl(name, _body(reference, name), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"dicache::{name}", _FAKES[name], lib=_LIBRARY)
    if _no_triton() is None:
        for name in OPERATORS:
            for key in ("CUDA", "XPU") if _load_error["_C_cuda"] else ("XPU",):
                _LIBRARY.impl(name, _triton_body(name), key)


def _body(module: ModuleType, name: str) -> Callable[..., Any]:
    if not name.endswith("_out"):
        return getattr(module, name)
    write = getattr(module, name.removesuffix("_out"))

    # An operator may not return its argument, so these return y or nothing.
    def write_results(*args: Any) -> Tensor | None:
        given, out = args[: -len(Results._fields)], Results(*args[-len(Results._fields) :])
        return next(iter(write(*given, out=out)[2:]), None)

    def write_out(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)

    return write_results if name in _WRITE_RESULTS else write_out


def _triton_body(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        from . import kernels  # imports Triton: not before the first call

        return _body(kernels, name)(*args, **kwargs)

    return call


def _fake_probe_statistics(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor,
    x_prev: Tensor | None,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    least_squares: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    *out: Any,
) -> tuple[Tensor, Tensor] | None:
    checks.check_probe_statistics(
        x, p, p_prev, x_prev, probe_window, newest, entry_sums, low, high, active
    )
    checks.check_workspace(x, workspace)
    return _fake_results(x, p, 5 if x_prev is None else 7, out)


def _fake_alignment_statistics(
    x: Tensor,
    p: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    relative_to_probe: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    *out: Any,
) -> tuple[Tensor, Tensor] | None:
    checks.check_alignment_statistics(x, p, probe_window, newest, entry_sums, low, high, active)
    checks.check_workspace(x, workspace)
    return _fake_results(x, p, 6, out)


def _fake_results(
    x: Tensor, p: Tensor, columns: int, out: tuple[Any, ...]
) -> tuple[Tensor, Tensor] | None:
    batch, dtype = x.shape[0], reference.wide_dtype(x, p)
    made = x.new_empty((batch, columns), dtype=dtype), x.new_empty((batch + 1, 2), dtype=dtype)
    if not out:
        return made
    checks.check_results(*made, Results(*out))
    return None


def _fake_probe_and_combine(
    x: Tensor,
    p: Tensor,
    p_prev: Tensor | None,
    x_prev: Tensor | None,
    probe_window: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    low: float,
    high: float,
    least_squares: bool = False,
    relative_to_probe: bool = False,
    by_sample: bool = False,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
    *out: Any,
) -> tuple[Tensor, ...] | Tensor:
    checks.check_probe_and_combine(x, p, p_prev, x_prev, residual_window)
    rest = (probe_window, newest, entry_sums, low, high)
    if p_prev is None:
        last = (relative_to_probe, active, workspace)
        made = _fake_alignment_statistics(x, p, *rest, *last, *out)
    else:
        last = (least_squares, active, workspace)
        made = _fake_probe_statistics(x, p, p_prev, x_prev, *rest, *last, *out)
    gamma = x.new_empty(x.shape[:1], dtype=reference.wide_dtype(x, p))
    y = _fake_combine_residuals(x, residual_window, newest, gamma, active)
    assert y is not None
    return y if made is None else (*made, y)


def _fake_finish_probe_statistics(sums: Tensor, low: float, high: float) -> Tensor:
    checks.check_finish(sums, low, high, columns=(5, 7))
    return sums.new_empty((sums.shape[0] + 1, 2))


def _fake_finish_alignment_statistics(
    sums: Tensor, low: float, high: float, relative_to_probe: bool = False
) -> Tensor:
    checks.check_finish(sums, low, high, columns=(6,))
    return sums.new_empty((sums.shape[0] + 1, 2))


def _fake_combine_residuals(
    x: Tensor,
    residual_window: Tensor,
    newest: Tensor,
    gamma: Tensor,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    checks.check_combine(x, residual_window, newest, gamma, active, out)
    return x.new_empty(x.shape, dtype=residual_window.dtype) if out is None else None


def _fake_extrapolate_residuals(
    x: Tensor,
    p: Tensor,
    residual_window: Tensor,
    oldest: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    weights: Tensor,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    checks.check_extrapolate(
        x, p, residual_window, oldest, probe_window, newest, weights, active, out
    )
    return x.new_empty(x.shape, dtype=residual_window.dtype) if out is None else None


def _fake_record_residuals(
    x: Tensor,
    p: Tensor,
    y: Tensor,
    residual_window: Tensor,
    probe_window: Tensor,
    newest: Tensor,
    entry_sums: Tensor,
    first: bool,
    active: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    checks.check_record(x, p, y, residual_window, probe_window, newest, entry_sums, active)
    checks.check_workspace(x, workspace)


_WRITE_RESULTS = (
    "probe_statistics_out",
    "alignment_statistics_out",
    "probe_and_combine_out",
)
_FAKES = {name: globals()[f"_fake_{name.removesuffix('_out')}"] for name in OPERATORS}
_LIBRARY = torch.library.Library("dicache", "DEF")
for _schema in SCHEMAS:
    _LIBRARY.define(_schema)
_load_error = {extension: _load(extension) for extension in ("_C", "_C_cuda")}
_register_python_bodies()

_probe_statistics = torch.ops.dicache.probe_statistics.default
_probe_statistics_out = torch.ops.dicache.probe_statistics_out.default
_alignment_statistics = torch.ops.dicache.alignment_statistics.default
_alignment_statistics_out = torch.ops.dicache.alignment_statistics_out.default
_probe_and_combine = torch.ops.dicache.probe_and_combine.default
_probe_and_combine_out = torch.ops.dicache.probe_and_combine_out.default
_finish_probe_statistics = torch.ops.dicache.finish_probe_statistics.default
_finish_alignment_statistics = torch.ops.dicache.finish_alignment_statistics.default
_combine_residuals = torch.ops.dicache.combine_residuals.default
_combine_residuals_out = torch.ops.dicache.combine_residuals_out.default
_extrapolate_residuals = torch.ops.dicache.extrapolate_residuals.default
_extrapolate_residuals_out = torch.ops.dicache.extrapolate_residuals_out.default
_record_residuals = torch.ops.dicache.record_residuals.default
