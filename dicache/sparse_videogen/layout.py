"""Bringing the tokens of some heads into another order: the operators `dicache::permute_*`.

    q, k, v = permute_qkv(q, k, v, temporal, order)       # temporal heads: token-major
    x = permute_tokens(x, temporal, positions)            # and back, with the inverse

    out[b, s, h] = x[b, order[s], h]    where temporal[b, h], else x[b, s, h]

One launch each; results are new, contiguous and stay on the device. Schemas are defined here, once;
`reference_*` below run on every device, `dicache.kernels.layout` where Triton does. No operator
takes part in autograd. The order is a table, not a rule, so that another grouping of tokens
(Sparse VideoGen 2 clusters them) needs no other operator, only a table a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import backend_status

SCHEMAS = (
    "permute_qkv(Tensor q, Tensor k, Tensor v, Tensor temporal, Tensor order) "
    "-> (Tensor, Tensor, Tensor)",
    "permute_tokens(Tensor x, Tensor temporal, Tensor order) -> Tensor",
)


def permute_qkv(
    q: Tensor, k: Tensor, v: Tensor, temporal: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`permute_tokens` of queries, keys and values in one launch.

    Memory passes: reads and writes each once, 6. Arguments and errors: `permute_tokens`; all three
    have one shape, dtype and device.
    """
    return _permute_qkv(q, k, v, temporal, order)


def permute_tokens(x: Tensor, temporal: Tensor, order: Tensor) -> Tensor:
    """out[b, s, h] = x[b, order[s], h] for temporal heads, x[b, s, h] for the others.

    Memory passes: reads x and writes the output, 2.

    Args:
        x: [B, S, H, D] tokens of any floating dtype; the elements of a head are contiguous.
        temporal: uint8 [B, H], 1 for the heads whose tokens change their places.
        order: int32 [S], the token that comes to each position. Values are not checked.

    Returns:
        [B, S, H, D], contiguous.

    Raises:
        ValueError: A shape, dtype, device or layout is not as above.
    """
    return _permute_tokens(x, temporal, order)


def reference_permute_qkv(
    q: Tensor, k: Tensor, v: Tensor, temporal: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The body of `permute_qkv` in plain PyTorch."""
    check_qkv(q, k, v, temporal, order)
    first, second, third = (_permuted(each, temporal, order) for each in (q, k, v))
    return first, second, third


def reference_permute_tokens(x: Tensor, temporal: Tensor, order: Tensor) -> Tensor:
    """The body of `permute_tokens` in plain PyTorch."""
    check_tokens(x, temporal, order)
    return _permuted(x, temporal, order)


def _permuted(x: Tensor, temporal: Tensor, order: Tensor) -> Tensor:
    moves = temporal.bool()[:, None, :, None]
    return torch.where(moves, x.index_select(1, order), x).contiguous()


def check_qkv(q: Tensor, k: Tensor, v: Tensor, temporal: Tensor, order: Tensor) -> None:
    """Arguments of `permute_qkv`."""
    check_tokens(q, temporal, order)
    for name, each in (("k", k), ("v", v)):
        if each.shape != q.shape or each.dtype != q.dtype or each.device != q.device:
            raise ValueError(
                f"{name} is {each.dtype} {list(each.shape)} on {each.device}. Expected what q is: "
                f"{q.dtype} {list(q.shape)} on {q.device}."
            )
        _check_heads(name, each)


def check_tokens(x: Tensor, temporal: Tensor, order: Tensor) -> None:
    """Arguments of `permute_tokens`."""
    if x.ndim != 4:
        raise ValueError(f"The tokens have shape {list(x.shape)}. Expected [B, S, H, D].")
    _check_heads("x", x)
    heads, tokens = [x.shape[0], x.shape[2]], [x.shape[1]]
    for name, given, shape, dtype in (
        ("temporal", temporal, heads, torch.uint8),
        ("order", order, tokens, torch.int32),
    ):
        if list(given.shape) != shape or given.dtype != dtype or given.device != x.device:
            raise ValueError(
                f"{name} is {given.dtype} {list(given.shape)} on {given.device}. Expected {dtype} "
                f"{shape} on {x.device}, for tokens {list(x.shape)} = [B, S, H, D]."
            )
        if not given.is_contiguous():
            raise ValueError(f"{name} is not contiguous. Call .contiguous().")


def _check_heads(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {list(x.stride())}. Expected the elements of a head to be "
            f"contiguous, a last stride of 1. Call .contiguous()."
        )


def _fake_permute_qkv(
    q: Tensor, k: Tensor, v: Tensor, temporal: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_qkv(q, k, v, temporal, order)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_permute_tokens(x: Tensor, temporal: Tensor, order: Tensor) -> Tensor:
    check_tokens(x, temporal, order)
    return x.new_empty(x.shape)


def _triton_permute_qkv(*args: Any) -> Any:
    from ..kernels.layout import permute_qkv  # imports Triton: not before the first call

    return permute_qkv(*args)


def _triton_permute_tokens(*args: Any) -> Any:
    from ..kernels.layout import permute_tokens

    return permute_tokens(*args)


_BODIES: dict[str, tuple[Any, Any, Any]] = {
    "permute_qkv": (reference_permute_qkv, _fake_permute_qkv, _triton_permute_qkv),
    "permute_tokens": (reference_permute_tokens, _fake_permute_tokens, _triton_permute_tokens),
}
_LIBRARY = torch.library.Library("dicache", "FRAGMENT")
for _schema in SCHEMAS:
    _LIBRARY.define(_schema)
for _name, (_reference, _fake, _triton) in _BODIES.items():
    _LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dicache::{_name}", _fake, lib=_LIBRARY)
    if backend_status()["triton"] == "available":
        for _key in ("CUDA", "XPU"):
            _LIBRARY.impl(_name, _triton, _key)

_permute_qkv = torch.ops.dicache.permute_qkv.default
_permute_tokens = torch.ops.dicache.permute_tokens.default
