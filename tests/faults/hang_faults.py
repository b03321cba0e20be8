"""Faults after which nothing moves: a main thread that sleeps in a phase, a stopped process, a worker that hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint import write
from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.data.pack_dataset import PackDataset
from megatron_haplovl.operation.phase import PhaseClock

SECONDS_STOPPED = 16
"""Of the fault `pause`: long enough to be noticed."""


def _note() -> None:
    """Leave the time of the fault in the file of HAPLOVL_FAULT_TIME."""
    file = os.environ.get("HAPLOVL_FAULT_TIME")
    if file is not None:
        Path(file).write_text(str(time.time()))


def _hang() -> None:
    _note()
    threading.Event().wait()


def _stop() -> None:
    _note()
    os.kill(os.getpid(), signal.SIGSTOP)


def _pause() -> None:
    if os.fork() == 0:
        time.sleep(SECONDS_STOPPED)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    _stop()


def _in_phase(phase: str, action: Callable[[], None], step: int, rank: int) -> None:
    """Do something when a rank is in a phase of an optimizer step (counted from 1)."""
    patched: Any = PhaseClock
    original = patched._begin
    done: list[bool] = []

    def begin(clock: PhaseClock, entered: str, order: int) -> None:
        original(clock, entered, order)
        if (entered, clock.moment.step, os.environ["RANK"]) == (phase, step, str(rank)) and not done:
            done.append(True)
            action()

    patched._begin = begin


def _hang_write(step: int, rank: int) -> None:
    """A rank never finishes writing its part of a checkpoint, as on a file server that is gone."""
    original: Any = write.write_rank

    def write_rank(folder: Path, number: int, *rest: Any) -> Any:
        if number == rank and f"global_step{step}." in f"{folder.name}.":
            _hang()
        return original(folder, number, *rest)

    vars(write)["write_rank"] = write_rank


def _hang_read(step: int, rank: int) -> None:
    """Reading a micro-batch never returns, in a worker of the loader or in the rank itself."""
    loaders: Any = BatchLoader
    datasets: Any = PackDataset
    make, read = loaders.__init__, datasets.__getitem__

    def init(loader: BatchLoader, *args: Any, **kwargs: Any) -> None:
        make(loader, *args, **kwargs)
        if os.environ["RANK"] == str(rank):
            awaited = loader._sampler.packs_of(step - 1)[:1]

            def getitem(dataset: PackDataset, numbers: Any) -> Any:
                if list(numbers) == awaited:
                    _hang()
                return read(dataset, numbers)

            datasets.__getitem__ = getitem

    loaders.__init__ = init


_PHASES = ("loader", "forward", "backward", "reduce", "evaluate", "save")

HANG_FAULTS: dict[str, Callable[[int, int], None]] = {
    **{f"hang_{phase}": partial(_in_phase, phase, _hang) for phase in _PHASES},
    **{f"stop_{phase}": partial(_in_phase, phase, _stop) for phase in _PHASES},
    "pause": partial(_in_phase, "forward", _pause),
    "hang_write": _hang_write,
    "hang_read": _hang_read,
}
