"""Files of prompts: one a line, as plain text or as a JSON object."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, one_line

_JSON = re.compile(r'\{\s*"')  # how a line of JSON begins, and no prompt that we know of
_FIELDS = ("prompt", "seed", "name")
_LARGEST_SEED = 2**32 - 1
# A name is that of a file on any system; a leading dot is that of a file still being written.
_BAD_NAME = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]|^\.|^\s*$')
_LONGEST_NAME = 200  # bytes; file systems allow 255, and a suffix and a prefix come on top


@dataclass(frozen=True)
class Job:
    """A picture to draw.

    Attributes:
        name: Of its files, without a suffix.
    """

    prompt: str
    seed: int
    name: str


@dataclass(frozen=True)
class _Line:
    number: int
    prompt: str
    seed: int | None = None
    name: str | None = None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, but for empty ones and those that begin with `#`.

    Raises:
        InputError: It cannot be read, or there are none.
    """
    return [line.prompt for line in _read(path)]


def read_jobs(path: Path, seed: int) -> list[Job]:
    """The pictures that a file asks for, each with a seed and a name of its own.

    A line without a seed gets `seed`, and where its prompt stood there before, the next one. So
    neither depends on the other prompts, and lines may come and go. A line without a name gets the
    first words of its prompt and a hash of prompt and seed.

    Raises:
        InputError: The file cannot be read, there is nothing in it, or two names are the same.
    """
    seen: Counter[str] = Counter()
    lines_of: dict[str, int] = {}
    jobs = []
    for line in _read(path):
        own = line.seed
        if own is None:
            own = seed + seen[line.prompt]
            seen[line.prompt] += 1
        name = line.name or _make_name(line.prompt, own)
        # Some file systems take names for one that differ in case only.
        first = lines_of.setdefault(name.casefold(), line.number)
        if first != line.number:
            raise InputError(
                f"--prompts {path}: lines {first} and {line.number} both make {name!r}; give one "
                f"of them another name or seed"
            )
        jobs.append(Job(line.prompt, own, name))
    return jobs


def _read(path: Path) -> list[_Line]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read: {one_line(error)}") from error
    numbered = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    lines = [_parse(path, *each) for each in numbered if each[1] and not each[1].startswith("#")]
    if not lines:
        raise InputError(f"--prompts {path} is empty; expected a prompt a line")
    return lines


def _parse(path: Path, number: int, text: str) -> _Line:
    if not _JSON.match(text):
        return _Line(number, text)
    try:
        fields = json.loads(text)
        _check(fields)
    except ValueError as error:  # json's own errors are, too
        reason = one_line(error)
        raise InputError(f"--prompts {path}, line {number}: {reason}") from error
    return _Line(number, **{**fields, "prompt": fields["prompt"].strip()})


def _check(fields: dict[str, Any]) -> None:
    unknown = [key for key in fields if key not in _FIELDS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; expected {', '.join(_FIELDS)}")
    prompt, seed, name = map(fields.get, _FIELDS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt is {prompt!r}; expected a text")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= _LARGEST_SEED):
        raise ValueError(f"seed is {seed!r}; expected an integer from 0 to {_LARGEST_SEED}")
    if name is None:
        return
    if not isinstance(name, str) or _BAD_NAME.search(name) or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"name is {name!r}; expected a file's name without a suffix: up to {_LONGEST_NAME} "
            f'bytes, no slash, none of \\:*?"<>|, no dot at its start'
        )


def _make_name(prompt: str, seed: int) -> str:
    words = re.sub("[^a-z0-9]+", "-", prompt.lower())[:40].strip("-")
    digest = hashlib.sha256(json.dumps([prompt, seed]).encode()).hexdigest()[:8]
    return f"{words}-{digest}".strip("-")
