"""The layout operators: temporal heads' tokens come to their places and back, bit by bit.

The kernel runs in Triton's interpreter against the reference, in a process of its own (see
`test_triton_interpreter.py`), and is compiled to machine code (see `test_triton_compile.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dicache.sparse_videogen import layout, masks

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def draw(
    batch: int = 2, length: int = 150, heads: int = 3, width: int = 16, dtype: torch.dtype = FP32
) -> tuple[list[Tensor], Tensor]:
    """q, k, v of different strides, and heads of which both kinds are there."""
    generator = torch.Generator().manual_seed(length)
    joined = torch.randn(batch, length, 3 * heads * width, generator=generator).to(dtype)
    q, k, v = (each.unflatten(2, (heads, width)) for each in joined.chunk(3, dim=-1))
    temporal = torch.randint(0, 2, (batch, heads), generator=generator, dtype=torch.uint8)
    temporal[0, :2] = torch.tensor([1, 0])
    return [q, k.contiguous(), v.transpose(1, 2).contiguous().transpose(1, 2)], temporal


def tables(length: int) -> tuple[Tensor, Tensor]:
    """A sink of 6, 8 frames of (length - 6) // 8, and the rest behind."""
    return masks.token_major(6, 8, (length - 6) // 8, length)


def test_the_reference_is_the_formula_and_leaves_spatial_heads_alone():
    (q, k, v), temporal = draw()
    order, _ = tables(150)
    for x, output in zip((q, k, v), layout.permute_qkv(q, k, v, temporal, order), strict=True):
        assert output.is_contiguous()
        for sample, head in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            source = order.long() if temporal[sample, head] else torch.arange(150)
            assert torch.equal(output[sample, :, head], x[sample, source, head])


def test_there_and_back_is_where_it_was():
    (q, k, v), temporal = draw(length=153)
    order, positions = tables(153)
    for x, moved in zip((q, k, v), layout.permute_qkv(q, k, v, temporal, order), strict=True):
        assert not torch.equal(moved, x)
        assert torch.equal(moved[:, :6], x[:, :6])  # the sink
        assert torch.equal(moved[:, -3:], x[:, -3:])  # the text
        assert torch.equal(layout.permute_tokens(moved, temporal, positions), x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["permute_qkv", "permute_tokens"])
def test_opcheck(name, device):
    tensors, temporal = draw(length=30)
    given = tensors if name == "permute_qkv" else tensors[:1]
    operator = getattr(torch.ops.dicache, name).default
    arguments = (*given, temporal, tables(30)[0])
    torch.library.opcheck(operator, tuple(each.to(device) for each in arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("width", [12, 128])
def test_a_gpu_gives_the_references_bits(dtype, width):
    tensors, temporal = draw(length=5000, heads=5, width=width, dtype=dtype)
    moved = [each.cuda() for each in (*tensors, temporal)]
    for order in tables(5000):
        wanted = layout.reference_permute_qkv(*tensors, temporal, order)
        given = layout.permute_qkv(*moved, order.cuda())
        assert all(torch.equal(a.cpu(), b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 150, 48)}, r"\[B, S, H, D\]"),
        ({"x": torch.zeros(2, 150, 16, 3).transpose(2, 3)}, "last stride of 1"),
        ({"temporal": torch.zeros(2, 3)}, "temporal is torch.float32.*uint8"),
        ({"temporal": torch.zeros(3, 2, dtype=torch.uint8)}, r"temporal .*Expected .*\[2, 3\]"),
        ({"order": torch.arange(150)}, "order is torch.int64.*int32"),
        ({"order": torch.zeros(300, dtype=torch.int32)[::2]}, "order is not contiguous"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(change, message):
    (x, *_), temporal = draw()
    given = {"x": x, "temporal": temporal, "order": tables(150)[0], **change}
    with pytest.raises(ValueError, match=message):
        layout.permute_tokens(**given)
    if "x" not in change:
        with pytest.raises(ValueError, match=message):
            layout.permute_qkv(x, x, x, given["temporal"], given["order"])


def test_keys_of_another_shape_are_refused():
    (q, k, v), temporal = draw()
    for wrong in (k[:, 1:], k.double()):
        with pytest.raises(ValueError, match="k is .* Expected what q is"):
            layout.permute_qkv(q, wrong, v, temporal, tables(150)[0])


def test_the_kernel_in_the_interpreter():
    if find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    numpy = tuple(int(part) for part in version("numpy").split(".")[:2])
    if version("triton").startswith("3.6.") and numpy >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    checks = subprocess.run(
        [*command, "-o", "python_functions=check_*", Path(__file__).name],
        cwd=Path(__file__).parent,  # not the root, from where a top-level `kernels` would be found
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checks.returncode == 0, checks.stdout + checks.stderr


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("width", [12, 16, 64])
@pytest.mark.parametrize("length", [14, 64, 150])
def check_the_kernel_is_the_reference(dtype, width, length):
    from dicache.kernels import layout as kernel

    tensors, temporal = draw(length=length, width=width, dtype=dtype)
    for order in tables(length):
        wanted = layout.reference_permute_qkv(*tensors, temporal, order)
        moved = kernel.permute_qkv(*tensors, temporal, order)
        for x, output, expected in zip(tensors, moved, wanted, strict=True):
            assert output.is_contiguous()
            assert torch.equal(output, expected)
            assert torch.equal(kernel.permute_tokens(x, temporal, order), expected)


def check_nothing_to_do():
    from dicache.kernels import layout as kernel

    x = torch.zeros(0, 14, 3, 16)
    empty = torch.zeros(0, 3, dtype=torch.uint8)
    assert kernel.permute_tokens(x, empty, tables(14)[0]).shape == x.shape


def compiled(name: str, capability: int, folder: Path, width: int = 128):
    """What the Triton compiler makes of a launch on HunyuanVideo's tokens, and its accesses."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from triton.runtime.jit import JITFunction

    from dicache.kernels import layout as kernel

    if not isinstance(kernel._permute_kernel, JITFunction):
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    from test_triton_compile import TOOLS, Compiled, Recorder

    if not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")):
        pytest.skip("this Triton carries no compiler for NVIDIA")
    recorder = Recorder(kernel._permute_kernel)
    tensors, temporal = draw(length=150, heads=24, width=width, dtype=BF16)
    given = tensors if name == "permute_qkv" else tensors[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.setattr(kernel, "_permute_kernel", recorder)
        getattr(kernel, name)(*given, temporal, tables(150)[0])
        return Compiled(recorder, capability, folder)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "tensors"), [("permute_qkv", 3), ("permute_tokens", 1)])
def test_tokens_are_copied_16_bytes_at_a_time_without_spills(tmp_path, name, tensors, capability):
    """64 tokens of 128 bf16 by 128 threads are 8 vectors a thread and tensor."""
    kernel = compiled(name, capability, tmp_path)
    for instruction in ("ld", "st"):
        wide = rf"\b{instruction}\.global\S*\.(?:v4\.b32|v2\.b64) "
        assert len(re.findall(wide, kernel.ptx)) == 8 * tensors, instruction
    assert len(re.findall(r"\bLDG\.E\.\S*128\b", kernel.sass)) == 8 * tensors
    assert (kernel.stack, kernel.local) == (0, 0)
    assert not re.search(r"\b(STL|LDL)\b", kernel.sass)
    assert kernel.registers <= 128  # four programs of 128 threads on a multiprocessor at least
