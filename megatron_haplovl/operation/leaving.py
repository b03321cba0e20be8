"""Why a run leaves before its last step; all ranks leave after the same one."""

from __future__ import annotations

from megatron_haplovl.config.schema import CheckpointConfig
from megatron_haplovl.parallel.groups import Group


class Leaving:
    """Decides after every step whether the run goes on.

    Args:
        config: intervals and files.
        control: all ranks, on the host.
    """

    def __init__(self, config: CheckpointConfig, control: Group) -> None:
        self._config, self._control = config, control

    def agreed(self, step: int) -> str | None:
        """The reason to leave after `step` steps, the same on every rank; None to go on. Called by every rank."""
        interval = self._config.exit_interval
        if interval is not None and step % interval == 0:
            return f"--exit-interval {interval}"
        return None
