"""What keeps a run alive, in one object: made before anything can fail, given to setup and loop."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass, field

from megatron_haplovl.operation.endings import Ending
from megatron_haplovl.operation.last_words import LastWords, end_process
from megatron_haplovl.operation.phase import PhaseClock
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
    ending: Ending | None = None
    """How the run has ended, if nothing was raised."""

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

    def end(self, ending: Ending) -> None:
        """End this process at once, from any thread. It does not return."""
        assert self.words is not None, "only a supervised run ends itself"
        end_process(self.agreed(ending), self.words, self.run_id)
