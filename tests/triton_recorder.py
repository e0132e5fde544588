"""What a Triton launcher would launch: its arguments, and the source as a launch specializes it."""

from __future__ import annotations

import torch
from triton.compiler import ASTSource

TYPE_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel: keeps the arguments of its one launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *args, **kwargs):
        self.options = {key: kwargs.pop(key) for key in set(kwargs) - set(self.kernel.arg_names)}
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs

    def source(self):
        """The arguments as Triton's launch specializes them: value 1, and multiples of 16."""
        signature, constants, hints = {}, {}, {}
        for position, param in enumerate(self.kernel.params):
            value = self.arguments[param.name]
            constant = param.is_constexpr or value is None
            fixed = constant or param.do_not_specialize or isinstance(value, float)
            if constant or (not fixed and not torch.is_tensor(value) and value == 1):
                signature[param.name] = "constexpr"
                constants[(position,)] = value
                continue
            signature[param.name] = type_name(param, value)
            address = value.data_ptr() if torch.is_tensor(value) else value
            if not fixed and not param.do_not_specialize_on_alignment and address % 16 == 0:
                hints[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, hints)


def type_name(param, value):
    if torch.is_tensor(value):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return param.annotation_type or "fp32"
    return "i64" if value >= 2**31 else "i32"
