"""How old the beats of the others are, by a clock that stands still while this process does."""

from __future__ import annotations

from megatron_haplovl.operation.beats import Beat, Seen
from megatron_haplovl.operation.exchange import Received


class Arrivals:
    """Keeps the last beat of every rank. Ages grow only while the store answers."""

    def __init__(self) -> None:
        self.silence = 0.0
        """Seconds since the store has last answered."""
        self._number = 0
        self._seen: dict[int, Seen] = {}

    def update(self, received: Received, elapsed: float) -> None:
        """Take note of what has arrived.

        Args:
            received: the last answer of the store.
            elapsed: seconds since the call before.
        """
        self.silence += elapsed
        if received.number == self._number:
            return
        for rank, beat in received.beats.items():
            before = self._seen.get(rank)
            is_new = before is None or before.beat.number != beat.number
            self._seen[rank] = Seen(beat, 0.0 if before is None or is_new else before.age + self.silence)
        self._number, self.silence = received.number, 0.0

    def seen(self, own: Beat, silent_holder: int | None) -> list[Seen]:
        """The ranks that are known here, this one as it is now.

        Args:
            own: this rank's beat.
            silent_holder: the rank that holds a store that does not answer, if it does not.
        """
        seen = self._seen | {own.rank: Seen(own, 0.0)}
        if silent_holder is not None and silent_holder in seen:
            seen[silent_holder] = Seen(seen[silent_holder].beat, seen[silent_holder].age + self.silence)
        return [seen[rank] for rank in sorted(seen)]
