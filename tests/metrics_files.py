"""What a run has logged, for every test that reads a metrics file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of values, training and held out; what a file says of each start is left out."""
    return [line for line in every_line(path) if "start" not in line]


def starts(path: Path) -> list[dict[str, Any]]:
    """The lines of starts."""
    return [line for line in every_line(path) if "start" in line]


def every_line(path: Path) -> list[dict[str, Any]]:
    """All lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
