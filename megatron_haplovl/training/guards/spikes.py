"""When a loss is a spike."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

HISTORY = 100
"""Steps whose median a loss is compared with."""
WARM_UP = 20
"""Steps that must have been trained before any loss is called a spike."""


class SpikeWatch:
    """Compares each loss with the median of those before it.

    Args:
        factor: how many times the median a spike has at least.
        losses: of the steps before, oldest first.
    """

    def __init__(self, factor: float, losses: Iterable[float] = ()) -> None:
        self._factor = factor
        self._losses = deque(losses, maxlen=HISTORY)

    @property
    def losses(self) -> list[float]:
        """Of the last steps, oldest first."""
        return list(self._losses)

    def add(self, loss: float) -> None:
        """Remember a step's loss."""
        self._losses.append(loss)

    def ratio(self, loss: float) -> float | None:
        """How many times the median a loss is, if that makes it a spike."""
        if len(self._losses) < WARM_UP:
            return None
        median = statistics.median(self._losses)
        return loss / median if median > 0 and loss > self._factor * median else None
