"""What the kernel says of a process (proc(5)). Imports nothing that takes time: a rank asks before torch is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """A line of the kernel's table of processes."""

    state: str
    """One letter: R, S, D, T (stopped), t, Z, X, ..."""
    parent: int
    """Its process id."""
    started: int
    """Clock ticks since the kernel's start."""

    @property
    def has_ended(self) -> bool:
        """Whether only what it left for its parent to read is there."""
        return self.state in ("Z", "X")


def process_stat(pid: int) -> ProcessStat | None:
    """The line of a process; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in front of these may hold spaces and brackets.
    state, parent, *more = text.rpartition(")")[2].split()
    return ProcessStat(state, int(parent), int(more[17]))


def is_running(pid: int) -> bool:
    """Whether a process exists that has not ended yet; a stopped one has not."""
    stat = process_stat(pid)
    return stat is not None and not stat.has_ended
