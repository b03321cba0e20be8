"""The bytes of a file, decompressed while they are read."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = (".gz", ".tgz", ".zst")
"""Suffixes that :func:`open_stream` decompresses."""

_BLOCK = 1 << 16
# Compressed bytes that are decompressed at once: few, because four of them may become 128 KiB.
_FEED = 128
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` makes


@contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, without the compression that its suffix names.

    Raises:
        ValueError: when it is read, the file turns out to be damaged or cut short.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if path.name.lower().endswith(COMPRESSIONS) and not file.peek(1):
            raise ValueError(f"{path} is empty, not even an empty compressed file")
        if path.name.lower().endswith((".gz", ".tgz")):
            with io.BufferedReader(_GzipBytes(file, path)) as unpacked:
                yield unpacked
        elif path.name.lower().endswith(".zst"):
            with io.BufferedReader(_ZstandardBytes(file, path)) as unpacked:
                yield unpacked
        else:
            yield file


class _GzipBytes(io.RawIOBase):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = gzip.GzipFile(fileobj=file, mode="rb")
        self._path = path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        import zlib

        try:
            return self._file.readinto(buffer)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self._path} is damaged or cut short: {error}") from error


class _ZstandardBytes(io.RawIOBase):
    """Frames one behind the other. The library's own reader takes a frame that is cut short for the end."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._file = file
        self._path = path
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if not self._unpacked:
            self._unpacked = self._next_block()
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._unpacked))
        view[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def _next_block(self) -> memoryview:
        pieces: list[bytes] = []
        size = 0
        while size < _BLOCK:
            feed = self._file.read(_FEED)
            if not feed:
                if self._frame is not None:
                    raise ValueError(f"{self._path} is cut short: its last zstandard frame has no end")
                break
            for piece in self._decompress(feed):
                pieces.append(piece)
                size += len(piece)
        return memoryview(b"".join(pieces))

    def _decompress(self, feed: bytes) -> Iterator[bytes]:
        try:
            while feed:
                self._frame = self._frame or self._decompressor.decompressobj()
                yield self._frame.decompress(feed)
                feed = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        except self._error as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error
