"""Safetensors files in a stream: written tensor by tensor, without knowing which ones will follow, and read in parts.

The safetensors library maps files into memory, and what was read from them stays there until they are closed. Here no
more is held than what was asked for.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_haplovl.checkpoint.typed import Fields, shown

# Where the values begin. The header in front of them names every tensor, so it can only be written at the end; the
# format allows spaces behind it. About a thousand entries fit.
_DATA_START = 128 * 1024
_HEADER_START = 8  # the header's length, as a little-endian integer
_METADATA_KEY = "__metadata__"
_METADATA = f'{{"{_METADATA_KEY}":{{"format":"pt"}}'

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _TYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file."""

    path: Path
    dtype: torch.dtype
    start: int
    """First byte."""
    count: int
    """Elements."""

    def read(self, first: int, end: int) -> torch.Tensor:
        """Elements `first` to `end` of the flattened tensor.

        Raises:
            ValueError: the file ends before them.
        """
        assert 0 <= first <= end <= self.count
        values = torch.empty(end - first, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + first * values.element_size())
            left = values.view(torch.uint8).numpy().data
            while left and (read := file.readinto(left)):
                left = left[read:]
        if left:
            raise ValueError(f"{self.path}: ends {len(left)} bytes before the tensor that its header names")
        return values


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: it is no safetensors file, or its header says something that cannot be.
    """
    entries, data_start = _read_entries(path)
    end = path.stat().st_size
    found = {}
    for name, entry in entries.items():
        if name != _METADATA_KEY:
            found[name] = _stored(path, name, Fields(entry, f"{path}: {shown(name)}"), data_start, end)
    last = data_start
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].count)):
        if tensor.start < last:
            raise ValueError(f"{path}: broken safetensors file ({shown(name)} overlaps the tensor before it)")
        last = tensor.start + tensor.count * tensor.dtype.itemsize
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The words that the header of a file holds beside its tensors; empty if there are none.

    Raises:
        ValueError: it is no safetensors file.
    """
    metadata = _read_entries(path)[0].get(_METADATA_KEY, {})
    fields = Fields(metadata, f"{path}: {_METADATA_KEY}")
    return {name: fields.text(name) for name in metadata}


def _read_entries(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the values begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_START), "little")
        # The format's own limit; anything longer is another kind of file.
        text = file.read(length) if length <= 100_000_000 else b""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken safetensors file ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: broken safetensors file (its header is no object)")
    return entries, _HEADER_START + length


def _stored(path: Path, name: str, fields: Fields, data_start: int, end: int) -> StoredTensor:
    try:
        dtype = _TYPES.get(fields.text("dtype"))
        shape, offsets = fields.counts("shape"), fields.counts("data_offsets")
    except ValueError as error:
        raise ValueError(f"{path}: broken safetensors file ({error})") from error
    if dtype is None:
        raise ValueError(f"{path}: broken safetensors file ({shown(name)} has the type {shown(fields.text('dtype'))})")
    number = prod(shape)
    if len(offsets) != 2 or offsets[1] - offsets[0] != number * dtype.itemsize:
        raise ValueError(
            f"{path}: broken safetensors file ({shown(name)} of the shape {shown(shape)} lies at {shown(offsets)})"
        )
    if data_start + offsets[1] > end:
        raise ValueError(f"{path}: ends {data_start + offsets[1] - end} bytes before the tensor that its header names")
    return StoredTensor(path, dtype, data_start + offsets[0], number)


class SafetensorsFile:
    """One file, to be used in a `with` statement: complete and on the disk when that ends without an exception.

    Args:
        path: replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.size = 0
        """Bytes of all tensors so far."""
        self._header = _METADATA
        self._file = path.open("wb")
        self._file.seek(_DATA_START)

    def has_room_for(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header has room for one more entry, and the tensor would begin at a multiple of its elements'
        size (otherwise it could not be mapped into memory)."""
        aligned = self.size % tensor.element_size() == 0
        return aligned and len(self._with(name, tensor)) < _DATA_START - _HEADER_START

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor.

        Raises:
            ValueError: a number format that cannot be written.
        """
        assert self.has_room_for(name, tensor)
        self._header = self._with(name, tensor)
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.names.append(name)
        self.size += tensor.nbytes

    def _with(self, name: str, tensor: torch.Tensor) -> str:
        """The header with one more entry, as ASCII and without its closing brace."""
        if tensor.dtype not in _TYPE_NAMES:
            raise ValueError(f"{self.path}: {name} has the number format {tensor.dtype}, which cannot be written")
        entry = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }
        return f"{self._header},{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}"

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            length = _DATA_START - _HEADER_START
            self._file.seek(0)
            self._file.write(length.to_bytes(_HEADER_START, "little") + (self._header + "}").encode().ljust(length))
            self._file.flush()
            os.fsync(self._file.fileno())
