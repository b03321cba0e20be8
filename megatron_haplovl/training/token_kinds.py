"""Tokens that the run has seen, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.losses.terms import LossTerm


class TokenKinds:
    """Counts tokens since the first step of the run, resumed parts included.

    Args:
        terms: the losses, which say what is trained.
        before: tokens of the steps before.
    """

    def __init__(self, terms: Sequence[LossTerm], before: StepCounts) -> None:
        self._trained = sorted({term.count for term in terms if term.weight is not None})
        self._seen: Counter[str] = Counter()
        self.add(before)

    def add(self, counts: StepCounts) -> None:
        """Add a step."""
        self._seen["consumed tokens"] += counts.tokens
        self._seen["consumed text tokens"] += counts.text_tokens
        self._seen["consumed visual tokens"] += counts.tokens - counts.text_tokens
        self._seen["consumed trained tokens"] += sum(getattr(counts, name) for name in self._trained)

    def columns(self) -> dict[str, int]:
        """`consumed tokens`, and of these text, visual (patches and newlines), and those that a loss is taken over."""
        return dict(self._seen)
