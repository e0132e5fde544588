"""A machine that executes PTX, the code that nvcc and Triton really produce, on a CPU.

    program = parse(text, "record_kernel.*half")     # one kernel of a PTX file
    memory = Memory()
    x = memory.pointer(tensor)                       # a tensor for the kernel, readable
    y = memory.pointer(out, writes=True)
    launch(program, memory, [x, y, 17], grid=(4,), threads=256, seed=0)
    memory.copy_back()                               # what was written, into the tensors

A launch raises a `Fault` for what a GPU would let pass: a data race, an access outside of the
tensors or at an address of the wrong alignment, a barrier that not all threads reach. Threads of a
warp, warps and blocks interleave at random, and memory is weak: see scheduler.py and memory.py.
What this shows, and what it cannot, is in docs/design/ptx_machine.md.
"""

from .faults import (
    BadAccess,
    Deadlock,
    Fault,
    Misaligned,
    Race,
    Unsupported,
)
from .memory import Memory
from .parser import Program, kernels, parse
from .scheduler import Launch, launch

__all__ = [
    "BadAccess",
    "Deadlock",
    "Fault",
    "Launch",
    "Memory",
    "Misaligned",
    "Program",
    "Race",
    "Unsupported",
    "kernels",
    "launch",
    "parse",
]
