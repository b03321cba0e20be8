"""Signals that ask a run to stop: remembered, and obeyed when the step is done."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from megatron_haplovl.data.worker_signals import STOP_SIGNALS
from megatron_haplovl.operation.endings import Ending, ExitCode
from megatron_haplovl.operation.last_words import LastWords, end_process
from megatron_haplovl.parallel.launch import Launch

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_UNTIL_ANOTHER = 2.0
"""A signal that comes sooner after the first one may be the same one, sent by terminal and launcher."""


class StopSignals:
    """Listens from its making on, in a thread of its own: the main thread may wait inside a collective.

    A signal that was ignored when the process started (nohup) stays ignored.

    Args:
        launch: whose script writes the signals that it got into a file.
    """

    def __init__(self, launch: Launch) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self.may_wait: Callable[[], bool] = lambda: False
        """Whether a step is under way, behind which a signal is obeyed."""
        self.at_once: Callable[[Ending], object] = lambda ending: end_process(ending, LastWords(launch, None))
        """Called in the listening thread with the ending of a signal that cannot wait: one that comes before the first
        step, and a second SIGINT."""
        self._launch = launch
        self._received_at = 0.0
        self._closed = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        # The interpreter writes a signal's number to the pipe at once, whatever the main thread waits for.
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _nothing)
                # System calls of libraries go on behind it.
                signal.siginterrupt(number, False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no longer; signals mean what they meant before."""
        self._closed.set()
        os.write(self._write, b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def receive(self, name: str, *, may_be_echo: bool) -> None:
        """Take note of a signal.

        Args:
            name: SIGTERM, ...
            may_be_echo: whether terminal and launcher may have sent the same one.
        """
        now = time.monotonic()
        first = self.received is None
        if first:
            self.received, self._received_at = name, now
        echo = may_be_echo and now - self._received_at < _SECONDS_UNTIL_ANOTHER
        if not self.may_wait():
            self.at_once(_ending(f"{name} before the first step: nothing is lost; the same command starts again"))
        elif name == "SIGINT" and not (first or echo):
            self.at_once(_ending("SIGINT twice: ended at once; the same command goes on from the last checkpoint"))

    def _listen(self) -> None:
        obeyed = 0
        while not self._closed.is_set():
            ready, _, _ = select.select([self._read], [], [], _SECONDS_BETWEEN_LOOKS)
            for number in os.read(self._read, 64) if ready else b"":
                if number in STOP_SIGNALS:
                    self.receive(signal.Signals(number).name, may_be_echo=True)
            names = (self._launch.asked_to_leave() or "").split()
            for name in names[obeyed:]:
                self.receive(name, may_be_echo=False)
            obeyed = len(names)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler of Python's, so that the interpreter writes to the pipe."""


def _ending(sentence: str) -> Ending:
    return Ending(ExitCode.COME_BACK, sentence, "signal")
