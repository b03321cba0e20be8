"""Bounds that many settings share."""

from __future__ import annotations

from typing import Any


def check_at_least_1(section: Any, *names: str) -> None:
    """Check settings of a section; one that is None is not given.

    Raises:
        ValueError: one of them is less than 1.
    """
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
