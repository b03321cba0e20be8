"""JSON lines: one record a line. Blank lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
