"""One optimizer step: rate, micro-batches, and what must not be trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.engine.steps import StepResult
from megatron_haplovl.operation.phase import PhaseClock
from megatron_haplovl.training.schedule import learning_rate
from megatron_haplovl.training.setup import Run


class TimedBatches(Iterator[Batch]):
    """Micro-batches, their size, and the seconds that were spent waiting for them.

    Args:
        batches: the micro-batches.
        clock: is told when the rank waits for the loader.
        describe: number of a micro-batch, counted from 0 -> what it is of.
    """

    def __init__(self, batches: Iterator[Batch], clock: PhaseClock, describe: Callable[[int], str]) -> None:
        self._batches, self._clock, self._describe = batches, clock, describe
        self._number = 0
        self.waited = 0.0
        self.positions = 0
        """Of all micro-batches so far, padding included."""

    def __next__(self) -> Batch:
        started = time.perf_counter()
        self._clock.reading = partial(self._describe, self._number)
        with self._clock.during("loader"):
            batch = next(self._batches)
        self._number += 1
        self.waited += time.perf_counter() - started
        self.positions += batch.tokens_BS.numel()
        return batch


def train_step(run: Run, step: int, micro_batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over the global batch number `step`, or what is left of it if it must not be trained on.

    Returns:
        Losses, gradient norm and counts of the step.

    Raises:
        RunEnd: what the guard has found, on every rank at once and before anything is saved; or more samples than
            --skip-bad-samples cannot be read.
    """
    run.operation.clock.start_step(step + 1)
    run.profiler.before_step(step)
    number = run.train_data.micro_batches_of(step)
    micro_batches = run.bad_samples.settle(run.train_data, micro_batches, number, step)
    counts = run.train_data.counts(step)
    if run.guard.passes_over(step):
        for _ in range(number if run.steps.reads_data else 0):
            next(micro_batches)
        return StepResult({}, None, counts, sums={})
    run.steps.set_accumulation(number)
    run.steps.set_learning_rate(learning_rate(run.config, step))
    result = run.steps.train(micro_batches, counts, run.guard.judge(step, counts))
    run.guard.after(step, result)
    return result
