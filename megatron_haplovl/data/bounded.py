"""Limits for code that came with the data: how long it may run, and how much memory it may take."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_PAGE = resource.getpagesize()
_STATM = Path("/proc/self/statm")


class TooLongError(Exception):
    """The time is over."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Run the block for so many seconds at most, with so many bytes of memory beyond what the process has already.

    Time is measured in a process's main thread only, because only that one can be interrupted; memory only on Linux,
    which counts addresses and not pages: a block that runs into the limit fails before memory is touched.

    Raises:
        TooLongError: it has taken longer.
        MemoryError: it wanted more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = soft
    if _STATM.is_file():
        limit = int(_STATM.read_text().split()[0]) * _PAGE + memory
        limit = limit if soft == resource.RLIM_INFINITY else min(soft, limit)
    is_timed = threading.current_thread() is threading.main_thread()
    if is_timed:
        before = signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if is_timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _ring(_number: int, _frame: FrameType | None) -> None:
    raise TooLongError
