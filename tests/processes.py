"""Processes that tests start: each ends with the test, also where pytest itself is killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

REPOSITORY = Path(__file__).parents[1]

_LIBC = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2).


def die_with_parent() -> None:
    """Let Linux kill this process as soon as its parent has gone."""
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All processes below one, by /proc."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(folder.name))
    found, open_ = [], [pid]
    while open_:
        children = parents.get(open_.pop(), [])
        found += children
        open_ += children
    return found


class Started(Protocol):
    """A process that was started."""

    pid: int

    def kill(self) -> None: ...

    def wait(self) -> int: ...


def kill_tree(process: Started) -> None:
    """Kill a process and all that it has started, and wait for its end."""
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def output_of(words: Sequence[str], *, environment: dict[str, str], timeout: float) -> tuple[int, str]:
    """Run a command in the repository's root to its end; returns its exit code and both of its streams.

    Raises:
        AssertionError: the time ran out; the output is the message. Nothing of the command is left.
    """
    with subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=die_with_parent,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            raise AssertionError(f"no end after {timeout} s: {process.communicate()[0][-6000:]}") from None
        except BaseException:
            kill_tree(process)
            raise
    return process.returncode, output
