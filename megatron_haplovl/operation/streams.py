"""Standard output and standard error that may break: what reads them is gone, or the disk below them is full."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any


class ForgivingStream:
    """A text stream whose errors do not reach the one who prints, and that says so where it can.

    Args:
        stream: what is printed to.
        say: is told that the stream has broken, or works again.
    """

    def __init__(self, stream: Any, say: Callable[[str], None]) -> None:
        self._stream, self._say = stream, say
        self._broken, self._wrote = False, False

    def write(self, text: str) -> int:
        """As of any text stream; raises nothing."""
        self._wrote = self._succeeds(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of any text stream; raises nothing."""
        # A write may go no further than a buffer, and a flush without one before it says nothing.
        if self._succeeds(self._stream.flush) and self._broken and self._wrote:
            self._broken = False
            self._say("works again")

    def _succeeds(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed.
            self._wrote = False
            if not self._broken:
                self._broken = True
                self._say(f"{error}; the run goes on without it")
            return False
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgive_broken_streams() -> None:
    """Print through streams that cannot end a run, from now on in this process.

    Python's own would raise in whatever prints, and at the end turn an exit code of 0 into 120.
    """
    if sys.stdout is not None:
        sys.stdout = ForgivingStream(sys.stdout, _say_on_stderr)
    if sys.stderr is not None:
        sys.stderr = ForgivingStream(sys.stderr, lambda _words: None)


def _say_on_stderr(words: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"warning: standard output: {words}\n")
            sys.stderr.flush()
