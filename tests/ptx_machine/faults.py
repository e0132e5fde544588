"""What a launch is stopped for."""


class Fault(Exception):  # noqa: N818 -- the kernel's, not the program's
    """Something that no correct kernel does."""


class Race(Fault):
    """Two accesses to one byte, one of them a write, and nothing orders them."""


class BadAccess(Fault):
    """A byte that belongs to no tensor of the launch, or to one that it may not write."""


class Misaligned(Fault):
    """An access of n bytes at an address that is no multiple of n."""


class Deadlock(Fault):
    """Threads that wait for others which will never come."""


class Unsupported(Fault):
    """An instruction that the machine does not know. Nothing is guessed: add it to opcodes.py."""
