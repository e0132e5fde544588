"""PTX text into a `Program`: instructions with their operands, labels, parameters, shared memory.

It knows the two dialects that are executed here, nvcc's and LLVM's (Triton). Nothing is
interpreted: what an instruction means is in opcodes.py and control.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .faults import Unsupported

WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16}
WIDTHS |= {"b32": 32, "u32": 32, "s32": 32, "f32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}
# Registers that are there without a declaration.
SPECIAL = {f"%{name}.{axis}": 32 for name in ("tid", "ctaid", "nctaid", "ntid") for axis in "xyz"}


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`; an operand is a register, a number, a name, [address] or {list}."""

    opcode: tuple[str, ...]  # split at the dots
    operands: tuple[str, ...]
    guard: str | None  # the predicate's register
    guard_is_negated: bool
    text: str


@dataclass(frozen=True)
class Parameter:
    offset: int
    size: int


@dataclass(eq=False)
class Program:
    """One kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # prefix or name -> width in bits
    parameters: dict[str, Parameter] = field(default_factory=dict)
    parameter_bytes: int = 0
    shared: dict[str, int] = field(default_factory=dict)  # name -> offset
    shared_bytes: int = 0

    def width_of(self, register: str) -> int:
        """Bits of a register: `%r<9>` declares %r0 to %r8 by their prefix."""
        if register in SPECIAL:
            return SPECIAL[register]
        if register in self.registers:
            return self.registers[register]
        try:
            return self.registers[register.rstrip("0123456789")]
        except KeyError:
            raise Unsupported(f"register {register} has no declaration") from None


_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+(\S+?)\s*\(")


def kernels(text: str) -> list[str]:
    """The names of all kernels in a PTX file."""
    return _ENTRY.findall(text)


def parse(text: str, name: str = "", dynamic_shared_bytes: int = 0) -> Program:
    """The one kernel of a PTX file whose name the regular expression `name` finds.

    `dynamic_shared_bytes` is the room of an `.extern .shared` array, which a launch chooses.
    """
    found = list(_ENTRY.finditer(text))
    chosen = [index for index, match in enumerate(found) if re.search(name, match[1])]
    if len(chosen) != 1:
        raise ValueError(
            f"{len(chosen)} kernels match {name!r}. Expected one of {', '.join(kernels(text))}."
        )
    (index,) = chosen
    program = Program(found[index][1])
    # Shared memory is declared in front of all kernels.
    _read_shared(program, _without_comments(text[: found[0].start()]), dynamic_shared_bytes)
    next_one = found[index + 1].start() if index + 1 < len(found) else len(text)
    body = _without_comments(text[found[index].end() : next_one])
    start = body.index("{")
    _read_parameters(program, body[:start])
    _read_body(program, body[start : _closing(body, start)])
    return program


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("the kernel's last brace is missing")


def _read_shared(program: Program, text: str, dynamic: int) -> None:
    pattern = r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?;"
    for extern, align, kind, name, count in re.findall(pattern, text):
        offset = _aligned(program.shared_bytes, int(align))
        size = dynamic if extern else WIDTHS[kind] // 8 * int(count or 1)
        program.shared[name] = offset
        program.shared_bytes = offset + size


def _read_parameters(program: Program, text: str) -> None:
    for declaration in text.split(")")[0].split(","):
        if not declaration.strip():
            continue
        match = re.fullmatch(
            r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr\b.*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*",
            declaration,
            re.S,
        )
        if match is None:
            raise Unsupported(f"parameter {declaration.strip()!r}")
        align, kind, name, count = match.groups()
        width = WIDTHS[kind] // 8
        offset = _aligned(program.parameter_bytes, int(align or width))
        program.parameters[name] = Parameter(offset, width * int(count or 1))
        program.parameter_bytes = offset + program.parameters[name].size


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


def _read_body(program: Program, text: str) -> None:
    # Lines of the debugger and of the loop unroller end without a semicolon, or say nothing here.
    text = re.sub(r"(?m)^\s*\.(loc|file|section|pragma)\b.*$", "", text)
    for statement in text.split(";"):
        statement = " ".join(statement.split())
        # Braces around inline assembly, in front of labels and behind them.
        statement = re.sub(r"^([{}] ?)+", "", statement)
        while label := re.match(r"([$\w]+):(?!:) ?", statement):
            program.labels[label[1]] = len(program.instructions)
            statement = statement[label.end() :]
        statement = re.sub(r"^([{}] ?)+", "", statement)
        if statement.startswith(".reg"):
            _declare(program, statement)
        elif statement.startswith("."):
            raise Unsupported(f"directive {statement!r}")
        elif statement:
            program.instructions.append(_instruction(statement))


def _declare(program: Program, statement: str) -> None:
    _, kind, *names = re.split(r"[ ,]+", statement)
    for name in names:
        program.registers[re.sub(r"<\d+>$", "", name)] = WIDTHS[kind.lstrip(".")]


def _instruction(text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+) )?(\S+)(?: (.*))?", text)
    assert match is not None, text
    negated, guard, opcode, operands = match.groups()
    # Commas inside of braces and brackets belong to one operand.
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands or "")
    # `shared::cta` is the block's own shared memory, as plain `shared` is.
    steps = tuple(step for step in opcode.replace("::cta", "").split("."))
    return Instruction(steps, tuple(part.strip() for part in parts), guard, bool(negated), text)
