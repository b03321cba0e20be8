"""Beats and endings between ranks, by the store at which the ranks have met.

A store whose process is stopped answers nothing, and a call to it never returns. So all calls are made by a thread that
nobody waits for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_haplovl.operation.beats import Beat
from megatron_haplovl.parallel.launcher_store import connect, launcher_holds_store

_NOTHING = "-"
_SECONDS_TO_CONNECT = 30
_SECONDS_BETWEEN = 1.0


@dataclass(frozen=True)
class Received:
    """What the store has answered last."""

    number: int = 0
    """Answers so far."""
    ending: str | None = None
    alarm: str = "0"
    """Changes when every rank shall write down its stacks."""
    beats: Mapping[int, Beat] = field(default_factory=dict)
    """By rank; only rank 0's for a rank that does not ask for all."""


class Exchange:
    """Connects this rank to the store. Every rank makes one; then all must have done so before :meth:`start`.

    Args:
        rank: of this process.
        size: ranks of the run.
        key: of this launch and restart.
        reads_all: whether this rank wants to know the beats of the others.
        beat: this rank's first beat.

    Raises:
        RuntimeError: the store does not answer.
    """

    def __init__(self, rank: int, size: int, key: str, *, reads_all: bool, beat: Beat) -> None:
        self._rank, self._size, self._key = rank, size, key
        self.reads_all = reads_all
        self.rank_0_holds = not launcher_holds_store()
        """Whether rank 0 holds the store, and no launcher."""
        self.holds_store = self.rank_0_holds and rank == 0
        self.received = Received()
        self.trouble: str | None = None
        """The last error of the store."""
        self.beat = beat
        """What the others will see of this rank."""
        self._mine: tuple[str, Callable[[str], bool]] | None = None
        self._alarm: str | None = None
        self._published = threading.Event()
        self._acknowledged = False
        self.seen_by = 0
        """Other ranks that know the ending; counted while this rank holds the store."""
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._store = self._connect()
        if rank == 0:
            self._store.set("ending", _NOTHING)
            self._store.set("alarm", "0")
        self._store.set(f"beat/{rank}", beat.to_json())
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)

    def start(self) -> None:
        """Begin to exchange."""
        self._thread.start()

    def publish(self, ending: str, gives_way: Callable[[str], bool], patience: float) -> str:
        """Make an ending known to all ranks.

        Args:
            ending: this rank's.
            gives_way: whether an ending that is known already is replaced.
            patience: seconds to wait for the store.

        Returns:
            The ending that is known then; this one if the store does not answer.
        """
        self._mine = (ending, gives_way)
        self._published.clear()
        self._wake.set()
        self._published.wait(patience)
        return self.received.ending or ending

    def raise_alarm(self, text: str) -> None:
        """Let every rank write down its stacks.

        Args:
            text: another one than in the alarm before.
        """
        self._alarm = text
        self._wake.set()

    def stop(self, beat: Beat, patience: float) -> None:
        """Leave a last beat and end the exchange.

        Args:
            beat: the last one.
            patience: seconds to wait for the store.
        """
        self.beat = beat
        self._stopped.set()
        self._wake.set()
        self._thread.join(patience)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stopped.is_set()
            try:
                self._exchange()
            except (RuntimeError, torch.distributed.DistError) as error:
                self.trouble = str(error).splitlines()[0]
                if not is_last:
                    self._try_again()
            if not is_last:
                self._wake.wait(_SECONDS_BETWEEN)
                self._wake.clear()

    def _exchange(self) -> None:
        store, mine = self._store, self._mine
        store.set(f"beat/{self._rank}", self.beat.to_json())
        if self._alarm is not None:
            store.set("alarm", self._alarm)
            self._alarm = None
        if mine is not None:
            self._compete(*mine)
        ranks = range(self._size) if self.reads_all else (0,)
        ending, alarm, *beats = store.multi_get(["ending", "alarm", *(f"beat/{rank}" for rank in ranks)])
        known = None if ending == _NOTHING.encode() else ending.decode()
        by_rank = {rank: Beat.of_json(beat) for rank, beat in zip(ranks, beats, strict=True)}
        self.received = Received(self.received.number + 1, known, alarm.decode(), by_rank)
        if mine is not None and self._mine is mine:
            self._mine = None
            self._published.set()
        if known is not None and not self._acknowledged:
            self._acknowledged = True
            store.add("acknowledged", 1)
        if known is not None and self.holds_store:
            self.seen_by = store.add("acknowledged", 0) - 1

    def _compete(self, mine: str, gives_way: Callable[[str], bool]) -> None:
        known = self._store.compare_set("ending", _NOTHING, mine).decode()
        if known != mine and gives_way(known):
            self._store.compare_set("ending", known, mine)

    def _connect(self) -> Store:
        return PrefixStore(f"haplovl/{self._key}", connect(timedelta(seconds=_SECONDS_TO_CONNECT)))

    def _try_again(self) -> None:
        try:
            self._store = self._connect()
        except (RuntimeError, torch.distributed.DistError) as error:
            self.trouble = str(error).splitlines()[0]
