"""Which documents share a sequence: best fit, the longest first, one window of documents after the other."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def pack_windows(lengths: IntArray, capacity: int, bounds: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Pack documents, those of each window by themselves.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a sequence.
        bounds: where each window begins in the documents, `[windows + 1]`; those of a window are packed together.

    Returns:
        The documents in the order in which they stand in the packs; where each pack begins in it, `[packs + 1]`; and
        where each window begins in the packs, `[windows + 1]`.
    """
    orders, sizes, bins_of_window = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)], [0]
    for start, end in pairwise(bounds.tolist()):
        bin_of = best_fit_decreasing(lengths[start:end], capacity)
        orders.append(start + np.argsort(bin_of, kind="stable"))
        sizes.append(np.bincount(bin_of))
        bins_of_window.append(len(sizes[-1]))
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


def best_fit_decreasing(lengths: IntArray, capacity: int) -> IntArray:
    """Put things into bins: the longest first, each into the fullest bin that still has room for it.

    Returns:
        The number of each thing's bin. Bins are numbered as they are opened.
    """
    # Free room and number of a bin are one number, so that a sorted list of such numbers is all there is to keep.
    bits = len(lengths).bit_length()
    order = np.argsort(-lengths, kind="stable")
    full, opened = capacity << bits, 0
    rooms: list[int] = []
    chosen: list[int] = []
    for length in (lengths[order] << bits).tolist():
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room = full + opened
            opened += 1
        else:
            room = rooms.pop(place)
        chosen.append(room)
        insort(rooms, room - length)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    bin_of[order] = np.array(chosen, dtype=np.int64) & ((1 << bits) - 1)
    return bin_of
