"""Read the arrays of a prefix, `.npy` files that numpy.save wrote.

The header is compared and not evaluated as numpy.load does it: there, a single changed bit of it ends in any of half a
dozen exceptions.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data.steady_file import SteadyFile

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': False, 'shape': \((\d{1,18}),(?: (\d{1,18}))?\), \} *\n")


class ArrayFile:
    """An array of one or two dimensions in a file. Rows are read when they are asked for.

    Args:
        path: the `.npy` file.
        dtype: what its numbers must be.
        shape: what it must be; a -1 in it may be any length.

    Raises:
        ValueError: it is missing, damaged, or of another kind.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
        self._file = SteadyFile(path)
        self._dtype = np.dtype(dtype)
        size = self._file.size
        start = self._file.read(0, min(size, len(_MAGIC) + 2))
        length = int.from_bytes(start[len(_MAGIC) :], "little")
        header = _HEADER.fullmatch(self._file.read(len(start), min(length, size - len(start))))
        if not start.startswith(_MAGIC) or header is None:
            raise ValueError(f"{path} does not begin as an array of numpy does; it is damaged")
        kind, found = header[1].decode("latin-1"), tuple(int(side) for side in header.groups()[1:] if side)
        fits = len(found) == len(shape) and all(e in (-1, f) for f, e in zip(found, shape, strict=True))
        if kind != self._dtype.str or not fits:
            sides = ["N" if side == -1 else side for side in shape]
            raise ValueError(f"{path} must be {self._dtype.str} {sides}, not {kind} {list(found)}")
        self._offset = len(start) + length
        needed = self._offset + math.prod(found) * self._dtype.itemsize
        if size != needed:
            raise ValueError(f"{path} has {size} bytes, an array of {kind} {list(found)} has {needed}")
        self.shape = found

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        """One row, `shape[1:]`."""
        assert 0 <= row < len(self)
        length = math.prod(self.shape[1:]) * self._dtype.itemsize
        content = self._file.read(self._offset + row * length, length)
        return np.frombuffer(content, dtype=self._dtype).reshape(self.shape[1:])

    def __reduce__(self) -> tuple[type[ArrayFile], tuple[Path, npt.DTypeLike, tuple[int, ...]]]:
        # Each data loading process opens the file itself.
        return ArrayFile, (self._file.path, self._dtype, self.shape)

    def all(self) -> npt.NDArray[Any]:
        """The whole array, in memory."""
        content = self._file.read(self._offset, self._file.size - self._offset)
        return np.frombuffer(content, dtype=self._dtype).reshape(self.shape)

    def check(self) -> None:
        """Look whether the file has changed; see :meth:`SteadyFile.check`."""
        self._file.check()


def read_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Read a whole array; see :class:`ArrayFile`."""
    return ArrayFile(path, dtype, shape).all()
