"""Why a run leaves before its last step; all ranks leave after the same one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_haplovl.config.schema import CheckpointConfig
from megatron_haplovl.data.worker_signals import STOP_SIGNALS
from megatron_haplovl.operation.signals import StopSignals
from megatron_haplovl.parallel.groups import Group

_SECONDS_BETWEEN_LOOKS = 1.0
_NAMES = tuple(number.name for number in STOP_SIGNALS)


def agree(control: Group, flags: Sequence[int]) -> list[int]:
    """The largest value of each flag over all ranks, the same on every rank. Called by every rank.

    Args:
        control: all ranks, on the host.
        flags: this rank's.
    """
    return [int(flag) for flag in control.largest(torch.tensor(flags, dtype=torch.int32))]


class Leaving:
    """Decides after every step whether the run goes on.

    Args:
        config: intervals and files.
        control: all ranks, on the host.
        signals: what has been received; None where nobody listens.
        seconds: since the launch, in which torchrun may have started the ranks several times.
    """

    def __init__(
        self, config: CheckpointConfig, control: Group, signals: StopSignals | None = None, seconds: float = 0.0
    ) -> None:
        self._config, self._control, self._signals = config, control, signals
        self._started = time.monotonic() - seconds
        self._exit_file = exit_file(config)
        self._looked = float("-inf")
        self._asked_by_file = False

    def agreed(self, step: int) -> str | None:
        """The reason to leave after `step` steps, the same on every rank; None to go on. Called by every rank."""
        received = None if self._signals is None else self._signals.received
        signal, by_file, late = agree(
            self._control,
            [0 if received is None else 1 + _NAMES.index(received), self._finds_exit_file(), self._is_late()],
        )
        if signal:
            return _NAMES[signal - 1]
        if by_file:
            return f"the file {self._exit_file} asks for it"
        if late:
            return f"--exit-duration-in-mins {self._config.exit_duration_in_mins}"
        interval = self._config.exit_interval
        if interval is not None and step % interval == 0:
            return f"--exit-interval {interval}"
        return None

    def obeyed(self) -> None:
        """Remove the exit file, because the run ends. Called by every rank."""
        if self._exit_file is not None and self._control.rank == 0:
            self._exit_file.unlink(missing_ok=True)

    def _finds_exit_file(self) -> bool:
        """Looked for once a second by one rank, because every look may ask a file server."""
        now = time.monotonic()
        if self._exit_file is None or self._control.rank != 0 or now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return self._asked_by_file
        self._looked = now
        self._asked_by_file = self._asked_by_file or self._exit_file.exists()
        return self._asked_by_file

    def _is_late(self) -> bool:
        minutes = self._config.exit_duration_in_mins
        return minutes is not None and time.monotonic() - self._started >= 60 * minutes


def exit_file(config: CheckpointConfig) -> Path | None:
    """The file whose presence asks the run to leave: --kill-switch-file, or `exit` in --save."""
    if config.kill_switch_file is not None:
        return Path(config.kill_switch_file)
    return None if config.save is None else Path(config.save) / "exit"
