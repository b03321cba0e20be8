"""What a loader's worker processes do about signals: nothing. Their rank decides when they end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that ask a run to stop. Terminals, torchrun and Slurm send them to whole process groups, workers included."""


def ignore_stop_signals(worker: int) -> None:
    """To be called in a worker when it starts, because its rank still needs batches to finish the step.

    Args:
        worker: its number, which changes nothing.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """End the loader's workers, which ignore the signal that ends them usually. Called by the main thread."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    # torch's loader takes a worker that is killed for an error.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, before)


def end_workers_at_exit() -> None:
    """Python sends that signal to workers that are left at its exit, and waits for their end."""
    multiprocessing.util.Finalize(None, end_workers, exitpriority=1)
