"""What a manifest says, checked before anything is read by it: names, types, places and sizes."""

from __future__ import annotations

import re
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint.names import plain_name
from megatron_haplovl.checkpoint.typed import Fields, count, shown

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SHA256 = re.compile("[0-9a-f]{64}")
_PIECE = {"name", "kind", "dim", "part", "parts", "start", "length"}


def checked_manifest(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The manifest that was given, if all of it can be true.

    Args:
        manifest: what was read.
        path: its file, for errors.

    Raises:
        ValueError: a name that leads elsewhere, a wrong type, a negative or huge number, or pieces that overlap or do
            not lie in their parameter.
    """
    fields = Fields(manifest, str(path))
    if fields.text("dtype") not in _DTYPES:
        raise ValueError(f"{path}: dtype {shown(manifest['dtype'])} is not one of {', '.join(_DTYPES)}")
    fields.optional_text("run_id")
    shapes = {
        name: tuple(Fields({"shape": shape}, f"{path}: {name}").counts("shape"))
        for name, shape in fields.object("parameters").items()
    }
    for name, shape in shapes.items():
        count(prod(shape), f"{path}: number of elements of {name}")
    places: dict[tuple[str, str, int], list[tuple[int, int]]] = defaultdict(list)
    splits: dict[tuple[str, str], tuple[int | None, int]] = {}
    files: set[str] = set()
    for entry in fields.items("files"):
        record = Fields(entry, f"{path}: files")
        name = plain_name(record.text("file"), str(path))
        if name in files:
            raise ValueError(f"{path}: the file {name} is named twice")
        files.add(name)
        record.count("bytes")
        if not _SHA256.fullmatch(record.text("sha256")):
            raise ValueError(f"{path}: {name}: {shown(entry['sha256'])} is not a SHA-256")
        for piece in record.items("pieces"):
            _check_piece(Fields(piece, f"{path}: {name}: a piece"), piece, shapes, splits)
            places[piece["name"], piece["kind"], piece["part"]].append((piece["start"], piece["length"]))
    for (name, kind, _), stretches in places.items():
        end = 0
        for start, length in sorted(stretches):
            if start < end:
                raise ValueError(f"{path}: two pieces hold element {start} of the {kind} of {name}")
            end = start + length
    return manifest


def _check_piece(
    fields: Fields,
    piece: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    splits: dict[tuple[str, str], tuple[int | None, int]],
) -> None:
    if set(piece) != _PIECE:
        raise ValueError(f"{fields.where} has the fields {shown(sorted(piece))} instead of {sorted(_PIECE)}")
    name, kind, dim = fields.text("name"), fields.text("kind"), fields.optional_count("dim")
    part, parts = fields.count("part"), fields.count("parts")
    where = f"{fields.where} of the {shown(kind)} of {shown(name)}"
    if name not in shapes:
        raise ValueError(f"{where}: there is no such parameter")
    shape = shapes[name]
    if dim is None and (part, parts) != (0, 1):
        raise ValueError(f"{where} is part {part} of {parts}, but the parameter is not divided")
    if dim is not None and (dim >= len(shape) or not part < parts or shape[dim] % parts):
        raise ValueError(f"{where} is part {part} of {parts} along dimension {dim} of the shape {list(shape)}")
    if splits.setdefault((name, kind), (dim, parts)) != (dim, parts):
        raise ValueError(f"{where}: other pieces of it divide the parameter in another way")
    if fields.count("start") + fields.count("length") > prod(shape) // parts:
        raise ValueError(f"{where} ends behind the parameter's last element")
