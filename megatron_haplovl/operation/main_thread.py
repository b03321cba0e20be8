"""What the main thread of this process does, seen from another thread: does it move, does it wait for other ranks?"""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_haplovl.checkpoint.write import complete
from megatron_haplovl.operation.phase import Moment, PhaseClock

_COLLECTIVES = (os.sep.join(("", "torch", "distributed", "")), os.sep.join(("", "deepspeed", "comm", "")))
_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One look at the main thread."""

    moment: Moment
    in_phase: float
    """Seconds in this phase."""
    still: float
    """Seconds without a move."""
    waits: bool
    """Whether it waits for other ranks."""


class MainThread:
    """Looks at the main thread again and again.

    Args:
        clock: what the main thread says about itself.
    """

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        self._place: tuple[object, ...] = ()
        self._moment = clock.moment
        self._in_phase = self._still = 0.0
        self._written = 0

    def look(self, elapsed: float) -> Sample:
        """Look once.

        Args:
            elapsed: seconds since the look before, in which this process was running.
        """
        frames = sys._current_frames()
        main = frames[threading.main_thread().ident or 0]
        moment = self._clock.moment
        place = (moment.order, moment.step, *((id(frame.f_code), frame.f_lasti) for frame in _stack(main)))
        moved = place != self._place or moment is not self._moment or not _is_marked(main) or self._writes(moment)
        _mark(main)
        self._in_phase = 0.0 if moment is not self._moment else self._in_phase + elapsed
        self._still = 0.0 if moved else self._still + elapsed
        self._place, self._moment = place, moment
        return Sample(moment, self._in_phase, self._still, waits_for_ranks(main, frames))

    def _writes(self, moment: Moment) -> bool:
        """Whether the process writes a checkpoint: one call may write gigabytes."""
        if moment.phase != "save":
            return False
        before, self._written = self._written, _bytes_written()
        return self._written - before > _MEGABYTE


def waits_for_ranks(main: FrameType, frames: dict[int, FrameType]) -> bool:
    """Whether a thread waits for other ranks: in a collective, or for their parts of a checkpoint.

    Args:
        main: the innermost frame of the thread.
        frames: those of all threads.
    """
    codes = {frame.f_code for frame in _stack(main)}
    if any(part in code.co_filename for code in codes for part in _COLLECTIVES) or complete.__code__ in codes:
        return True
    if Future.result.__code__ in codes:
        # A checkpoint is written beside the training, and has to be complete now.
        return any(frame.f_code is complete.__code__ for leaf in frames.values() for frame in _stack(leaf))
    # `handle.wait()` of a collective that goes on beside the computation; everything in Python waits deeper than that.
    return ".wait(" in linecache.getline(main.f_code.co_filename, main.f_lineno or 0)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


# A call that waits in the same line again, one after the other, looks like one that waits for long. So a call is marked
# by an attribute of its frame that nothing but a debugger reads.
def _mark(frame: FrameType) -> None:
    frame.f_trace_lines = False


def _is_marked(frame: FrameType) -> bool:
    return not frame.f_trace_lines


def _bytes_written() -> int:
    """By this process since its start; 0 where the kernel does not count."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar:")), 0)
