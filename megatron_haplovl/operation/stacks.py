"""Where the stacks of a rank's threads are written, and how those of a stopped rank are got."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from megatron_haplovl.parallel.process_table import is_running

logger = logging.getLogger(__name__)

_SECONDS_TO_ABORT = 1.5
_LIBC = ctypes.CDLL(None, use_errno=True)
_WAKE = int(signal.SIGRTMIN) + 7
"""A signal that nobody else sends."""


def debug_folder(save: str | None, run_id: str) -> Path:
    """Where a run leaves what helps to find a fault: `debug` in --save, or a temporary folder with the run's id."""
    return Path(save) / "debug" if save is not None else Path(tempfile.gettempdir()) / f"haplovl-debug-{run_id}"


class StackFile:
    """Receives the stacks of this process: on demand, and before it dies of SIGABRT, SIGSEGV, SIGBUS, SIGFPE or SIGILL.

    Made and closed by the main thread.

    Args:
        folder: see :func:`debug_folder`.
        run_id: of this launch.
        rank: of this process.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, run_id: str, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._rank, self._run_id = folder, rank, run_id
        self.path = folder / f"stacks_{run_id}_rank_{rank}.txt"
        self._file = self.path.open("ab", buffering=0)
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(self._file)
        self._before = signal.signal(_WAKE, _stay)
        faulthandler.register(_WAKE, self._file, chain=True)

    def dump(self, reason: str) -> None:
        """Append the stacks of all threads; with collectives on a device, what torch has recorded of them, too."""
        heading = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} (process {os.getpid()}): {reason}\n"
        self._file.write(heading.encode())
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.write(b"\n")
        self._dump_collectives()

    def _dump_collectives(self) -> None:
        # Torch without NCCL has no such function.
        record = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if record is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            path = self.folder / f"collectives_{self._run_id}_rank_{self._rank}.json"
            path.write_bytes(record())

    def close(self) -> None:
        """Remove the file if there was nothing to say."""
        faulthandler.unregister(_WAKE)
        signal.signal(_WAKE, self._before)
        faulthandler.disable()
        if self._was_enabled:
            faulthandler.enable()
        self._file.close()
        with contextlib.suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.folder.rmdir()


def open_stack_file(save: str | None, run_id: str, rank: int) -> StackFile | None:
    """The file of this rank, in a temporary folder if --save does not take it; None if that fails, too."""
    folders = [debug_folder(save, run_id)] + ([debug_folder(None, run_id)] if save is not None else [])
    for folder in folders:
        try:
            return StackFile(folder, run_id, rank)
        except OSError as error:
            logger.warning(f"{folder} takes no stacks of hanging ranks: {error}")
    return None


def wake(pids: Sequence[int]) -> None:
    """Let ranks of this machine go on that may be stopped, to end by themselves; they write down their stacks first.

    Their main threads stay where they are.
    """
    _signal_stopped(pids, _WAKE)


def abort(pids: Sequence[int], patience: float = 0.0) -> None:
    """End processes of this machine that may be stopped; their :class:`StackFile` gets their stacks first.

    Waits until they are gone, for a short time.

    Args:
        pids: the processes.
        patience: seconds that they have to end by themselves.
    """
    if _outlive(pids, patience):
        _signal_stopped(pids, signal.SIGABRT)
        _outlive(pids, _SECONDS_TO_ABORT)


def _outlive(pids: Sequence[int], seconds: float) -> bool:
    """Wait until processes have ended; False as soon as they have."""
    end = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        if time.monotonic() >= end:
            return True
        time.sleep(0.05)
    return False


def _signal_stopped(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            _signal_main_thread(pid, number)
            os.kill(pid, signal.SIGCONT)


def _stay(number: int, frame: FrameType | None) -> None:
    """The main thread does nothing more: another thread ends the process."""
    threading.Event().wait()


def _signal_main_thread(pid: int, number: int) -> None:
    """Of a process: its stack is then that of the moment.

    A signal for a stopped process waits until it goes on, and any of its threads may take it. While another one does,
    the main thread leaves the place where it was stopped.
    """
    tgkill = getattr(_LIBC, "tgkill", None)
    if tgkill is None:  # Not with glibc below 2.30.
        os.kill(pid, number)
    elif tgkill(pid, pid, number) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
