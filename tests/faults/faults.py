"""Faults that a rank inflicts on itself: name -> function of (step, rank), called before the run is set up."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from megatron_haplovl.training import loop
from tests.faults.hang_faults import HANG_FAULTS
from tests.faults.signal_faults import SIGNAL_FAULTS


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


def out_of_memory(step: int, rank: int) -> None:
    """The host's memory is too small."""
    at_step(step, rank, lambda: torch.empty(1 << 50))


def truncate(step: int, rank: int) -> None:
    """A file of the data, HAPLOVL_FAULT_FILE, becomes empty."""
    at_step(step, rank, lambda: os.truncate(os.environ["HAPLOVL_FAULT_FILE"], 0))


FAULTS: dict[str, Callable[[int, int], None]] = {
    "kill": kill,
    "stop": stop,
    "unknown_error": unknown_error,
    "out_of_memory": out_of_memory,
    **SIGNAL_FAULTS,
    **HANG_FAULTS,
    "truncate": truncate,
}
