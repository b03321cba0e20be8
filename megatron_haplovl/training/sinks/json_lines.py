"""The metrics file: a JSON object a line."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_haplovl.checkpoint.files import write_bytes
from megatron_haplovl.training.sinks.appended_file import AppendedFile

logger = logging.getLogger(__name__)


class JsonLines:
    """One JSON object per line: `{"iteration": ..., "time": ..., name: value, ...}`.

    Args:
        path: the file. What it holds of later steps than the run goes on from is taken away.
        first_step: steps that are done when the run starts.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        cut_back(path, first_step)
        self._file = AppendedFile(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        self._file.append(json.dumps({"iteration": step, "time": time.time(), **values}).encode() + b"\n")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Nothing: the file holds numbers."""

    def close(self) -> None:
        """See :class:`Sink`."""
        self._file.close()


def cut_back(path: Path, first_step: int) -> None:
    """Drop the lines of steps that will be done again, and what was left of half a line.

    A run that begins anew drops nothing: it sets the old file aside as `NAME.1`, or the first number that is free.

    Args:
        path: a metrics file, or none yet.
        first_step: steps that are done; their lines stay.

    Raises:
        ValueError: the file holds something else than metrics.
        OSError: it cannot be read or written.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return
    lines = path.read_bytes().splitlines(keepends=True)
    if _iteration(lines[0]) is None and len(lines) > 1:
        raise ValueError(f"{path}, line 1 is not a line of metrics: {lines[0][:60]!r}; give another --metrics-file")
    if first_step == 0:
        aside = next(aside for n in itertools.count(1) if not (aside := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(aside)
        logger.info(f"{path}: the run begins anew; what was there is {aside.name} now")
        return
    steps = [_iteration(line) for line in lines]
    stays = [step is not None and step <= first_step for step in steps]
    if all(stays):
        return
    kept = [line for line, stay in zip(lines, stays, strict=True) if stay]
    if all(stays[: len(kept)]):
        os.truncate(path, sum(map(len, kept)))
    else:
        write_bytes(path, b"".join(kept))
    logger.info(f"{path}: cut back to step {first_step}; {len(lines) - len(kept)} lines of later steps are dropped")


def _iteration(line: bytes) -> int | None:
    """The step of a line; None if it is not a whole line of metrics."""
    try:
        step = json.loads(line)["iteration"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
