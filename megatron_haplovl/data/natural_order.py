"""The order in which people number files: `2.jpg` comes before `10.jpg`."""

from __future__ import annotations

import re
from pathlib import PurePath

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str | PurePath) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key of a name: its digits compare as numbers, a folder's name before what is in it.

    Names that differ only in leading zeros are ordered by their characters, so that no two names are equal.
    """
    text = PurePath(name).as_posix()
    parts = _DIGITS.split(text.replace("/", "\0"))
    return tuple((1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)), text
