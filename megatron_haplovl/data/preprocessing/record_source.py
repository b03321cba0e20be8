"""The records of all inputs, cut into parts that several processes read, each by itself.

A part is a number of records of one file that follow each other. How a process gets to them depends on the file:

    lines without compression   the main process looks for the lines' beginnings, a worker goes to the byte
    Parquet, Arrow, tar         the main process knows how many records there are, a worker jumps
    all others                  nobody knows where a record is without having read those before it: every worker reads
                                the file once, from beginning to end, and keeps the records of its own parts
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from megatron_haplovl.data.readers.inputs import find_inputs, kind_of
from megatron_haplovl.data.readers.json_lines import LineMark, line_marks, read_from_mark
from megatron_haplovl.data.records import RawRecord

_JUMPING = (".parquet", ".arrow", ".tar")


@dataclass(frozen=True)
class PartRange:
    """Some records of one file."""

    file: int
    """Number of the file."""
    number: int
    """Number of the part in the file."""
    first: int
    """Number of its first record in the file."""
    mark: LineMark | None = None
    """Where that is, in a file of lines."""

    @property
    def name(self) -> str:
        """Names of parts are in the order of the records."""
        return f"{self.file:05d}-{self.number:06d}"


class RecordSource:
    """All records of some inputs. Each process makes its own, or gets it by a fork before it has read anything.

    Args:
        inputs: files, folders and globs.
        records_per_part: records of each part but the last of a file.

    Raises:
        ValueError: an input does not exist or cannot be read.
    """

    def __init__(self, inputs: Sequence[str | Path], records_per_part: int) -> None:
        self.files = find_inputs(inputs)
        self.records_per_part = records_per_part
        self._streams: dict[int, tuple[int, Iterator[RawRecord]]] = {}

    def states(self) -> list[list[str | int]]:
        """Name, size and time of change of each file."""
        states = [(path, os.stat(path)) for path in self.files]
        return [[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in states]

    def is_stream(self, file: int) -> bool:
        """Whether the number of records is unknown before the file has been read."""
        name = self.files[file].name.lower()
        return not name.endswith((".jsonl", *_JUMPING))

    def parts(self, file: int) -> Iterator[PartRange]:
        """The parts of a file, in order; those of a stream never end."""
        path = self.files[file]
        if path.name.lower().endswith(".jsonl"):
            marks = line_marks(path, self.records_per_part)
            ranges = (
                PartRange(file, number, number * self.records_per_part, mark) for number, (mark, _) in enumerate(marks)
            )
            yield from ranges
            return
        numbers = count() if self.is_stream(file) else range(self._divide(kind_of(path).count(path)))
        for number in numbers:
            yield PartRange(file, number, number * self.records_per_part)

    def count_parts(self, file: int) -> int:
        """Number of parts of a file. A stream is read for it."""
        if self.is_stream(file):
            return self._divide(kind_of(self.files[file]).count(self.files[file]))
        return sum(1 for _ in self.parts(file))

    def _divide(self, records: int) -> int:
        return -(-records // self.records_per_part)

    def read(self, part: PartRange) -> Iterator[RawRecord]:
        """The records of a part; none if the file ends before it.

        Raises:
            ValueError: the file is damaged or cut short.
        """
        path = self.files[part.file]
        if part.mark is not None:
            records = read_from_mark(path, part.mark, self.records_per_part)
        elif self.is_stream(part.file):
            records = self._read_stream(part)
        else:
            records = islice(kind_of(path).read(path, part.first), self.records_per_part)
        for raw in records:
            yield raw if len(self.files) == 1 else RawRecord(f"{path} {raw.location}", raw.value)

    def _read_stream(self, part: PartRange) -> Iterator[RawRecord]:
        position, stream = self._streams.pop(part.file, (0, iter(())))
        if position == 0 or position > part.first:
            path = self.files[part.file]
            position, stream = 0, kind_of(path).read(path, 0)
        # Only one stream is kept open.
        self._streams = {part.file: (part.first + self.records_per_part, stream)}
        for _ in islice(stream, part.first - position):
            pass
        yield from islice(stream, self.records_per_part)
