"""Names that stand in files: each must be that of a file beside the one that names it."""

from __future__ import annotations

from typing import Any

from megatron_haplovl.checkpoint.typed import shown

_MAX_BYTES = 255


def plain_name(name: Any, where: str) -> str:
    """A name, if it can only be that of a file or folder beside the one that holds it.

    Args:
        name: what was read.
        where: what holds it, for the error.

    Raises:
        ValueError: it is no text, is empty or too long, leads into another folder, or holds a character that a name
            cannot have.
    """
    is_name = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\")
    # What is no text on its own cannot be encoded; it is not printable either.
    if is_name and name.isprintable() and len(name.encode()) <= _MAX_BYTES:
        return str(name)
    raise ValueError(f"{where}: {shown(name)} is not a plain name of something beside it")
