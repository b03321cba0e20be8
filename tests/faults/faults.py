"""Faults that a rank inflicts on itself: name -> function of (step, rank), called before the run is set up."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from typing import Any

from megatron_haplovl.checkpoint import write
from megatron_haplovl.training import loop


def at_step(step: int, rank: int, action: Callable[[], None]) -> None:
    """Do something on one rank when it begins an optimizer step (counted from 1)."""
    original: Any = vars(loop)["train_step"]

    def wrapped(run: Any, done: int, micro_batches: Any) -> Any:
        if done + 1 == step and int(os.environ["RANK"]) == rank:
            action()
        return original(run, done, micro_batches)

    vars(loop)["train_step"] = wrapped


def stop(step: int, rank: int) -> None:
    """The process is stopped, as by a debugger or a machine that swaps."""
    at_step(step, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def kill(step: int, rank: int) -> None:
    """The process is gone without a word, as after the kernel's out-of-memory killer."""
    at_step(step, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def unknown_error(step: int, rank: int) -> None:
    """An exception that nobody has foreseen."""

    def fail() -> None:
        raise RuntimeError("an exception that nobody has foreseen")

    at_step(step, rank, fail)


def full_disk(times: int, rank: int) -> None:
    """The system refuses large files to one rank, the first `times` times that it writes its part of a checkpoint."""
    write_rank, left = write.write_rank, times

    def write_part(*arguments: Any) -> Any:
        nonlocal left
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if int(os.environ["RANK"]) == rank and left > 0:
            left -= 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return write_rank(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    vars(write)["write_rank"] = write_part


FAULTS: dict[str, Callable[[int, int], None]] = {
    "full_disk": full_disk,
    "kill": kill,
    "stop": stop,
    "unknown_error": unknown_error,
}
