"""The state of the run below its lines, on a terminal. The lines themselves go by above it as everywhere else."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping
from typing import Any

from megatron_haplovl.training.sinks.attempts import Attempts

_SECONDS = 0.5
"""Between two pictures, at least."""

_WIDTH = 60
"""Characters of the bar."""

_SHOWN = (
    "loss",
    "grad norm",
    "learning rate",
    "elapsed time per iteration (ms)",
    "loader wait (ms)",
    "samples per second",
    "TFLOPs",
    "MFU (%)",
    "peak memory (GiB)",
    "number of skipped iterations",
)


class LiveDisplay:
    """Shows nothing where there is no terminal, where rich is not installed, and with --no-live-display.

    Args:
        last_step: of the run.
        handler: what prints the lines; on a terminal its stream is taken over.
        wanted: whether there shall be one: on rank 0, if the settings say so.
    """

    def __init__(self, last_step: int, handler: logging.StreamHandler[Any], *, wanted: bool) -> None:
        self._last_step, self._handler = last_step, handler
        self._stream = handler.stream
        self._attempt = Attempts("live display")
        self._live: Any = None
        self._columns: Mapping[str, float | int] = {}
        self._drawn = 0.0
        if wanted and self._stream.isatty() and importlib.util.find_spec("rich") is not None:
            self._attempt(self._start)

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
        live.start()
        # A process that is killed cannot show it again.
        console.show_cursor(True)
        self._handler.setStream(_AboveDisplay(console))
        self._live = live

    def step(self, step: int, seconds: float) -> None:
        """A step is done.

        Args:
            step: optimizer steps done.
            seconds: that it took.
        """
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= _SECONDS:
            self._drawn = now
            self._attempt(lambda: self._live.update(self._picture(step, seconds), refresh=True))

    def report(self, columns: Mapping[str, float | int]) -> None:
        """The columns of a log line."""
        self._columns = columns

    def close(self) -> None:
        """Take the picture away; the lines stay."""
        if self._live is not None:
            self._handler.setStream(self._stream)
            self._attempt(self._live.stop)
            self._live = None

    def _picture(self, step: int, seconds: float) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        head = Text(f"step {step} of {self._last_step}, {seconds:.2f} s{self._time_left()}", style="bold")
        done = round(_WIDTH * step / self._last_step)
        bar = Text("━" * done + "┄" * (_WIDTH - done))
        table = Table.grid(padding=(0, 2))
        shown = [(name, self._columns[name]) for name in _SHOWN if name in self._columns]
        for first in range(0, len(shown), 2):
            table.add_row(*(cell for name, value in shown[first : first + 2] for cell in (name, f"{value:.4g}")))
        # The empty line at the end: whatever else prints begins on a line of its own.
        return Group(head, bar, table, Text(""))

    def _time_left(self) -> str:
        if "time to the end (h)" not in self._columns:
            return ""
        hours, minutes = divmod(round(60 * self._columns["time to the end (h)"]), 60)
        return f", {hours} h {minutes:02d} min to the end"


class _AboveDisplay:
    """A stream whose lines appear above the picture, whole."""

    def __init__(self, console: Any) -> None:
        self._console = console

    def write(self, text: str) -> int:
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        self._console.file.flush()
