"""Parquet files, and Arrow files of both kinds: the stream that `save_to_disk` writes, and the file with an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_haplovl.data.records import RawRecord, Reason, RecordError

if TYPE_CHECKING:
    import pyarrow

# Rows that become Python objects at once; a row may hold images.
_ROWS = 32
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path, first: int) -> Iterator[RawRecord]:
    """Rows `first`, `first + 1`, ... as objects; row groups before them are not read.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # Without buffers of a whole row group, which may be a gigabyte of images.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if end > first:
                    batches = file.iter_batches(_ROWS, row_groups=[group], use_threads=False)
                    yield from _rows(batches, start, first)
                start = end
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet, it is damaged or cut short: {error}") from error


def count_parquet(path: Path) -> int:
    """Number of rows.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet, it is damaged or cut short: {error}") from error


def read_arrow(path: Path, first: int) -> Iterator[RawRecord]:
    """Rows `first`, `first + 1`, ... as objects. The file is mapped, so that rows before them are not read.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            yield from _rows(_arrow_batches(file), 0, first)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Arrow, it is damaged or cut short: {error}") from error


def count_arrow(path: Path) -> int:
    """Number of rows. The file is mapped, so that no row is read.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            return sum(batch.num_rows for batch in _arrow_batches(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Arrow, it is damaged or cut short: {error}") from error


def _arrow_batches(file: pyarrow.MemoryMappedFile) -> Iterator[pyarrow.RecordBatch]:
    from pyarrow import ipc

    if file.size() >= 6 and file.read_at(6, 0) == b"ARROW1":
        with ipc.open_file(file) as indexed:
            for number in range(indexed.num_record_batches):
                yield indexed.get_batch(number)
        return
    # A stream that is cut between two batches would look complete.
    size = len(_END_OF_STREAM)
    if file.size() < size or file.read_at(size, file.size() - size) != _END_OF_STREAM:
        raise OSError("the mark at the end of the stream is missing")
    with ipc.open_stream(file) as stream:
        yield from stream


def _rows(batches: Iterable[pyarrow.RecordBatch], start: int, first: int) -> Iterator[RawRecord]:
    """Rows from `first` on; the first batch begins with row `start`."""
    for batch in batches:
        end = start + batch.num_rows
        for begin in range(max(start, first), end, _ROWS):
            rows = _objects(batch.slice(begin - start, min(_ROWS, end - begin)))
            for number, row in enumerate(rows, start=begin):
                yield RawRecord(f"row {number}", row)
        start = end


def _objects(batch: pyarrow.RecordBatch) -> list[Any]:
    """The rows; a :class:`RecordError` for one that holds text that is no UTF-8, or a date beyond Python's."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [RecordError(Reason.UNPARSABLE, str(error))]
        return [row for number in range(batch.num_rows) for row in _objects(batch.slice(number, 1))]
