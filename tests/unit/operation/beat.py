"""A beat for tests, and when it was seen."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_haplovl.operation.beats import Beat, Seen

_BEAT = Beat(
    rank=0,
    host="node",
    pid=100,
    number=1,
    step=5,
    phase="forward",
    order=20,
    in_phase=0.0,
    still=0.0,
    waits=False,
    settled=True,
)


def beat(rank: int = 0, **changed: Any) -> Beat:
    """A rank that is at work in the forward pass of step 5."""
    return dataclasses.replace(_BEAT, rank=rank, pid=100 + rank, **changed)


def seen(rank: int, age: float = 0.5, **changed: Any) -> Seen:
    """The same, as another rank sees it."""
    return Seen(beat(rank, **changed), age)


def waiting(rank: int, still: float, **changed: Any) -> Seen:
    """A rank that is inside a collective of the backward pass."""
    return seen(rank, **{"phase": "backward", "order": 21, "still": still, "waits": True, **changed})
