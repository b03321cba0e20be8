"""What some packs of a plan hold of each source.

Shape letters beside those of `data/batch.py`: N sources, C columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data.plan.packs import ITEM_COUNT_NAMES, EpochPlan, PackPlan

IntArray = npt.NDArray[np.int64]

SOURCE_COUNT_NAMES = ("samples", *ITEM_COUNT_NAMES)
"""Columns of :func:`counts_by_source`."""


def counts_by_source(plan: PackPlan, packs: range, num_sources: int) -> IntArray:
    """Samples and trained tokens of each source in some neighbouring packs.

    Args:
        plan: the pack plan.
        packs: numbers of the packs, one after the other.
        num_sources: sources of the plan.

    Returns:
        `[N, C]`, columns as in SOURCE_COUNT_NAMES.
    """
    total = np.zeros((num_sources, len(SOURCE_COUNT_NAMES)), dtype=np.int64)
    for epoch, first, end in plan.spans(packs):
        total += _in_epoch(epoch, first, end, num_sources)
    return total


def _in_epoch(epoch: EpochPlan, first: int, end: int, num_sources: int) -> IntArray:
    documents = epoch.pack_offsets[first], epoch.pack_offsets[end]
    items = slice(int(epoch.doc_offsets[documents[0]]), int(epoch.doc_offsets[documents[1]]))
    source = epoch.items[items, 0]
    # Sums in float64 are exact up to 2^53 tokens.
    columns = [np.bincount(source, minlength=num_sources)] + [
        np.bincount(source, weights=column, minlength=num_sources) for column in epoch.item_counts[items].T
    ]
    return np.stack(columns, axis=1).astype(np.int64)
