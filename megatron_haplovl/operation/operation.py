"""What keeps a run alive, in one object: made before anything can fail, given to setup and loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_haplovl.operation.phase import PhaseClock


@dataclass
class Operation:
    """Without a supervisor (in tests, in other programs) nobody watches; everything else is the same."""

    clock: PhaseClock = field(default_factory=PhaseClock)
