"""A JSON file that holds one list of records, read as a stream: memory for one block, or the longest record.

Each record is parsed by the standard library, exactly as :func:`json.loads` would parse the whole file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_haplovl.data.readers.json_lines import parse_json, read_json_lines
from megatron_haplovl.data.readers.streams import open_stream
from megatron_haplovl.data.records import RawRecord, Reason, RecordError

_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
# What ends a value, strings skipped; a quote alone opens a string that does not end here.
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},"]', re.DOTALL)
# Bytes that are no UTF-8, as errors="surrogateescape" decodes them.
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]")
# What is cut off by the end of a block, such as `-Infinit`, fails at most so many characters before that end.
_LONGEST_WORD = 16


def read_json(path: Path, first: int) -> Iterator[RawRecord]:
    """Records `first`, `first + 1`, ... of a list; or of JSON lines, if the first line is an object.

    Raises:
        ValueError: the file holds something else, or is damaged or cut short.
    """
    with open_stream(path) as stream:
        start = _first_line(stream)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{path} is UTF-16; save it as UTF-8")
        is_lines = False
        if not start.removeprefix(codecs.BOM_UTF8).startswith(b"["):
            value = parse_json(start.removeprefix(codecs.BOM_UTF8))
            is_lines = isinstance(value, dict) and bool(value)
    if is_lines:
        yield from read_json_lines(path, first)
        return
    with open_stream(path) as stream:
        for index, value in enumerate(_elements(stream, path)):
            if index >= first:
                yield RawRecord(f"index {index}", value)


def count_json(path: Path) -> int:
    """Number of records; takes as long as reading them.

    Raises:
        ValueError: as :func:`read_json`.
    """
    return sum(1 for _ in read_json(path, 0))


def _first_line(stream: IO[bytes]) -> bytes:
    """The first line that is not blank; of a list no more than its first character matters."""
    start = stream.read(1)
    while start.isspace():
        start = stream.read(1)
    return start if start == b"[" else start + stream.readline()


def _elements(stream: IO[bytes], path: Path) -> Iterator[Any]:
    text = _Text(stream)
    opening = text.peek()
    if opening != "[":
        kind = {"{": "dict", '"': "str", "": "nothing"}.get(opening, "text")
        valid = "" if opening in ("{", '"', "") else f"{path} is not valid JSON: it begins with {opening!r}; "
        raise ValueError(f"{valid}{path} must hold a list of records, not {kind}, or one record a line")
    text.skip()
    index = 0
    mark = text.peek()
    while mark != "]":
        try:
            yield text.value()
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not valid JSON: {error.msg} at index {index}, character {text.passed + error.pos}"
            ) from error
        mark = text.peek()
        text.skip()
        if mark == "":
            raise ValueError(f"{path} is not valid JSON: it ends behind index {index}, the list is not closed")
        if mark not in (",", "]"):
            raise ValueError(f"{path} is not valid JSON: {mark!r} behind index {index}, where ',' or ']' is expected")
        index += 1
    if index == 0:
        text.skip()
    if text.peek():
        raise ValueError(f"{path} is not valid JSON: there is more behind the list, {text.peek()!r}")


class _Text:
    """The characters of a stream that are not used yet; more are read when they are needed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self._position = 0
        self._is_damaged = False
        self.passed = 0
        """Characters before those that are held."""

    def _more(self) -> bool:
        # At least as much as there is, so that the time for a long record is in proportion to its length.
        block = self._stream.read(max(_BLOCK, len(self._text) - self._position))
        self.passed += self._position
        text = self._decoder.decode(block, final=not block)
        self._is_damaged = self._is_damaged or not _is_unicode(text)
        self._text = self._text[self._position :] + text
        self._position = 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self._position = _SPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text) or not self._more():
                return self._text[self._position : self._position + 1]

    def skip(self) -> None:
        """Go past one character."""
        self._position += 1

    def value(self) -> Any:
        """The next value, or a :class:`RecordError` for one whose syntax is right and which cannot be converted.

        Raises:
            json.JSONDecodeError: the syntax is wrong, or the stream ends in the value.
        """
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if is_cut and self._more():
                    continue
                raise
            except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, lists in lists
                value, end = RecordError(Reason.UNPARSABLE, str(error)), self._end_of_value()
            else:
                if end == len(self._text) and self._more():
                    continue  # a number may go on
                if self._is_damaged and _ESCAPED_BYTES.search(self._text, self._position, end):
                    value = RecordError(Reason.UNPARSABLE, "the record is not UTF-8")
            self._position = end
            return value

    def _end_of_value(self) -> int:
        while True:
            depth = 0
            for found in _STRUCTURE.finditer(self._text, self._position):
                mark = found[0]
                if mark == '"':
                    break
                if depth == 0 and mark in (",", "]", "}"):
                    return found.start()
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark, 0)
                if depth == 0 and mark in ("]", "}"):
                    return found.end()
            if not self._more():
                raise json.JSONDecodeError("Unterminated value", self._text, self._position)


def _is_unicode(text: str) -> bool:
    """Faster than a search for what :data:`_ESCAPED_BYTES` finds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
