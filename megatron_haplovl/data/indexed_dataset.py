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

import itertools
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data.hashed_files import HashedFile
from megatron_haplovl.data.manifest import FileEntry
from megatron_haplovl.data.steady_file import SteadyFile

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
_BLOCK = 1 << 20  # bytes that are hashed and then written, while they are in the processor's cache
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
    """Reads a pair of files; `dataset[i]` is the i-th sequence.

    Opening takes as long for many sequences as for few: it looks at the header and at the last sequence. Each sequence
    is checked when it is read, and all of them by :meth:`check_order`.

    Args:
        prefix: path without `.bin` and `.idx`.
        dtype: what its numbers must be; without it, any type will do.

    Raises:
        ValueError: a file is missing, truncated, not of this format, or has numbers of another type.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike | None = None) -> None:
        self._prefix, self._expected = str(prefix), dtype
        path = idx_path(prefix)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; is the prefix right, and was the data preprocessed?")
        self._index = SteadyFile(path)
        self._dtype, self._count = _read_header(self._index)
        self._itemsize = self._dtype.itemsize
        if dtype is not None and self._dtype != np.dtype(dtype):
            raise ValueError(f"{path} is damaged: it says that the numbers are {self._dtype}, not {np.dtype(dtype)}")
        data = bin_path(prefix)
        if not data.is_file():
            raise ValueError(f"{data} does not exist, but its index {path} does")
        self._data = SteadyFile(data)
        needed = self._bounds(self._count - 1, self._count)[0][1] if self._count else 0
        if self._data.size < needed:
            raise ValueError(f"{data} is truncated: it has {self._data.size} bytes, its index needs {needed}")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        assert 0 <= index < self._count
        return self._sequence(index, *self._bounds(index, index + 1)[0])

    def in_order(self, index: int) -> npt.NDArray[Any]:
        """`dataset[index]`, of a file whose sequences follow each other, as the writer's do.

        Raises:
            ValueError: this one does not begin where the one before it ends, or end where the next one begins.
        """
        first = max(index - 1, 0)
        bounds = self._bounds(first, min(index + 2, self._count))
        for before, ((_, end), (start, _)) in enumerate(itertools.pairwise(bounds), first):
            if end != start:
                raise ValueError(
                    f"{self._index.path} is damaged: sequence {before} ends at byte {end}, the next one begins at "
                    f"{start}"
                )
        return self._sequence(index, *bounds[index - first])

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str, npt.DTypeLike | None]]:
        # Each data loading process opens the files itself.
        return IndexedDataset, (self._prefix, self._expected)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Length of every sequence in numbers, read anew."""
        return self._lengths(0, self._count)

    def starts(self) -> npt.NDArray[np.int64]:
        """Index in `flat()` of the first number of each sequence, `[len(self)]`."""
        return self._pointers(0, self._count) // self._dtype.itemsize

    def check_order(self) -> int:
        """Check that the sequences follow each other from the first byte on, as the writer's do.

        Returns:
            The bytes that they have together.

        Raises:
            ValueError: they do not, or a length is negative.
        """
        lengths, pointers = self.lengths, self._pointers(0, self._count)
        if len(lengths) and int(lengths.min()) < 0:
            raise ValueError(f"{self._index.path} is damaged: it has negative lengths")
        ends = pointers + lengths.astype(np.int64) * self._dtype.itemsize
        if len(ends) and (pointers[0] != 0 or not np.array_equal(ends[:-1], pointers[1:])):
            raise ValueError(f"the sequences of {self._data.path} do not follow each other in order")
        return int(ends[-1]) if len(ends) else 0

    def read_range(self, first: int, stop: int) -> npt.NDArray[Any]:
        """Neighbouring sequences in one array in memory, of a file whose sequences follow each other."""
        start, end = self._bounds(first, first + 1)[0][0], self._bounds(stop - 1, stop)[0][1]
        return np.frombuffer(self._data.read(start, end - start), dtype=self._dtype)

    def read_all(self) -> npt.NDArray[Any]:
        """All sequences in one array in memory, in order.

        Raises:
            ValueError: see :meth:`check_order`.
        """
        return np.frombuffer(self._data.read(0, self.check_order()), dtype=self._dtype)

    def flat(self) -> npt.NDArray[Any]:
        """All sequences in one array, in order: a map, for programs that go once through files larger than memory.

        Raises:
            ValueError: see :meth:`check_order`.
        """
        size = self.check_order()
        if size == 0:  # An empty file cannot be mapped.
            return np.zeros(0, dtype=self._dtype)
        # A plain array: numpy's own class takes ten times as long to cut.
        return np.asarray(np.memmap(self._data.path, dtype=np.uint8, mode="r", shape=(size,))).view(self._dtype)

    def check(self) -> None:
        """Look whether a file has changed; see :meth:`SteadyFile.check`."""
        self._index.check()
        self._data.check()

    def _sequence(self, index: int, start: int, end: int) -> npt.NDArray[Any]:
        if not 0 <= start <= end <= self._data.size:
            raise ValueError(
                f"{self._index.path} is damaged: sequence {index} would be the bytes {start} to {end} of "
                f"{self._data.size}"
            )
        return np.frombuffer(self._data.read(start, end - start), dtype=self._dtype)

    def _bounds(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The first byte of some sequences, and the one behind their last."""
        number, size = stop - first, self._itemsize
        # A few at most, several times per sample: numpy would take longer than the disk's cache.
        lengths = struct.unpack(f"<{number}i", self._index.read(_START + 4 * first, 4 * number))
        pointers = struct.unpack(f"<{number}q", self._index.read(_START + 4 * self._count + 8 * first, 8 * number))
        return [(start, start + size * length) for start, length in zip(pointers, lengths, strict=True)]

    def _lengths(self, first: int, stop: int) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._index.read(_START + 4 * first, 4 * (stop - first)), dtype="<i4")

    def _pointers(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        start = _START + 4 * self._count + 8 * first
        return np.frombuffer(self._index.read(start, 8 * (stop - first)), dtype="<i8")


_START = len(_MAGIC) + _HEADER.size
"""Where the lengths begin in an index."""


def _read_header(file: SteadyFile) -> tuple[np.dtype[Any], int]:
    """The type of the numbers, and how many sequences there are."""
    path, size = file.path, file.size
    head = file.read(0, min(size, _START))
    if not head.startswith(_MAGIC):
        raise ValueError(f"{path} is not an index of Megatron's format: it does not start with MMIDIDX")
    if size < _START:
        raise ValueError(f"{path} is truncated: it has {size} bytes, its header needs {_START}")
    version, code, count, boundaries = _HEADER.unpack_from(head, len(_MAGIC))
    if version != _VERSION or code not in _DTYPES:
        raise ValueError(f"{path} has version {version} and number type {code}; version 1, types 1 to 8 are known")
    needed = _START + count * 12 + boundaries * 8
    if size < needed:
        raise ValueError(f"{path} is truncated: it has {size} bytes, {count} sequences need {needed}")
    if size > needed:
        raise ValueError(
            f"{path} is damaged: it has {size} bytes, {count} sequences and {boundaries} boundaries need {needed}"
        )
    return np.dtype(_DTYPES[code]), count
