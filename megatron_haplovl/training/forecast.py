"""How long the run still takes, saves and evaluations included, as far as they have been measured."""

from __future__ import annotations

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.schema import Config
from megatron_haplovl.operation.phase import PhaseClock


class Forecast:
    """Measures steps, and asks the clock for what lies between them.

    Args:
        config: says what is still to be done.
        clock: knows what saves and evaluations took.
        first_step: steps that were done when it began to count.
    """

    def __init__(self, config: Config, clock: PhaseClock, first_step: int = 0) -> None:
        self._config, self._clock, self._first_step = config, clock, first_step
        self._batches = BatchSchedule.of(config.schedule)
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
        last = self._config.schedule.train_iters
        first = self._first_step
        measured = (first + 1, first + 1 + self._steps) if self._steps else (first, first + 1)
        seconds = self._seconds if self._steps else self._first
        # By samples, because with a ramp later steps have more of them.
        left = seconds / self._samples(*measured) * self._samples(step, last)
        for phase, interval in (
            ("evaluate", self._config.logging.eval_interval),
            ("save", self._config.checkpoint.save_interval),
        ):
            # Whatever else the phase holds (questions, copies on local disks) comes in proportion.
            done = self._due(self._first_step, step, interval)
            if done and phase in self._clock.spent:
                left += self._clock.spent[phase].seconds * self._due(step, last, interval) / done
        return left

    def _samples(self, after: int, step: int) -> int:
        return self._batches.before(step) - self._batches.before(after)

    def _due(self, after: int, step: int, interval: int | None) -> int:
        """How often something is due behind one step and up to another: at multiples of the interval, and last."""
        last = self._config.schedule.train_iters
        at_end = after < last == step and (interval is None or last % interval != 0)
        return (0 if interval is None else step // interval - after // interval) + at_end
