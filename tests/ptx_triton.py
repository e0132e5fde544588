"""The operators of kernels/triton by the PTX that Triton makes of them, executed by
tests/ptx_machine.

The launchers are the real ones, with `OnMachine` in a kernel's place: it compiles what would be
launched, as it would be specialized, and runs it on the launcher's own tensors.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import ptx_machine
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ir, make_backend
from triton_recorder import Recorder

from dicache.kernels import alignment, combine, extrapolate, launch, layout, probe, record

fused = importlib.import_module("dicache.kernels.probe_and_combine")  # the function has its name

# Every kernel, and the arguments that it may write.
KERNELS = {
    (probe, "_probe_kernel"): {"p_prev", "x_prev", "workspace", "sums", "result", "mailbox"},
    (probe, "_finish_probe_kernel"): {"result", "mailbox"},
    (alignment, "_alignment_kernel"): {"workspace", "sums", "result", "mailbox"},
    (alignment, "_finish_alignment_kernel"): {"result", "mailbox"},
    (fused, "_probe_and_combine_kernel"): {
        "p_prev", "x_prev", "workspace", "sums", "result", "mailbox", "y",
    },
    (combine, "_combine_kernel"): {"y"},
    (extrapolate, "_extrapolate_kernel"): {"y"},
    (record, "_record_kernel"): {
        "residual_window", "probe_window", "newest", "entry_sums", "workspace",
    },
    (layout, "_permute_kernel"): {"y0", "y1", "y2"},
}  # fmt: skip
_COMPILED: dict[tuple, tuple[str, int]] = {}


@dataclass(frozen=True)
class Settings:
    capability: int
    seed: int
    resident: int = 4
    weak: bool = True
    change: Callable[[str], str] = str  # for mutants
    watch: Callable[[ptx_machine.Memory], None] | None = None


class OnMachine(Recorder):
    """Stands in for a kernel, and runs it."""

    def __init__(self, kernel, writes: set[str], settings: Settings) -> None:
        super().__init__(kernel)
        self.writes, self.settings = writes, settings

    def launch(self, *args, **kwargs):
        super().launch(*args, **kwargs)
        source, settings = self.source(), self.settings
        text, shared = compiled(source, self.options, settings.capability)
        program = ptx_machine.parse(settings.change(text), "", shared)
        memory, given = ptx_machine.Memory(), []
        for name, kind in source.signature.items():
            value = self.arguments[name]
            if kind == "constexpr":
                continue
            if torch.is_tensor(value):
                value = memory.pointer(value, name in self.writes, name)
            given.append(value)
        # Behind the arguments are pointers to scratch memory, which these kernels do not have.
        given += [0] * (len(program.parameters) - len(given))
        options = {"resident": settings.resident, "weak": settings.weak, "watch": settings.watch}
        if self.options.get("launch_cooperative_grid"):
            options["resident"] = self.grid[0]  # its promise
        threads = 32 * self.options["num_warps"]
        ptx_machine.launch(program, memory, given, self.grid, threads, settings.seed, **options)
        memory.copy_back()


def compiled(source, options: dict, capability: int) -> tuple[str, int]:
    """(PTX, bytes of shared memory): Triton's own stages, without the last one, ptxas."""
    key = (source.hash(), capability, *sorted(options.items()))
    if key not in _COMPILED:
        target = GPUTarget("cuda", capability, 32)
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(parsed)
        module = source.make_ir(target, parsed, functions, backend.get_module_map(), context)
        stages: dict = {}
        metadata: dict = {}
        backend.add_stages(stages, parsed, source.language)
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            module = stages[stage](module, metadata)
        _COMPILED[key] = str(module), metadata["shared"]
    return _COMPILED[key]


@contextlib.contextmanager
def on_machine(settings: Settings, programs: int = 6) -> Iterator[None]:
    """`dicache.kernels` runs on the machine, with no more than so many programs that add up."""
    with contextlib.ExitStack() as stack:
        for (module, name), writes in KERNELS.items():
            kernel = OnMachine(getattr(module, name), writes, settings)
            stack.enter_context(mock.patch.object(module, name, kernel))
        most = mock.Mock(return_value=programs)
        stack.enter_context(mock.patch.object(launch, "max_programs", most))
        stack.enter_context(mock.patch.object(launch, "_known", {}))
        has = mock.Mock(return_value=True)
        stack.enter_context(mock.patch.object(launch, "has_cooperative_launch", has))
        yield
