"""JSON lines: one record a line. Blank lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_haplovl.data.readers.streams import open_stream
from megatron_haplovl.data.records import RawRecord, Reason, RecordError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json_lines(path: Path, first: int) -> Iterator[RawRecord]:
    """Records `first`, `first + 1`, ...; those before them are not parsed. A line that is no JSON has an error.

    Raises:
        ValueError: the file is damaged or cut short, or is UTF-16.
    """
    seen = 0
    with open_stream(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise ValueError(f"{path} is UTF-16; save it as UTF-8")
            if not line.strip():
                continue
            seen += 1
            if seen > first:
                yield RawRecord(f"line {number}", parse_json(line))


def count_json_lines(path: Path) -> int:
    """Number of records. Nothing is parsed."""
    with open_stream(path) as lines:
        return sum(1 for line in lines if line.strip())


def parse_json(text: bytes) -> Any:
    """The value, or a :class:`RecordError` that says why there is none."""
    try:
        return json.loads(text)
    # A ValueError is also an integer of more digits than Python converts.
    except (ValueError, RecursionError) as error:
        return RecordError(Reason.UNPARSABLE, str(error))


@dataclass(frozen=True)
class LineMark:
    """A place in a file without compression from which records can be read."""

    offset: int
    """Byte at which the line begins."""
    line: int
    """Number of the line, from 1."""


def line_marks(path: Path, every: int) -> Iterator[tuple[LineMark, int]]:
    """Where each `every` records begin, and how many of them there are from there on (less only at the end).

    Lines are looked for and not parsed, about a million in a second.
    """
    mark, count, offset, number = LineMark(0, 1), 0, 0, 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if count == every:
                yield mark, count
                mark, count = LineMark(offset, number), 0
            offset += len(line)
            count += bool((line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).strip())
    if count:
        yield mark, count


def read_from_mark(path: Path, mark: LineMark, count: int) -> Iterator[RawRecord]:
    """The `count` records from a mark on, as :func:`read_json_lines` gives them."""
    if mark.offset == 0:
        yield from islice(read_json_lines(path, 0), count)
        return
    with path.open("rb") as lines:
        lines.seek(mark.offset)
        records = (
            RawRecord(f"line {number}", parse_json(line))
            for number, line in enumerate(lines, start=mark.line)
            if line.strip()
        )
        yield from islice(records, count)
