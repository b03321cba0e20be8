"""Files whose checksum is computed while they are written, and copies that pass by this program."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data.manifest import FileEntry

_BLOCK = 1 << 24
# What a kernel or a file system answers that cannot copy by itself.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


class HashedFile:
    """A file that is written from its beginning to its end. A context manager.

    Args:
        path: its name; a file that is there is replaced.
        is_hashed: without it, `entry` has no checksum.

    Raises:
        OSError: it cannot be written; with the file's name, which Python leaves out when a disk is full.
    """

    def __init__(self, path: Path, *, is_hashed: bool = True) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._waiting = bytearray()
        self._digest = hashlib.sha256() if is_hashed else None
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        if self._digest is not None:
            self._digest.update(data)
        self._bytes += len(data)
        self._waiting += data
        if len(self._waiting) >= 1 << 18:
            self._flush()

    def _flush(self) -> None:
        write_all(self._file, self._waiting, self._path)
        self._waiting = bytearray()

    def copy(self, source: BinaryIO, start: int, length: int) -> None:
        """Append bytes of another file, unbuffered as well, without looking at them: there is no checksum then.

        Raises:
            ValueError: `source` is shorter than `start + length`.
        """
        assert self._digest is None
        self._flush()
        copy_range(source, self._file, start, length, self._path)
        self._bytes += length

    def close(self) -> None:
        """Write what is left."""
        try:
            if not self._file.closed:
                self._flush()
        finally:
            self._file.close()

    @property
    def entry(self) -> FileEntry:
        """Size and checksum of what has been written."""
        return FileEntry(self._bytes, "" if self._digest is None else self._digest.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def write_all(file: BinaryIO, data: bytes | bytearray, path: Path) -> None:
    """Write to an unbuffered file.

    Raises:
        OSError: with the file's name.
    """
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_array(path: Path, array: npt.NDArray[Any]) -> FileEntry:
    """Write an `.npy` file, byte for byte as :func:`numpy.save` does.

    Raises:
        OSError: it cannot be written.
    """
    header = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with HashedFile(path) as file:
        file.write(header.getvalue())
        view = array.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), _BLOCK):
            file.write(view[start : start + _BLOCK])
    return file.entry


def copy_range(source: BinaryIO, target: BinaryIO, start: int, length: int, path: Path) -> None:
    """Append a range of one file to another, both unbuffered; the kernel copies where it can.

    Args:
        source: file that is read.
        target: file that is written, where it stands.
        start: first byte in `source`.
        length: number of bytes, all of which exist.
        path: name of `target`, for messages.

    Raises:
        OSError: `target` cannot be written.
        ValueError: `source` is shorter.
    """
    end = start + length
    while start < end:
        try:
            copied = _copy_in_kernel(source, target, start, end - start)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if copied is None:
            source.seek(start)
            block = source.read(min(_BLOCK, end - start))
            write_all(target, block, path)
            copied = len(block)
        if copied == 0:
            raise ValueError(f"{source.name} is shorter than its index says")
        start += copied


def _copy_in_kernel(source: BinaryIO, target: BinaryIO, start: int, length: int) -> int | None:
    """Number of bytes that were copied, or None where the kernel does not copy between these files."""
    if not hasattr(os, "copy_file_range"):
        return None
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), length, offset_src=start)
    except OSError as error:
        if error.errno in _CANNOT_COPY:
            return None
        raise
