"""What a run prints: records with their rank, and the log line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TextIO

NO_PREFIX = {"no_prefix": True}
"""`extra` of a record that is printed as it is: the lines that tools read."""


class _RankFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if getattr(record, "no_prefix", False):
            return message
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"[rank {self._rank}] {level}{message}"


def configure_logging(rank: int) -> logging.StreamHandler[TextIO]:
    """Send this package's records to standard output: from rank 0 all from INFO on, from every other rank the warnings.

    A second call replaces what the first one set up.

    Args:
        rank: this process's rank in the whole run.

    Returns:
        What prints the records.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_RankFormatter(rank))
    package = logging.getLogger(__name__.partition(".")[0])
    package.handlers = [handler]
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False
    return handler


def training_line(step: int, last_step: int, columns: Mapping[str, float | int], title: str = "iteration") -> str:
    """The log line that users of Megatron know: ` iteration 10/ 100 | name: value | ... |`."""
    parts = [f" {title} {step:8d}/{last_step:8d}"]
    for name, value in columns.items():
        parts.append(f" {name}: {value}" if isinstance(value, int) else f" {name}: {_format(name, value)}")
    return " |".join(parts) + " |"


def _format(name: str, value: float) -> str:
    for digits, names in _DIGITS.items():
        if name in names:
            return f"{value:.{digits}f}"
    return f"{value:.6E}"


_DIGITS = {
    1: (
        "elapsed time per iteration (ms)",
        "loader wait (ms)",
        "slowest rank (ms)",
        "fastest rank (ms)",
        "padding (%)",
    ),
    2: ("MFU (%)", "peak memory (GiB)", "time to the end (h)"),
    3: ("samples per second", "tokens per gpu per second (tgs)", "TFLOPs", "grad norm", "params norm"),
}
"""Digits behind the point -> columns."""
