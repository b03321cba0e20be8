"""Which rectangles of the score matrix to compute: the mixed mask as a short list of dense calls.

Rows of text see a growing interval of keys, rows of one image all see the same one, padding sees itself. Any stretch of
consecutive rows can be computed by one call over the keys from its first row's `kv_start` to its last row's `kv_end`;
what is hidden inside that rectangle costs arithmetic, and every call costs time. The plan is the cheapest cut of the
rows into such stretches: long images become calls of their own, long text becomes row blocks, and documents that are
short beside a call's overhead are computed whole, several at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# Rows between two places where a long stretch of text may be cut.
_TEXT_BLOCK = 64
# Stretches that one call may join; bounds the planner's time.
_MOST_JOINED = 24


@dataclass(frozen=True)
class Call:
    """One rectangle of one sequence: rows `[row_start, row_end)` over keys `[key_start, key_end)`."""

    sequence: int
    row_start: int
    row_end: int
    key_start: int
    key_end: int
    kind: str
    """full: every row sees every key; causal: square, row r sees the first r + 1 keys; masked: neither; alone: every
    row sees only itself, and nobody else sees it (padding), so that its output is its own value."""

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the call computes."""
        return (self.row_end - self.row_start) * (self.key_end - self.key_start)


def plan_calls(kv_start_S: IntArray, kv_end_S: IntArray, sequence: int, pairs_per_call: float) -> list[Call]:
    """The cheapest list of calls that covers every row of one sequence once.

    Args:
        kv_start_S: first visible key of each row; non-decreasing.
        kv_end_S: one past the last visible key; non-decreasing.
        sequence: number of the sequence in the micro-batch.
        pairs_per_call: the overhead of a call, in pairs that could be computed in the same time.
    """
    rows_S = np.arange(len(kv_start_S))
    next_start_S = np.append(kv_start_S[1:], len(kv_start_S))
    alone_S = (kv_start_S == rows_S) & (kv_end_S == rows_S + 1) & (next_start_S == rows_S + 1)
    calls: list[Call] = []
    for start, end in _runs(alone_S):
        if alone_S[start]:
            calls.append(Call(sequence, start, end, start, end, "alone"))
        else:
            cuts = _possible_cuts(kv_start_S, kv_end_S, start, end)
            calls += [
                Call(sequence, a, b, int(kv_start_S[a]), int(kv_end_S[b - 1]), _kind(kv_start_S[a:b], kv_end_S[a:b], a))
                for a, b in _cheapest_cut(kv_start_S, kv_end_S, cuts, pairs_per_call)
            ]
    return calls


def _runs(flags_S: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Stretches of equal flags."""
    edges = np.flatnonzero(np.diff(flags_S)) + 1
    bounds = [0, *edges.tolist(), len(flags_S)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _possible_cuts(kv_start_S: IntArray, kv_end_S: IntArray, start: int, end: int) -> list[int]:
    """Ends of documents, ends of images and of the text between them, and every few rows of long text."""
    rows = np.arange(start, end)
    # The last token of an image ends where a text token would, but where its neighbour before it ends, too.
    is_text = (kv_end_S[start:end] == rows + 1) & (np.diff(kv_end_S[start:end], prepend=-1) != 0)
    document_changes = np.diff(kv_start_S[start:end]) != 0
    kind_changes = is_text[1:] != is_text[:-1]
    image_changes = ~is_text[1:] & (np.diff(kv_end_S[start:end]) != 0)
    edges = (np.flatnonzero(document_changes | kind_changes | image_changes) + start + 1).tolist()
    cuts = [start]
    for edge in [*edges, end]:
        if is_text[edge - 1 - start]:
            cuts += range(cuts[-1] + _TEXT_BLOCK, edge, _TEXT_BLOCK)
        cuts.append(edge)
    return cuts


def _cheapest_cut(
    kv_start_S: IntArray, kv_end_S: IntArray, cuts: list[int], pairs_per_call: float
) -> list[tuple[int, int]]:
    """Dynamic programme over the places where the rows may be cut."""
    best, came_from = [0.0], [0]
    for j in range(1, len(cuts)):
        last_key = int(kv_end_S[cuts[j] - 1])
        costs = [
            best[i] + pairs_per_call + (cuts[j] - cuts[i]) * (last_key - int(kv_start_S[cuts[i]]))
            for i in range(max(0, j - _MOST_JOINED), j)
        ]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        best.append(costs[cheapest])
        came_from.append(max(0, j - _MOST_JOINED) + cheapest)
    stretches = []
    j = len(cuts) - 1
    while j > 0:
        stretches.append((cuts[came_from[j]], cuts[j]))
        j = came_from[j]
    return stretches[::-1]


def _kind(kv_start_R: IntArray, kv_end_R: IntArray, first_row: int) -> str:
    if kv_start_R[-1] != kv_start_R[0]:
        return "masked"
    if kv_end_R[0] == kv_end_R[-1]:
        return "full"
    if kv_start_R[0] == first_row and (np.diff(kv_end_R) == 1).all() and kv_end_R[0] == first_row + 1:
        return "causal"
    return "masked"
