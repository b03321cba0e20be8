"""What keeps a run alive, in one object: made before anything can fail, given to setup and loop."""

from __future__ import annotations

import dataclasses
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_haplovl.operation.endings import Ending
from megatron_haplovl.operation.last_words import LastWords, end_process
from megatron_haplovl.operation.phase import PhaseClock
from megatron_haplovl.operation.run_lock import RunLock, take_run_lock
from megatron_haplovl.operation.signals import StopSignals
from megatron_haplovl.operation.watch import Watch
from megatron_haplovl.parallel.groups import Group


@dataclass
class Operation:
    """Without a supervisor (in tests, in other programs) nobody watches; everything else is the same."""

    run_id: str = ""
    """Of this launch, the same on every rank; a restart has another one. Set when the ranks have met."""
    clock: PhaseClock = field(default_factory=PhaseClock)
    signals: StopSignals | None = None
    words: LastWords | None = None
    watch: Watch | None = None
    began: float = field(default_factory=time.time)
    """`time.time()` when the launch began; torchrun may have started the ranks several times since."""
    ending: Ending | None = None
    """How the run has ended, if nothing was raised."""
    lock: RunLock | None = None
    """Of the --save folder; held by the first rank."""

    def meet(self, control: Group) -> None:
        """Give this launch its id, and watch the others from now on. Called by every rank."""
        self.run_id = control.gather_objects(secrets.token_hex(6))[0]
        if self.watch is not None:
            self.watch.join(self.run_id, control)

    @property
    def steps_done(self) -> int | None:
        """Optimizer steps that were done; None before the first one has begun."""
        return self.clock.moment.step - 1 if self.clock.moment.step else None

    def agreed(self, ending: Ending) -> Ending:
        """The ending of the run: this one, unless another rank was first or the same fault comes a second time."""
        if ending.step is None:
            ending = dataclasses.replace(ending, step=self.steps_done)
        if self.words is not None:
            ending = self.words.guarded(ending)
        return ending if self.watch is None else self.watch.publish(ending)

    def found_ending(self) -> Ending | None:
        """What another rank has ended with, if that is known here."""
        known = None if self.watch is None else self.watch.published()
        return known if known is not None or self.words is None else self.words.of_this_start()

    def ending_before(self, since: float) -> str | None:
        """What the start before this one said last, if that was after a moment (seconds since 1970)."""
        return None if self.words is None else self.words.of_start_before(since)

    def end(self, ending: Ending) -> None:
        """End this process at once, from any thread. It does not return."""
        assert self.words is not None, "only a supervised run ends itself"
        agreed = self.agreed(ending)
        self.release()
        end_process(agreed, self.words, self.run_id)

    def lock_folder(self, folder: str, control: Group) -> None:
        """Keep other runs out of a --save folder, before anything in it is touched. Called by every rank.

        Raises:
            ValueError: another run writes to it, or nobody can.
        """
        self.lock = take_run_lock(Path(folder), self.run_id, control, lambda: self.clock.enter("start"))

    def require_lock(self) -> None:
        """Make sure, from a look at the file, that the --save folder is still this run's.

        Raises:
            ValueError: another run has taken it over.
            OSError: the file system does not answer.
        """
        if self.lock is not None:
            self.lock.check()

    def notice_lost_lock(self) -> None:
        """End the run if its heartbeat has found that another run has taken the --save folder over; costs nothing.

        Raises:
            ValueError: it has.
        """
        if self.lock is not None and self.lock.lost is not None:
            raise ValueError(self.lock.lost)

    def release(self) -> None:
        """Let other runs write to the --save folder."""
        if self.lock is not None:
            self.lock.release()
