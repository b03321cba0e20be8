"""What keeps a run alive, in one object: made before anything can fail, given to setup and loop."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from megatron_haplovl.operation.phase import PhaseClock
from megatron_haplovl.parallel.groups import Group


@dataclass
class Operation:
    """Without a supervisor (in tests, in other programs) nobody watches; everything else is the same."""

    run_id: str = ""
    """Of this launch, the same on every rank; a restart has another one. Set when the ranks have met."""
    clock: PhaseClock = field(default_factory=PhaseClock)

    def meet(self, control: Group) -> None:
        """Give this launch its id. Called by every rank."""
        self.run_id = control.gather_objects(secrets.token_hex(6))[0]
