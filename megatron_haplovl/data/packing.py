"""Which documents share a sequence: best fit, the longest first, one window of documents after the other."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# Bins of a window are numbered below this.
_BIN_BITS = 32


def pack_windows(lengths: IntArray, capacity: int, window: int) -> tuple[IntArray, IntArray, IntArray]:
    """Pack documents, those of each window by themselves.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a sequence.
        window: documents that are packed together.

    Returns:
        The documents in the order in which they stand in the packs; where each pack begins in it, `[packs + 1]`; and
        where each window begins in the packs, `[windows + 1]`.
    """
    orders, sizes, bins_of_window = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)], [0]
    for start in range(0, len(lengths), window):
        bins = best_fit_decreasing(lengths[start : start + window], capacity)
        # Arrays at once: lists of numbers would take ten times the memory.
        orders.append(start + np.fromiter(chain.from_iterable(bins), dtype=np.int64))
        sizes.append(np.fromiter(map(len, bins), dtype=np.int64))
        bins_of_window.append(len(bins))
    return np.concatenate(orders), np.cumsum(np.concatenate(sizes)), np.cumsum(bins_of_window)


def shuffle_packs(order: IntArray, offsets: IntArray, permutation: IntArray) -> tuple[IntArray, IntArray]:
    """Put packs into another order.

    Args:
        order: documents in the order in which they stand in the packs.
        offsets: where each pack begins in it, `[packs + 1]`.
        permutation: the new order of the packs.

    Returns:
        `order` and `offsets` anew.
    """
    sizes = np.diff(offsets)[permutation]
    new_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return order[gather_ranges(offsets[:-1][permutation], sizes)], new_offsets


def gather_ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """The numbers of `range(start, start + size)` for each of many ranges, one behind the other."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(int(ends[-1]) if len(ends) else 0)


def best_fit_decreasing(lengths: IntArray, capacity: int) -> list[list[int]]:
    """Put things into bins: the longest first, each into the fullest bin that still has room for it.

    Returns:
        The bins, each a sorted list of indices into `lengths`.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # Free room and number of each bin as one number, sorted.
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length << _BIN_BITS)
        if place == len(rooms):
            rest = (capacity << _BIN_BITS) + len(bins)
            bins.append([i])
        else:
            rest = rooms.pop(place)
            bins[rest & ((1 << _BIN_BITS) - 1)].append(i)
        insort(rooms, rest - (length << _BIN_BITS))
    return [sorted(content) for content in bins]
