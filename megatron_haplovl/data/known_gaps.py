"""The gaps of a plan that have been met, taken off the plan's counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.data.gaps import Gap
from megatron_haplovl.data.plan.packs import ITEM_COUNT_NAMES
from megatron_haplovl.data.source_counts import SOURCE_COUNT_NAMES, IntArray


class KnownGaps:
    """Every gap is counted once, however often its pack is read."""

    def __init__(self) -> None:
        self._of_pack: dict[int, Gap] = {}

    def add(self, gaps: Iterable[Gap]) -> None:
        """Remember some; a gap replaces what was known of its pack."""
        self._of_pack.update({gap.pack: gap for gap in gaps})

    def all(self) -> list[Gap]:
        """All of them, by pack."""
        return [gap for _, gap in sorted(self._of_pack.items())]

    def taken_off(self, counts: StepCounts, packs: range) -> StepCounts:
        """What is left of the counts of some packs."""
        gaps = self._inside(packs)
        if not gaps:
            return counts
        rows = np.array([row for gap in gaps for document in gap.documents for row in document.item_counts])
        missing = dict(zip(ITEM_COUNT_NAMES, rows[:, 1:].sum(axis=0).tolist(), strict=True))
        missing |= {
            "tokens": sum(gap.tokens for gap in gaps),
            "documents": sum(len(gap.documents) for gap in gaps),
        }
        left = {name: getattr(counts, name) - number for name, number in missing.items()}
        return dataclasses.replace(counts, **left)

    def taken_off_sources(self, counts_NC: IntArray, packs: range) -> IntArray:
        """What is left of the counts by source (`data.source_counts`) of some packs."""
        left_NC = counts_NC.copy()
        for gap in self._inside(packs):
            for document in gap.documents:
                for source, *counts in document.item_counts:
                    left_NC[source] -= (1, *counts)
        return left_NC

    def _inside(self, packs: range) -> list[Gap]:
        return [gap for pack, gap in self._of_pack.items() if pack in packs]


assert ("samples", *ITEM_COUNT_NAMES) == SOURCE_COUNT_NAMES
