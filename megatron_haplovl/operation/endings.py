"""How a run ends: in one of four ways, in one sentence, with an exit code of its own."""

from __future__ import annotations

import enum
import os
import socket
from dataclasses import dataclass, field


class ExitCode(enum.IntEnum):
    """What whoever started the run should do next."""

    DONE = 0
    """Nothing: --train-iters are done."""
    NEEDS_PERSON = 1
    """Read the sentence: the same command would end in the same way."""
    MACHINE_FAULT = 70
    """Start the same command again; it goes on from the last checkpoint."""
    COME_BACK = 75
    """Start the same command again when there is time: everything is saved."""


BY_AGREEMENT = ("done", "leaving")
"""Causes of endings that every rank comes to by itself, after the same step."""


@dataclass(frozen=True)
class Ending:
    """The end of a run, as this rank knows it."""

    code: ExitCode
    sentence: str
    """What has happened, and what to do about it."""
    cause: str
    """Kind of the cause, without numbers and paths: two endings of one cause at one step are the same ending."""
    step: int | None = None
    """Optimizer steps that were done, if the run got that far."""
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    host: str = field(default_factory=socket.gethostname)


class RunEnd(Exception):  # noqa: N818 (it is not always an error)
    """Raised by whatever finds that the run must end.

    Args:
        code: see :class:`ExitCode`.
        sentence: see :class:`Ending`.
        cause: see :class:`Ending`.
        step: optimizer steps that were done.
    """

    def __init__(self, code: ExitCode, sentence: str, *, cause: str, step: int | None = None) -> None:
        super().__init__(sentence)
        self.ending = Ending(code, sentence, cause, step)
