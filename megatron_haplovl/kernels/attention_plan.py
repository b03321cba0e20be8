"""Which rectangles of the score matrix to compute: the mixed mask as a short list of dense calls.

Rows of text see a growing interval of keys, rows of one image all see the same one, padding sees itself. Any stretch of
consecutive rows can be computed by one call over the keys from its first row's `kv_start` to its last row's `kv_end`;
what is hidden inside that rectangle costs arithmetic, and every call costs time. The plan is the cheapest cut of the
rows into such stretches: long images become calls of their own, long text becomes row blocks, and documents that are
short beside a call's overhead are computed whole, several at once.

Shape letters beside those of `data/batch.py`: R rows and T keys of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from megatron_haplovl.kernels.mask import MixedMask, Segment

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


def plan_calls(mask: MixedMask, pairs_per_call: float) -> tuple[Call, ...]:
    """The cheapest list of calls that covers every row of every sequence once.

    Args:
        mask: the mask.
        pairs_per_call: the overhead of a call, in pairs that could be computed in the same time.
    """
    calls: list[Call] = []
    for (_, alone), run in groupby(mask.segments, key=lambda s: (s.sequence, s.kind == "alone")):
        segments = list(run)
        if alone:
            calls += [Call(s.sequence, s.start, s.end, s.key_start, s.key_end, "alone") for s in segments]
        else:
            pieces = [piece for segment in segments for piece in _cut_text(segment)]
            calls += [_call(pieces[i:j]) for i, j in _cheapest_cut(pieces, pairs_per_call)]
    return tuple(calls)


def hidden_pairs(mask: MixedMask, call: Call) -> torch.Tensor:
    """Which pairs of a call's rectangle the mask hides: bool [rows, keys], on the host."""
    start_BS, end_BS = mask.host
    rows = slice(call.row_start, call.row_end)
    key_T = torch.arange(call.key_start, call.key_end)
    start_R, end_R = (torch.from_numpy(v_BS[call.sequence, rows]).unsqueeze(1) for v_BS in (start_BS, end_BS))
    return (key_T < start_R) | (key_T >= end_R)


def _cut_text(segment: Segment) -> list[Segment]:
    """Divide a long stretch of text at the places where it may, but need not, be cut."""
    if segment.kind != "text":
        return [segment]
    cuts = [*range(segment.start, segment.end, _TEXT_BLOCK), segment.end]
    ahead = segment.key_end - segment.end
    return [Segment(segment.sequence, a, b, segment.key_start, b + ahead, "text") for a, b in pairwise(cuts)]


def _call(pieces: list[Segment]) -> Call:
    first, last = pieces[0], pieces[-1]
    square = last.end - first.start == last.key_end - first.key_start
    if len(pieces) == 1 and (first.kind == "image" or first.end - first.start == 1):
        kind = "full"
    elif square and all(p.kind == "text" and p.key_start == first.key_start for p in pieces):
        kind = "causal"
    else:
        kind = "masked"
    return Call(first.sequence, first.start, last.end, first.key_start, last.key_end, kind)


def _cheapest_cut(pieces: list[Segment], pairs_per_call: float) -> list[tuple[int, int]]:
    """Dynamic programme over the joints between pieces: the stretches `[i, j)` that become calls."""
    best, came_from = [0.0], [0]
    for j in range(1, len(pieces) + 1):
        last = pieces[j - 1]
        joined_from = range(max(0, j - _MOST_JOINED), j)
        costs = [
            best[i] + pairs_per_call + (last.end - pieces[i].start) * (last.key_end - pieces[i].key_start)
            for i in joined_from
        ]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        best.append(costs[cheapest])
        came_from.append(joined_from[cheapest])
    stretches = []
    j = len(pieces)
    while j > 0:
        stretches.append((came_from[j], j))
        j = came_from[j]
    return stretches[::-1]
