"""The values of a run, column by column, from the file of --metrics-file: whatever state that file is in."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VALIDATION = "valid "
"""What the names of held-out columns begin with."""
_NOT_COLUMNS = ("iteration", "time")
_NAMED = 3
"""Places in a file that a note names."""


@dataclass
class Column:
    """A column's values by step, each step once and in rising order."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    times: array[float] = field(default_factory=lambda: array("d"))
    """Seconds since 1970; NaN where the line has none."""

    def add(self, step: int, value: float, time: float) -> int:
        """Add a value; returns how many earlier ones it takes the place of, because their steps were done again."""
        dropped = 0
        while self.steps and self.steps[-1] >= step:
            for part in (self.steps, self.values, self.times):
                part.pop()
            dropped += 1
        self.steps.append(step)
        self.values.append(value)
        self.times.append(time)
        return dropped


@dataclass(frozen=True)
class Start:
    """A start of the run, from its own line."""

    step: int
    """Steps that were done when it began."""
    time: float
    """Seconds since 1970; NaN where the line has none."""
    run_id: str = ""
    repeated: int = 0
    """Steps that had been logged before and were done again."""
    aside: str | None = None
    """File that holds what was logged before."""
    ending_before: str | None = None
    """What the start before said last."""


@dataclass(frozen=True)
class Restart:
    """A place where steps begin again, in a file without lines of starts."""

    reached: int
    """Last step that was logged before."""
    again_from: int
    """First step that was logged again."""


@dataclass
class Metrics:
    """What a file holds."""

    path: Path
    columns: dict[str, Column] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    """In the order in which they began."""
    restarts: list[Restart] = field(default_factory=list)
    lines: int = 0
    notes: list[str] = field(default_factory=list)
    """What of the file is not shown, in sentences."""

    def column(self, name: str) -> Column:
        """A column, without values if the file has none of this name."""
        return self.columns.get(name, Column())


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file line by line.

    Broken lines, repeated steps and values that are no numbers are counted and named in the notes; nothing of them ends
    the reading.

    Raises:
        ValueError: there is no such file, or it cannot be opened.
    """
    found, faults = Metrics(path), _Faults()
    reached: int | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                found.lines = number
                record = _record(line)
                if record is None:
                    faults.broken.append(number)
                    continue
                step = record["iteration"]
                if "start" in record:
                    found.starts.append(_start(record))
                    continue
                if not all(name.startswith(VALIDATION) for name in record if name not in _NOT_COLUMNS):
                    if reached is not None and step <= reached:
                        found.restarts.append(Restart(reached, step))
                    reached = step
                faults.repeated += _add(found, record, step, faults)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    found.notes = faults.sentences(path, found)
    return found


@dataclass
class _Faults:
    broken: list[int] = field(default_factory=list)
    repeated: int = 0
    no_numbers: Counter[str] = field(default_factory=Counter)
    not_finite: Counter[str] = field(default_factory=Counter)

    def sentences(self, path: Path, found: Metrics) -> list[str]:
        notes = []
        if found.lines == 0:
            notes.append(f"{path} is empty.")
        if self.broken:
            named = ", ".join(map(str, self.broken[:_NAMED]))
            more = "" if len(self.broken) <= _NAMED else " and others"
            notes.append(
                f"{len(self.broken)} of {found.lines} lines are broken or half and are left out (line {named}{more})."
            )
        if self.repeated:
            notes.append(
                f"{self.repeated} values are of steps that were done again after a restart; the later ones are shown."
            )
        for name, number in sorted(self.no_numbers.items()):
            notes.append(f"{name!r} is no number in {number} lines; these are left out.")
        for name, number in sorted(self.not_finite.items()):
            notes.append(f"{name!r} is NaN or infinite {number} times; the curve has a gap there.")
        return notes


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("iteration")
    return record if isinstance(step, int) and not isinstance(step, bool) and abs(step) < 2**62 else None


def _start(record: dict[str, Any]) -> Start:
    run_id, repeated = record.get("run id"), record.get("repeated steps")
    aside, ending = record.get("set aside"), record.get("ending before")
    return Start(
        record["iteration"],
        _seconds(record),
        run_id if isinstance(run_id, str) else "",
        repeated if isinstance(repeated, int) else 0,
        aside if isinstance(aside, str) else None,
        ending if isinstance(ending, str) else None,
    )


def _seconds(record: dict[str, Any]) -> float:
    time = record.get("time")
    return _float(time) if isinstance(time, int | float) and not isinstance(time, bool) else math.nan


def _add(found: Metrics, record: dict[str, Any], step: int, faults: _Faults) -> int:
    seconds, repeated = _seconds(record), 0
    for name, value in record.items():
        if name in _NOT_COLUMNS:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            faults.no_numbers[name] += 1
            continue
        number = _float(value)
        if not math.isfinite(number):
            faults.not_finite[name] += 1
            number = math.nan
        if name not in found.columns:
            found.columns[name] = Column()
        repeated += found.columns[name].add(step, number, seconds)
    return repeated


def _float(value: int | float) -> float:
    """JSON's integers have no bounds."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
