"""What a rank is doing, for whoever watches it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PHASES = ("start", "loader", "forward", "backward", "reduce", "evaluate", "save", "end")
"""In a step: loader, forward and backward for each micro-batch, then reduce (sums over ranks, optimizer)."""


EnterPhase = Callable[[str], None]
"""`PhaseClock.enter`, for code that must not know who watches."""


@dataclass(frozen=True)
class Moment:
    """A rank's place in the run."""

    phase: str
    step: int
    """Number of the optimizer step that is under way, counted from 1; 0 before the first."""
    since: float
    """`time.monotonic()` when the phase began."""
    order: int
    """Phases entered so far, without `loader`, which not every stage of a pipeline has: in one step, the rank that is
    behind has the smaller number."""


@dataclass(frozen=True)
class Spent:
    """How often a phase was entered, and how long it took together."""

    times: int = 0
    seconds: float = 0.0


class PhaseClock:
    """Keeps the moment. The training thread writes it and a watching thread reads it; the assignment is atomic."""

    def __init__(self) -> None:
        self.moment = Moment("start", 0, time.monotonic(), 0)
        self.listeners: list[EnterPhase] = []
        """Are told of every phase, in the training thread."""
        self.spent: dict[str, Spent] = {}
        """Of the phases that were entered by :meth:`during`: how often, and how long they took."""
        self.reading: Callable[[], str] = lambda: ""
        """Says what the loader is asked for: step and sources. Called by the watching thread in the phase `loader`."""

    def enter(self, phase: str) -> None:
        """Say what begins now."""
        assert phase in PHASES, phase
        self._begin(phase, self.moment.order + 1)

    def start_step(self, step: int) -> None:
        """Say which optimizer step begins, counted from 1."""
        self.moment = Moment(self.moment.phase, step, time.monotonic(), self.moment.order + 1)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase inside another one, which goes on behind it."""
        assert phase in PHASES, phase
        before, counted, started = self.moment.phase, int(phase != "loader"), time.monotonic()
        self._begin(phase, self.moment.order + counted)
        try:
            yield
        finally:
            spent = self.spent.get(phase, Spent())
            self.spent[phase] = Spent(spent.times + 1, spent.seconds + time.monotonic() - started)
            self._begin(before, self.moment.order + counted)

    def _begin(self, phase: str, order: int) -> None:
        self.moment = Moment(phase, self.moment.step, time.monotonic(), order)
        for listener in self.listeners:
            listener(phase)
