"""Values that were read from a file, given out by type; everything else is refused with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LARGEST = 1 << 62


class Fields:
    """The fields of an object that was read from JSON.

    Args:
        value: the object.
        where: the file, and the place in it, for errors.

    Raises:
        ValueError: it is no object.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {shown(value)} is not an object")
        self._values: Mapping[str, Any] = value
        self.where = where

    def count(self, name: str) -> int:
        """A whole number of at least 0 that fits in 62 bits."""
        return count(self._values.get(name), f"{self.where}: {name}")

    def optional_count(self, name: str) -> int | None:
        """The same, or null."""
        return None if self._values.get(name) is None else self.count(name)

    def counts(self, name: str) -> list[int]:
        """A list of such numbers."""
        return [count(item, f"{self.where}: {name}") for item in self.items(name)]

    def optional_counts(self, name: str) -> list[int]:
        """The same, or nothing where the name is missing."""
        return [] if self._values.get(name) is None else self.counts(name)

    def text(self, name: str) -> str:
        """A string."""
        value = self._values.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name} {shown(value)} is not a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string, or null."""
        return None if self._values.get(name) is None else self.text(name)

    def items(self, name: str) -> list[Any]:
        """A list."""
        value = self._values.get(name)
        if not isinstance(value, list):
            raise ValueError(f"{self.where}: {name} {shown(value)} is not a list")
        return value

    def object(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}: {name} {shown(value)} is not an object")
        return value


def count(value: Any, where: str) -> int:
    """A whole number of at least 0 that fits in 62 bits.

    Raises:
        ValueError: it is anything else.
    """
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{where} {shown(value)} is not a number of at least 0")
    return value


def shown(value: Any) -> str:
    """A value for an error, cut where it is long."""
    if value is None:
        return "(missing)"
    if type(value) is int and abs(value) >= _LARGEST:
        return "(huge)"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
