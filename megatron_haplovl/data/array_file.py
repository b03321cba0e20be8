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

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': False, 'shape': \((\d+),(?: (\d+))?\), \} *\n")


def map_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map an array of one or two dimensions, without a copy.

    Args:
        path: the `.npy` file.
        dtype: what its numbers must be.
        shape: what it must be; a -1 in it may be any length.

    Raises:
        ValueError: it is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + 2)
        length = int.from_bytes(start[len(_MAGIC) :], "little")
        header = _HEADER.fullmatch(file.read(length))
    if not start.startswith(_MAGIC) or header is None:
        raise ValueError(f"{path} does not begin as an array of numpy does; it is damaged")
    kind, found = header[1].decode("latin-1"), tuple(int(side) for side in header.groups()[1:] if side)
    fits = len(found) == len(shape) and all(e in (-1, f) for f, e in zip(found, shape, strict=True))
    expected = np.dtype(dtype)
    if kind != expected.str or not fits:
        sides = ["N" if side == -1 else side for side in shape]
        raise ValueError(f"{path} must be {expected.str} {sides}, not {kind} {list(found)}")
    offset, size = len(start) + length, path.stat().st_size
    needed = offset + math.prod(found) * expected.itemsize
    if size != needed:
        raise ValueError(f"{path} has {size} bytes, an array of {kind} {list(found)} has {needed}")
    if 0 in found:  # nothing cannot be mapped
        return np.zeros(found, dtype=expected)
    return np.memmap(path, dtype=expected, mode="r", offset=offset, shape=found)
