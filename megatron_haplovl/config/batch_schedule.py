"""How large the global batch of each step is: always the same, or growing at first (--rampup-batch-size)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from megatron_haplovl.config.schema import ScheduleConfig


@dataclass(frozen=True)
class Stairs:
    """A number for each step, which changes at a few steps only, and its sums."""

    firsts: Sequence[int]
    """The first step of each level; the first level begins at 0, the last one never ends."""
    sizes: Sequence[int]
    """The number that each step of the level has, at least 1."""

    @cached_property
    def _before(self) -> list[int]:
        steps = [end - first for first, end in pairwise(self.firsts)]
        return list(accumulate((n * size for n, size in zip(steps, self.sizes, strict=False)), initial=0))

    def size(self, step: int) -> int:
        """The number of one step."""
        return self.sizes[bisect_right(self.firsts, step) - 1]

    def before(self, step: int) -> int:
        """The sum over all steps before this one."""
        level = bisect_right(self.firsts, step) - 1
        return self._before[level] + (step - self.firsts[level]) * self.sizes[level]

    def step_at(self, position: int) -> int:
        """The step which, with everything laid end to end, holds this position, counted from 0."""
        level = bisect_right(self._before, position) - 1
        return self.firsts[level] + (position - self._before[level]) // self.sizes[level]


@dataclass(frozen=True)
class BatchSchedule:
    """Samples of each step, as Megatron-LM defines them. With --batch-unit packs a sample is a packed sequence.

    The ramp is cut into levels that last as many samples each. A step has the size of the level that it begins in, so
    its last samples may lie behind the level's end, and a level that is shorter than a step may be passed over.

    Raises:
        ValueError: sizes that are no ramp.
    """

    full: int
    """--global-batch-size."""
    ramp: tuple[int, ...] = ()
    """--rampup-batch-size: the first size, what each level adds to it, and the samples of all levels below the full
    size together; nothing without a ramp."""

    def __post_init__(self) -> None:
        if self.full < 1:
            raise ValueError(f"--global-batch-size must be at least 1, got {self.full}")
        if not self.ramp:
            return
        words = " ".join(map(str, self.ramp))
        if len(self.ramp) != 3:
            raise ValueError(f"--rampup-batch-size takes three numbers, START INCREMENT SAMPLES, got {words}")
        if min(self.ramp) < 1:
            raise ValueError(f"--rampup-batch-size {words}: START, INCREMENT and SAMPLES must be at least 1")
        start, increment, _ = self.ramp
        if start > self.full:
            raise ValueError(
                f"--rampup-batch-size {words} starts with more than --global-batch-size {self.full}; lower START"
            )
        if (self.full - start) % increment:
            raise ValueError(
                f"--rampup-batch-size {words} does not reach --global-batch-size {self.full}: the difference of "
                f"{self.full - start} is not a multiple of INCREMENT {increment}"
            )

    @classmethod
    def of(cls, schedule: ScheduleConfig) -> BatchSchedule:
        """What a run's settings say."""
        return cls(schedule.global_batch_size, schedule.rampup_batch_size)

    @property
    def sizes(self) -> range:
        """All sizes from the first to the full one, those included that no step has."""
        start, increment, _ = self.ramp or (self.full, 1, 0)
        return range(start, self.full + 1, increment)

    @cached_property
    def levels(self) -> Stairs:
        """The sizes that steps have, and the first step of each."""
        firsts, sizes = zip(*self._levels(), strict=True)
        return Stairs(firsts, sizes)

    def _levels(self) -> Iterator[tuple[int, int]]:
        step = consumed = 0
        if self.ramp:
            samples, rises = self.ramp[2], len(self.sizes) - 1
            # Whole numbers only: a quotient of floats may fall short of the level that it is.
            while (level := consumed * rises // samples) < rises:
                size, end = self.sizes[level], -(-(level + 1) * samples // rises)
                yield step, size
                steps = -(-(end - consumed) // size)
                step, consumed = step + steps, consumed + steps * size
        yield step, self.full

    def size(self, step: int) -> int:
        """Samples of a step, counted from 0."""
        return self.levels.size(step)

    def before(self, step: int) -> int:
        """Samples of all steps before this one."""
        return self.levels.before(step)

    def steps_for(self, samples: int) -> int:
        """The smallest number of steps that have at least so many samples."""
        return self.levels.step_at(samples - 1) + 1 if samples > 0 else 0
