"""Which part is made next, and which is joined next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from megatron_haplovl.data.preprocessing.parts_folder import PartDone
from megatron_haplovl.data.preprocessing.record_source import PartRange, RecordSource


@dataclass(frozen=True)
class Span:
    """Parts of one file that are to be made."""

    file: int
    first: int = 0
    stop: int | None = None
    """None if all there are, however many."""


def all_spans(source: RecordSource) -> list[Span]:
    """Everything."""
    return [Span(file) for file in range(len(source.files))]


def share_of(source: RecordSource, index: int, total: int) -> list[Span]:
    """The `index`-th of `total` shares: parts that follow each other, as many in each as the division allows.

    Every file's parts are counted for it, so streams are read once.
    """
    counts = [source.count_parts(file) for file in range(len(source.files))]
    first, stop = sum(counts) * index // total, sum(counts) * (index + 1) // total
    spans: list[Span] = []
    start = 0
    for file, parts in enumerate(counts):
        inside = Span(file, max(first - start, 0), min(stop - start, parts))
        if inside.stop is not None and inside.first < inside.stop:
            spans.append(inside)
        start += parts
    return spans


class Schedule:
    """The order of the work.

    Args:
        source: the records.
        spans: what is to be made.
        finished: parts that are there already, by name.
        ends: number of parts of each file, if it is known from before.
    """

    def __init__(
        self, source: RecordSource, spans: list[Span], finished: Mapping[str, PartDone], ends: Mapping[int, int] | None
    ) -> None:
        self._source = source
        self._spans = spans
        self._done = dict(finished)
        self._skip = frozenset(finished)
        self.ends: dict[int, int] = dict(ends or {})
        """Number of the part behind the last one of each file, where it is known."""
        for done in finished.values():
            self._learn_end(done)
        self._to_make = self._generate()
        self._span = 0
        self._number = spans[0].first if spans else 0

    def _generate(self) -> Iterator[PartRange]:
        for span in self._spans:
            following = span.first
            for part in islice(self._source.parts(span.file), span.first, span.stop):
                if part.number >= self.ends.get(span.file, part.number + 1):
                    break
                following = part.number + 1
                if part.name not in self._skip:
                    yield part
            if span.stop is not None or not self._source.is_stream(span.file):
                self.ends[span.file] = following

    def next_to_make(self) -> PartRange | None:
        """A part that nobody makes yet, or None if there are no more."""
        return next(self._to_make, None)

    def add(self, done: PartDone) -> None:
        """A part has been made."""
        self._done[done.name] = done
        self._learn_end(done)

    def _learn_end(self, done: PartDone) -> None:
        """The end of a stream is known by the first part that is not full."""
        file, number = (int(word) for word in done.name.split("-"))
        if done.records < self._source.records_per_part and self._source.is_stream(file):
            end = number + (done.records > 0)
            self.ends[file] = min(end, self.ends.get(file, end))

    @property
    def is_over(self) -> bool:
        """Whether every part has been joined."""
        while self._span < len(self._spans) and self.ends.get(self._spans[self._span].file) == self._number:
            self._span += 1
            self._number = self._spans[self._span].first if self._span < len(self._spans) else 0
        return self._span == len(self._spans)

    def next_to_join(self) -> PartDone | None:
        """The part that follows the last one joined, or None if it has not been made yet."""
        if self.is_over:
            return None
        done = self._done.pop(PartRange(self._spans[self._span].file, self._number, 0).name, None)
        if done is None:
            return None
        self._learn_end(done)
        if done.records == 0:
            return self.next_to_join()
        self._number += 1
        return done
