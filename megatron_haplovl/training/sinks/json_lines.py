"""The metrics file: a JSON object a line."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_haplovl.checkpoint.files import write_bytes
from megatron_haplovl.training.sinks.appended_file import AppendedFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ThisStart:
    """What a start of a run knows of itself."""

    run_id: str = ""
    ending_before: Callable[[float], str | None] = lambda _since: None
    """What the start before said last, if that was after a moment (seconds since 1970)."""


@dataclass(frozen=True)
class Cut:
    """What was done to a file when a run went on with it."""

    repeated: int = 0
    """Steps that stood in the file and will be done again."""
    aside: str | None = None
    """Name that the whole file has now, because the run begins anew."""
    last_start: float | None = None
    """When the start before began; where no line says so, when the last line was written."""


class JsonLines:
    """One JSON object per line: `{"iteration": ..., "time": ..., name: value, ...}`.

    Each start of the run has a line of its own, with the key `start`.

    Args:
        path: the file. What it holds of later steps than the run goes on from is taken away.
        first_step: steps that are done when the run starts.
        start: what its line says of it.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, first_step: int, start: ThisStart) -> None:
        cut = cut_back(path, first_step)
        self._file = AppendedFile(path)
        about = {
            "start": first_step,
            "run id": start.run_id,
            "repeated steps": cut.repeated,
            "set aside": cut.aside,
            "ending before": None if cut.last_start is None else start.ending_before(cut.last_start),
        }
        # On a full disk the line waits for room, and the values behind it report the error.
        with contextlib.suppress(OSError):
            self._file.append(_line(first_step, about))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        self._file.append(_line(step, values))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Nothing: the file holds numbers."""

    def close(self) -> None:
        """See :class:`Sink`."""
        self._file.close()


def cut_back(path: Path, first_step: int) -> Cut:
    """Drop the lines of steps that will be done again, and what was left of half a line.

    Lines of starts stay, at whatever step they began. A run that begins anew drops nothing: it sets the old file aside
    as `NAME.1`, or the first number that is free, unless it holds lines of starts only.

    Args:
        path: a metrics file, or none yet.
        first_step: steps that are done; their lines stay.

    Raises:
        ValueError: the file holds something else than metrics.
        OSError: it cannot be read or written.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return Cut()
    lines = path.read_bytes().splitlines(keepends=True)
    heads = [_head(line) for line in lines]
    if heads[0] is None and len(lines) > 1:
        raise ValueError(f"{path}, line 1 is not a line of metrics: {lines[0][:60]!r}; give another --metrics-file")
    whole = [head for head in heads if head is not None]
    last_start = max((h.time for h in [h for h in whole if h.is_start] or whole), default=None)
    if first_step == 0 and not all(head is not None and head.is_start for head in heads):
        aside = next(aside for n in itertools.count(1) if not (aside := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(aside)
        logger.info(f"{path}: the run begins anew; what was there is {aside.name} now")
        return Cut(aside=aside.name, last_start=last_start)
    reached = max((head.step for head in whole if not head.is_start), default=first_step)
    cut = Cut(repeated=max(0, reached - first_step), last_start=last_start)
    stays = [head is not None and (head.is_start or head.step <= first_step) for head in heads]
    if all(stays):
        return cut
    kept = [line for line, stay in zip(lines, stays, strict=True) if stay]
    if all(stays[: len(kept)]):
        os.truncate(path, sum(map(len, kept)))
    else:
        write_bytes(path, b"".join(kept))
    logger.info(f"{path}: cut back to step {first_step}; {len(lines) - len(kept)} lines of later steps are dropped")
    return cut


def _line(step: int, values: Mapping[str, object]) -> bytes:
    return json.dumps({"iteration": step, "time": time.time(), **values}).encode() + b"\n"


class _Head(NamedTuple):
    """What says whether a line stays."""

    step: int
    time: float
    is_start: bool


def _head(line: bytes) -> _Head | None:
    """The head of a line; None if it is not a whole line of metrics."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else {}
        step, seconds = found["iteration"], found.get("time", 0.0)
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(step, int) or not isinstance(seconds, int | float):
        return None
    return _Head(step, seconds, "start" in found)
