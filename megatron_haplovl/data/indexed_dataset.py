"""Sequences of numbers in a pair of files, PREFIX.bin and PREFIX.idx, in Megatron's format.

PREFIX.bin holds the sequences one after the other; PREFIX.idx (little-endian) says where each one is:

    9 bytes `MMIDIDX\\0\\0`, u64 version (1), u8 number type, u64 sequences, u64 document boundaries,
    i32 length of each sequence (in numbers), i64 offset of each sequence (in bytes), i64 document boundaries

A document boundary is the number of sequences before it; there is one more boundary than documents. Here every sequence
is a document of its own. `megatron.core.datasets.indexed_dataset` reads these files.

Both words are Megatron's here. In the rest of the package a document is what shares a mask, and a sequence is packed
from documents.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data.hashed_files import HashedFile
from megatron_haplovl.data.manifest import FileEntry

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<QBQQ")
# Megatron's codes. Several kinds of integer exist, but no uint32.
_DTYPES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_BLOCK = 1 << 24  # bytes that are hashed at once
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def bin_path(prefix: str | Path) -> Path:
    """The file with the numbers."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file with the index."""
    return Path(f"{prefix}.idx")


class IndexedDatasetWriter:
    """Writes PREFIX.bin as sequences arrive, and PREFIX.idx at the end. A context manager.

    Leaving the `with` block through an exception leaves no index, so a half-written pair cannot be read.

    Args:
        prefix: path without `.bin` and `.idx`.
        dtype: type of the numbers.
        is_hashed: without it, the entry of the `.bin` file has no checksum.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, *, is_hashed: bool = True) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        assert self._dtype in _CODES, f"{self._dtype} is not a number type of the format"
        self._lengths: list[int] = []
        self._blocks: list[npt.NDArray[np.int32]] = []
        self._file = HashedFile(bin_path(prefix), is_hashed=is_hashed)
        self._entries: tuple[FileEntry, FileEntry] | None = None

    def add(self, sequence: npt.ArrayLike) -> None:
        """Append one sequence (one-dimensional, possibly empty)."""
        array = np.ascontiguousarray(sequence, dtype=self._dtype)
        assert array.ndim == 1
        self._file.write(array.tobytes())
        self._lengths.append(len(array))

    def extend(self, flat: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Append many sequences that stand one behind the other in `flat`."""
        assert flat.dtype == self._dtype and flat.ndim == 1 and int(lengths.sum(dtype=np.int64)) == len(flat)
        view = np.ascontiguousarray(flat).view(np.uint8).data
        for start in range(0, len(view), _BLOCK):
            self._file.write(view[start : start + _BLOCK])
        self._add_lengths(lengths)

    def copy(self, source: BinaryIO, start: int, lengths: npt.NDArray[np.int32]) -> None:
        """Append many sequences that stand one behind the other in a file, from byte `start` on, without reading them.

        Raises:
            ValueError: the file is too short.
        """
        self._file.copy(source, start, int(lengths.sum(dtype=np.int64)) * self._dtype.itemsize)
        self._add_lengths(lengths)

    def _add_lengths(self, lengths: npt.NDArray[np.int32]) -> None:
        self._blocks += [np.array(self._lengths, dtype=np.int32), lengths.astype(np.int32)]
        self._lengths = []

    @property
    def entries(self) -> tuple[FileEntry, FileEntry]:
        """Sizes and checksums of `.bin` and `.idx`, when both are complete."""
        assert self._entries is not None
        return self._entries

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)
        if kind is None:
            self._entries = self._file.entry, self._write_index()

    def _write_index(self) -> FileEntry:
        lengths = np.concatenate([*self._blocks, np.array(self._lengths, dtype=np.int32)]).astype("<i4")
        count = len(lengths)
        pointers = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        with HashedFile(idx_path(self._prefix)) as index:
            index.write(_MAGIC)
            index.write(_HEADER.pack(_VERSION, _CODES[self._dtype], count, count + 1))
            index.write(lengths.tobytes())
            index.write(pointers.tobytes())
            index.write(np.arange(count + 1, dtype="<i8").tobytes())
        return index.entry


