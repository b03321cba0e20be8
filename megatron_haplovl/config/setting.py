"""How a field of a configuration is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any, TypeVar

_T = TypeVar("_T")


def setting(default: _T, help: str, *, choices: tuple[Any, ...] | None = None, metavar: str | None = None) -> _T:
    """Declare one field: its default, its documentation, and (optionally) the values it may take."""
    metadata = {"help": help, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)
