"""What a loader's worker processes do about signals: nothing. Their rank decides when they end."""

from __future__ import annotations

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
