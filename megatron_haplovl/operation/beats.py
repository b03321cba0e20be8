"""What every rank tells the others once a second."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """A rank's place in the run, as it sees itself. All seconds are those in which the process was running."""

    rank: int
    host: str
    pid: int
    number: int
    """Beats before this one."""
    step: int
    """Optimizer step that is under way, counted from 1."""
    phase: str
    order: int
    """See `phase.Moment`."""
    in_phase: float
    """Seconds since the phase began."""
    still: float
    """Seconds since the main thread has last moved."""
    waits: bool
    """Whether the main thread waits for other ranks."""
    settled: bool
    """Whether the first step is done. Before, compilers and file systems may need minutes."""
    reading: str = ""
    """What the loader is asked for, in the phase `loader`."""
    left: bool = False
    """Whether the rank has ended by itself."""

    @property
    def position(self) -> tuple[int, int]:
        """The smaller one is behind."""
        return self.step, self.order

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def of_json(text: str | bytes) -> Beat:
        """The opposite of :meth:`to_json`."""
        return Beat(**json.loads(text))

    def who(self) -> str:
        """The rank by its number, machine and process."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    def where(self) -> str:
        """The phase and the step."""
        if self.step == 0:
            return f"phase {self.phase}, before the first step"
        return f"phase {self.phase} of step {self.step}" + (f", which needs {self.reading}" if self.reading else "")


@dataclass(frozen=True)
class Seen:
    """The last beat of a rank that has arrived here."""

    beat: Beat
    age: float
    """Seconds since it arrived."""

    @property
    def quiet(self) -> float:
        """Seconds since the rank is known to have moved."""
        return self.beat.still + self.age
