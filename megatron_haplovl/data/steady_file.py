"""A file that is read by position for as long as a run goes on.

It is read and not mapped: when a mapped file becomes shorter, the kernel ends the process that touches the missing part
(SIGBUS), and nobody says which file it was.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


class ChangedFileError(ValueError):
    """A file is not what it was when it was opened: no single sample is to blame."""


class SteadyFile:
    """An open file.

    A process that was forked may go on reading it, because a position is part of every call.

    Args:
        path: the file.

    Raises:
        ValueError: it does not exist.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        descriptor = os.open(path, os.O_RDONLY)
        self._descriptor = descriptor
        # Python's own file objects complain when they are not closed by hand.
        weakref.finalize(self, os.close, descriptor).atexit = False
        self.size = self._size_now()
        """Bytes, when it was opened."""

    def read(self, start: int, length: int) -> bytes:
        """Some of its bytes, all of them inside the file as it was opened.

        Raises:
            ChangedFileError: it has become shorter.
            OSError: it cannot be read; the file's name is in it.
        """
        assert start >= 0 and length >= 0 and start + length <= self.size
        # Several times per sample, so the usual case is short.
        try:
            content = os.pread(self._descriptor, length, start)
        except OSError as error:
            content = self._once_more(error, lambda: os.pread(self._descriptor, length, start))
        return content if len(content) == length else self._read_on(content, start, length)

    def _read_on(self, content: bytes, start: int, length: int) -> bytes:
        """All the bytes, of which the first ones are there. Linux reads at most 2 GiB at once."""
        rest = length - len(content)
        if not content and rest:
            raise self._changed(self._size_now())
        return content + self.read(start + len(content), rest)

    def check(self) -> None:
        """Compare its size with the one that it was opened with.

        Raises:
            ChangedFileError: it is another one.
        """
        size = self._size_now()
        if size != self.size:
            raise self._changed(size)

    def _size_now(self) -> int:
        try:
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            return self._once_more(error, lambda: os.fstat(self._descriptor)).st_size

    def _changed(self, size: int) -> ChangedFileError:
        problem = "truncated" if size < self.size else "not the file that was opened"
        return ChangedFileError(
            f"{self.path} is {problem}: it has {size} bytes, it had {self.size} when it was opened; somebody has "
            "changed it in the meantime. Restore it and start the same command again"
        )

    def _once_more(self, error: OSError, call: Callable[[], Result]) -> Result:
        """The result of a second attempt: what a disk or a network file system could not read, it may read now.

        Raises:
            OSError: of the second attempt, or one that no second attempt would mend.
        """
        try:
            if error.errno != errno.EIO:
                raise error
            return call()
        except OSError as last:
            raise OSError(last.errno, last.strerror, str(self.path)) from last
