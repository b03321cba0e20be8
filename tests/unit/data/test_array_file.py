"""Arrays are read as numpy.load reads them, and every damaged header ends in a ValueError."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_haplovl.data.array_file import read_array


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.arange(6, dtype=np.int32).reshape(3, 2), (-1, 2)),
        (np.zeros((0, 32), dtype=np.uint8), (0, 32)),
        (np.arange(300_000, dtype=np.uint64), (300_000,)),
        (np.zeros(0, dtype=np.int32), (-1,)),
        (np.array([7], dtype=np.int32), (1,)),
    ],
)
def test_what_numpy_wrote(tmp_path: Path, array: np.ndarray, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", array)
    found = read_array(tmp_path / "x.npy", array.dtype, shape)
    assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()


def test_every_flipped_bit_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(6, dtype=np.int32).reshape(3, 2))
    content = path.read_bytes()
    for bit in range(8 * (len(content) - 24)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.npy"):
            read_array(path, np.int32, (-1, 2))


def test_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((3, 2), dtype=np.int32))
    for dtype, shape in ((np.int64, (3, 2)), (np.int32, (3,)), (np.int32, (4, 2)), (np.uint32, (3, 2))):
        with pytest.raises(ValueError, match="must be"):
            read_array(path, dtype, shape)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="has 151 bytes, an array of <i4"):
        read_array(path, np.int32, (3, 2))
    with pytest.raises(ValueError, match="does not exist"):
        read_array(tmp_path / "absent.npy", np.int32, (3, 2))
