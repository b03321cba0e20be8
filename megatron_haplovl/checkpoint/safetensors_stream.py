"""A safetensors file that is written tensor by tensor, without knowing which ones will follow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType

import torch

# Where the values begin. The header in front of them names every tensor, so it can only be written at the end; the
# format allows spaces behind it. About a thousand entries fit.
_DATA_START = 128 * 1024
_HEADER_START = 8  # the header's length, as a little-endian integer
_METADATA = '{"__metadata__":{"format":"pt"}'

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


class SafetensorsFile:
    """One file, to be used in a `with` statement: complete and on the disk when that ends without an exception.

    Args:
        path: replaced where it exists.
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
        """Whether the header has room for one entry more, and the tensor would begin at a multiple of its elements'
        size, without which it could not be mapped into memory."""
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
        """The header with one entry more, as ASCII and without its closing brace."""
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
