"""Fonts for what people write: a prompt may be in any script, and matplotlib's own font has few."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font

_LAST_RESORT = "lastresort"  # fonts that have boxes for every character
_WEIGHTS = {False: 400, True: 700}


@lru_cache
def lettering(text: str, bold: bool = False) -> tuple[str, Path]:
    """A text as it can be drawn here, and the file of the font for it.

    That is DejaVu Sans, which comes with matplotlib, unless an installed font has more of the
    text's characters. Those that the font lacks become "?".
    """
    codes = {ord(character) for character in text if not character.isspace()} | {ord("?")}
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    lacking = _lacking(path, codes)
    if lacking:
        others = [
            (abs(int(each.weight) - _WEIGHTS[bold]), each.fname)  # of these files, a number
            for each in fontManager.ttflist
            if each.style == "normal"
            and not each.name.replace(" ", "").strip(".").lower().startswith(_LAST_RESORT)
        ]
        for _, other in sorted(others):
            left = _lacking(Path(other), codes)
            if ord("?") not in left and len(left) < len(lacking):
                path, lacking = Path(other), left
    return text.translate(dict.fromkeys(lacking, "?")), path


def _lacking(path: Path, codes: set[int]) -> set[int]:
    try:
        font = FT2Font(str(path))
    except (OSError, RuntimeError):  # it is gone, or broken
        return codes
    return {code for code in codes if not font.get_char_index(code)}
