"""What a run had to leave out, because it could not be read (--skip-bad-samples).

A document that cannot be read is missing from its pack, as if the plan had never had it. The counts of a step are the
plan's, less those of such documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadDocument:
    """One document of a pack that could not be read."""

    place: int
    """Which document of the pack, from 0."""
    samples: tuple[tuple[int, int], ...]
    """(source, sample) of those of its samples that could not be read."""
    reason: str
    item_counts: tuple[tuple[int, ...], ...]
    """For each of its samples: the source, and what the plan counts (`plan.packs.ITEM_COUNT_NAMES`)."""


@dataclass(frozen=True)
class Gap:
    """What is missing in one pack."""

    pack: int
    """Number of the pack in the plan."""
    documents: tuple[BadDocument, ...]
    """At least one, in the order of their places."""
    tokens: int
    """Length of these documents together, as planned."""

    @property
    def places(self) -> frozenset[int]:
        """Which documents of the pack are missing."""
        return frozenset(document.place for document in self.documents)


Missing = Mapping[int, tuple[BadDocument, ...]]
"""Pack -> documents that are left out of it, whether they can be read or not."""


def gaps_to_json(gaps: Iterable[Gap]) -> list[dict[str, Any]]:
    """Plain values, for a checkpoint."""
    return [dataclasses.asdict(gap) for gap in gaps]


def gaps_from_json(value: Any) -> list[Gap]:
    """What :func:`gaps_to_json` has made.

    Raises:
        ValueError: anything else.
    """
    try:
        return [_gap(fields) for fields in value]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"this is no list of gaps: {str(value)[:200]}") from error


def _gap(fields: Any) -> Gap:
    documents = tuple(
        BadDocument(
            int(document["place"]),
            tuple((int(source), int(sample)) for source, sample in document["samples"]),
            str(document["reason"]),
            tuple(tuple(map(int, row)) for row in document["item_counts"]),
        )
        for document in fields["documents"]
    )
    return Gap(int(fields["pack"]), documents, int(fields["tokens"]))