class IndexedDataset:
    """Reads a pair of files through memory maps; `dataset[i]` is the i-th sequence, without a copy.

    Opening takes as long for many sequences as for few: it looks at the header and at the last sequence. Each sequence
    is checked when it is read, and all of them by :meth:`flat`.

    Args:
        prefix: path without `.bin` and `.idx`.

    Raises:
        ValueError: a file is missing, truncated or not of this format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self._prefix = str(prefix)
        self._dtype, self.lengths, self._pointers = _map_index(idx_path(prefix))
        data = bin_path(prefix)
        if not data.is_file():
            raise ValueError(f"{data} does not exist, but its index {idx_path(prefix)} does")
        size = data.stat().st_size
        needed = self._bounds(len(self) - 1)[1] if len(self) else 0
        if size < needed:
            raise ValueError(f"{data} is truncated: it has {size} bytes, its index needs {needed}")
        self._bytes = _map(data)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        start, end = self._bounds(index)
        if not 0 <= start <= end <= len(self._bytes):
            raise ValueError(
                f"{idx_path(self._prefix)} is damaged: sequence {index} would be the bytes {start} to {end} of "
                f"{len(self._bytes)}"
            )
        return self._bytes[start:end].view(self._dtype)

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        # Each data loading process opens the files itself; pickling a map would copy the whole file.
        return IndexedDataset, (self._prefix,)

    def flat(self) -> npt.NDArray[Any]:
        """All sequences in one array, in order. Only for files whose sequences follow each other, as the writer's do.

        Raises:
            ValueError: they do not, or a length is negative.
        """
        if len(self) and int(self.lengths.min()) < 0:
            raise ValueError(f"{idx_path(self._prefix)} is damaged: it has negative lengths")
        ends = self._pointers + self.lengths.astype(np.int64) * self._dtype.itemsize
        if len(ends) and (self._pointers[0] != 0 or not np.array_equal(ends[:-1], self._pointers[1:])):
            raise ValueError(f"the sequences of {bin_path(self._prefix)} do not follow each other in order")
        return self._bytes[: int(ends[-1]) if len(ends) else 0].view(self._dtype)

    def starts(self) -> npt.NDArray[np.int64]:
        """Index in `flat()` of the first number of each sequence, `[len(self)]`."""
        return self._pointers // self._dtype.itemsize

    def _bounds(self, index: int) -> tuple[int, int]:
        start = int(self._pointers[index])
        return start, start + int(self.lengths[index]) * self._dtype.itemsize


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file. An empty one cannot be mapped."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=np.uint8)
    # A plain array: numpy's own class takes ten times as long to cut.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _map_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is the prefix right, and was the data preprocessed?")
    raw = _map(path)
    start = len(_MAGIC) + _HEADER.size
    head = raw[:start].tobytes()
    if not head.startswith(_MAGIC):
        raise ValueError(f"{path} is not an index of Megatron's format: it does not start with MMIDIDX")
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: it has {len(raw)} bytes, its header needs {start}")
    version, code, count, boundaries = _HEADER.unpack_from(head, len(_MAGIC))
    if version != _VERSION or code not in _DTYPES:
        raise ValueError(f"{path} has version {version} and number type {code}; version 1, types 1 to 8 are known")
    needed = start + count * 12 + boundaries * 8
    if len(raw) < needed:
        raise ValueError(f"{path} is truncated: it has {len(raw)} bytes, {count} sequences need {needed}")
    lengths = raw[start : start + 4 * count].view("<i4")
    pointers = raw[start + 4 * count : start + 12 * count].view("<i8")
    return np.dtype(_DTYPES[code]), lengths, pointers
