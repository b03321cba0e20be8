"""A file that grows by whole records, also on a disk that is full for a while."""

from __future__ import annotations

from collections import deque
from pathlib import Path

_MOST_KEPT = 10_000
"""Records that wait for room; with more, the oldest are lost."""


class AppendedFile:
    """Appends records. One that could not be written whole is taken back and kept until there is room.

    Args:
        path: the file; its folder is made.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, 2)
        self._is_whole = True
        self._waiting: deque[bytes] = deque(maxlen=_MOST_KEPT)

    def append(self, record: bytes) -> None:
        """Write a record behind those that wait.

        Raises:
            OSError: the disk is full, for example; the file ends with a whole record.
        """
        self._waiting.append(record)
        self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: see :meth:`append`.
        """
        while self._waiting:
            self._take_back()
            self._is_whole, rest = False, memoryview(self._waiting[0])
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._take_back()
                raise
            self._is_whole = True
            self._end += len(self._waiting.popleft())

    def close(self) -> None:
        """Write what waits, and close the file.

        Raises:
            OSError: see :meth:`append`.
        """
        try:
            self.flush()
        finally:
            self._file.close()

    def _take_back(self) -> None:
        if not self._is_whole:
            self._file.truncate(self._end)
            self._is_whole = True
