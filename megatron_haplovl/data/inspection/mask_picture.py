"""The mixed mask as a picture, from its two vectors: nothing of the size of all pairs is built.

Shape letters: S tokens, B pixels along a side.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

IntArray = npt.NDArray[np.int64]

LONGEST_SIDE = 512
"""Pixels along a side, at most."""
_QUERIES_AT_ONCE = 4096
_SMALLEST_SIDE = 256


def visible_shares(kv_start_S: IntArray, kv_end_S: IntArray, side: int) -> npt.NDArray[np.float64]:
    """The share of visible pairs in each of `[side, side]` squares of pairs (query, key).

    Query i sees the keys `[kv_start[i], kv_end[i])`.
    """
    length = len(kv_start_S)
    edges = np.linspace(0, length, side + 1)
    # A query lies in one row if the rows are whole tokens; otherwise the row in which it begins.
    rows = np.minimum((np.arange(length) * side) // length, side - 1)
    seen = np.zeros((side, side))
    for first in range(0, length, _QUERIES_AT_ONCE):
        block = slice(first, first + _QUERIES_AT_ONCE)
        low, high = kv_start_S[block, None], kv_end_S[block, None]
        overlap = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
        np.add.at(seen, rows[block], np.maximum(overlap, 0) / (length / side))
    return seen / np.maximum(np.bincount(rows, minlength=side), 1)[:, None]


def mask_png(kv_start_S: IntArray, kv_end_S: IntArray) -> bytes:
    """A PNG: a row for each query (or for several), a column for each key, dark where it is visible."""
    side = min(len(kv_start_S), LONGEST_SIDE)
    shares = visible_shares(kv_start_S, kv_end_S, side)
    picture = Image.fromarray((255 - shares * np.array(200)).astype(np.uint8))
    scale = max(1, _SMALLEST_SIDE // side)
    file = io.BytesIO()
    picture.resize((side * scale, side * scale), Image.Resampling.NEAREST).save(file, "png")
    return file.getvalue()
