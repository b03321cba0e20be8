"""How long the run still takes, saves and evaluations included, as far as they have been measured."""

from __future__ import annotations

from megatron_haplovl.config.schema import Config
from megatron_haplovl.operation.phase import PhaseClock, Spent


class Forecast:
    """Measures steps, and asks the clock for what lies between them.

    Args:
        config: says what is still to be done.
        clock: knows what saves and evaluations took.
    """

    def __init__(self, config: Config, clock: PhaseClock) -> None:
        self._config, self._clock = config, clock
        self._steps, self._seconds, self._first = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        """A step is done. The first one is slow and counts only as long as there is no other."""
        if self._first == 0.0:
            self._first = seconds
        else:
            self._steps += 1
            self._seconds += seconds

    def seconds_left(self, step: int) -> float:
        """From the end of this step to the end of the run."""
        each = self._seconds / self._steps if self._steps else self._first
        left = each * (self._config.schedule.train_iters - step)
        for phase, interval, wanted in (
            ("evaluate", self._config.logging.eval_interval, True),
            ("save", self._config.checkpoint.save_interval, self._config.checkpoint.save is not None),
        ):
            spent = self._clock.spent.get(phase, Spent())
            if spent.times and wanted:
                left += self._times(step, interval) * spent.seconds / spent.times
        return left

    def _times(self, step: int, interval: int | None) -> int:
        """How often something is due after a step: at every multiple of the interval, and at the end."""
        last = self._config.schedule.train_iters
        due = 0 if interval is None else last // interval - step // interval
        return due + (step < last and (interval is None or last % interval != 0))
