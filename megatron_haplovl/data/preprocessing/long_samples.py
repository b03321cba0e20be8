"""What becomes of a record that is longer than a sequence: `--long-samples`.

A conversation is cut between a question and the answer before it. A system message stands in front of every piece.
`cut` keeps the longest beginning that fits. `split` goes on with the turns behind it as a sample of its own, which
begins with the images and videos of all turns before it, each on a line of its own, because its questions may ask about
them. Where these and the next turn do not fit, the remaining turns are left out.

A document is cut between two words or beside an image; its pieces follow each other, and nothing is repeated. An image
at the end of a piece goes with the text behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_haplovl.data.records import Message, Part, Record

LONG_SAMPLES = {
    "error": "a record that is too long cannot be used",
    "skip": "it is left out",
    "cut": "turns at its end are left out until it fits",
    "split": "it becomes several samples at its turns",
}
"""Every choice of `--long-samples`, and what becomes of a record that is too long."""

CUT, SPLIT = "long_sample_cut", "long_sample_split"
CHANGES = {CUT: "the end of a sample that was too long is left out", SPLIT: "one that was too long is several samples"}
"""Under these names the manifest's `repairs` count the records."""

_WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True)
class Fitted:
    """What is left of a record that was too long."""

    pieces: tuple[Record, ...]
    """Records that fit, in order; none if not even the first turn does."""
    repairs: tuple[str, ...]
    """`CUT` if something is left out, `SPLIT` if there are several pieces."""


def fit_record(record: Record, fits: Callable[[Record], bool], choice: str) -> Fitted:
    """Make records that fit of one that does not.

    Args:
        record: a record that is too long.
        fits: whether a piece fits into a sequence, its visual tokens included.
        choice: `cut` or `split`.
    """
    assert choice in ("cut", "split")
    whole = _Document(record) if record.is_document else _Conversation(record)
    pieces: list[Record] = []
    start = 0
    while not (pieces and choice == "cut"):
        end = whole.longest(start, fits)
        if end == start:
            break
        pieces.append(whole.piece(start, end))
        start = end
    repairs = ((CUT,) if whole.holds_something(start) else ()) + ((SPLIT,) if len(pieces) > 1 else ())
    return Fitted(tuple(pieces), repairs)


class _Conversation:
    """A conversation by its turns, a question and its answer each."""

    def __init__(self, record: Record) -> None:
        messages = record.messages
        self._opening = messages[:1] if messages[0].role == "system" else ()
        turns = messages[len(self._opening) :]
        self._turns = [turns[i : i + 2] for i in range(0, len(turns), 2)]

    def piece(self, start: int, end: int) -> Record:
        """The turns `[start, end)`, behind the media of the turns before them."""
        seen = [medium for turn in self._turns[:start] for message in turn for medium in message.media]
        repeated: list[Part] = [part for medium in seen for part in (medium, "\n")]
        (question, *others), *turns = self._turns[start:end]
        first = (Message(question.role, (*repeated, *question.parts)), *others)
        return Record((*self._opening, *first, *(message for turn in turns for message in turn)))

    def longest(self, start: int, fits: Callable[[Record], bool]) -> int:
        """The end of the longest piece that fits; `start` if none does."""
        # One by one: with a second image the first may need fewer tokens, so a longer piece may be the one that fits.
        ends = range(len(self._turns), start, -1)
        return next((end for end in ends if fits(self.piece(start, end))), start)

    def holds_something(self, start: int) -> bool:
        """Whether there are turns from `start` on."""
        return start < len(self._turns)


class _Document:
    """A document by its words and media."""

    def __init__(self, record: Record) -> None:
        self._role = record.messages[0].role
        parts = record.messages[0].parts
        self._units = [unit for p in parts for unit in (_WORD.findall(p) if isinstance(p, str) else (p,))]

    def piece(self, start: int, end: int) -> Record:
        """The words and media `[start, end)`."""
        parts: list[Part] = []
        for is_text, run in groupby(self._units[start:end], key=lambda unit: isinstance(unit, str)):
            units: list[Any] = list(run)
            parts += ["".join(units)] if is_text else units
        if start and parts and isinstance(parts[0], str):
            parts[0] = parts[0].lstrip()
        return Record((Message(self._role, tuple(parts)),), is_document=True)

    def longest(self, start: int, fits: Callable[[Record], bool]) -> int:
        """The end of a piece that fits and does not with one word more; `start` if there is none with text in it."""
        count = len(self._units)
        ends = [end for end in range(start + 1, count + 1) if end == count or isinstance(self._units[end - 1], str)]

        def is_possible(number: int) -> bool:
            piece = self.piece(start, ends[number])
            return not piece.messages[0].text.strip() or fits(piece)

        # Twice as long and twice again, then by halves: a book is not encoded as a whole for each of its pieces.
        low, high = -1, 0
        while high < len(ends) and is_possible(high):
            low, high = high, 2 * high + 1
        high = min(high, len(ends))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_possible(middle) else (low, middle)
        if low < 0 or not self.piece(start, ends[low]).messages[0].text.strip():
            return start
        return ends[low]

    def holds_something(self, start: int) -> bool:
        """Whether there is more than blanks from `start` on."""
        return any(not isinstance(unit, str) or unit.strip() for unit in self._units[start:])
