"""Tar shards in the WebDataset convention: members that share a stem and follow each other are one sample.

The stem of `a/000001.left.jpg` is `a/000001`, and `left.jpg` is the member's key in the sample.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

from megatron_haplovl.data.readers.json_lines import parse_json
from megatron_haplovl.data.readers.streams import open_stream
from megatron_haplovl.data.records import RawRecord, Reason, RecordError

_TEXTS = ("txt", "text", "caption")


def read_tar(path: Path, first: int) -> Iterator[RawRecord]:
    """Samples `first`, `first + 1`, ... as `{"__key__": STEM, "json": OBJECT, "jpg": BYTES, "txt": STRING, ...}`.

    Of a shard without compression, the members before them are not read.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    with _open(path) as tar:
        yield from _samples(tar, first)


def count_tar(path: Path) -> int:
    """Number of samples. Of a shard without compression, only the headers are read.

    Raises:
        ValueError: as :func:`read_tar`.
    """
    with _open(path) as tar:
        return sum(1 for _ in groupby(_members(tar), key=_stem))


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    is_plain = path.name.lower().endswith(".tar")
    try:
        with open_stream(path) as stream:
            with tarfile.open(fileobj=stream, mode="r:" if is_plain else "r|") as tar:
                yield tar
                end = tar.offset
            if is_plain:
                _check_end(stream, end)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a tar file, it is damaged or cut short: {error}") from error


def _check_end(stream: IO[bytes], end: int) -> None:
    """A tar file that is cut in a header would look complete."""
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the block at its end is missing")


def _samples(tar: tarfile.TarFile, first: int) -> Iterator[RawRecord]:
    seen: set[str] = set()
    for number, (stem, group) in enumerate(groupby(_members(tar), key=_stem)):
        if number >= first:
            value: Any = _sample(tar, stem, group)
            if stem in seen:
                value = RecordError(Reason.UNPARSABLE, f"members of {stem!r} do not stand together in the tar file")
            yield RawRecord(f"member {stem}", value)
        seen.add(stem)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """What may belong to samples: no folders, and no hidden files."""
    return (member for member in tar if not member.isdir() and not PurePosixPath(member.name).name.startswith("."))


def _stem(member: tarfile.TarInfo) -> str:
    return _split(member.name)[0]


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, key = path.name.partition(".")
    return str(path.parent / stem), key


def _sample(tar: tarfile.TarFile, stem: str, members: Iterator[tarfile.TarInfo]) -> dict[str, Any] | RecordError:
    sample: dict[str, Any] = {"__key__": stem}
    problem: RecordError | None = None
    for member in members:
        key = _split(member.name)[1]
        data = tar.extractfile(member) if member.isreg() else None
        if data is None or key in sample:
            what = "is no regular file" if data is None else "is there twice"
            problem = problem or RecordError(Reason.UNPARSABLE, f"member {member.name!r} {what}")
            continue
        sample[key] = _value(key, data.read())
        if isinstance(sample[key], RecordError):
            problem = problem or RecordError(Reason.UNPARSABLE, f"member {member.name!r}: {sample[key].detail}")
    return problem or sample


def _value(key: str, data: bytes) -> Any:
    ending = key.lower().rpartition(".")[2]
    if ending == "json":
        return parse_json(data)
    if ending in _TEXTS:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return RecordError(Reason.UNPARSABLE, str(error))
    return data
