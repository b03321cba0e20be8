"""One optimizer step: rate, micro-batches, losses over all ranks, and what must not be trained on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial

from megatron_haplovl.data.batch import Batch, StepCounts
from megatron_haplovl.engine.metrics import reduce_metrics
from megatron_haplovl.engine.steps import StepResult, Sums
from megatron_haplovl.operation.phase import PhaseClock
from megatron_haplovl.training.schedule import learning_rate
from megatron_haplovl.training.setup import Run


class TimedBatches(Iterator[Batch]):
    """Micro-batches, their size, and the seconds that were spent waiting for them.

    Args:
        batches: the micro-batches.
        clock: is told when the rank waits for the loader.
    """

    def __init__(self, batches: Iterator[Batch], clock: PhaseClock) -> None:
        self._batches, self._clock = batches, clock
        self.waited = 0.0
        self.positions = 0
        """Of all micro-batches so far, padding included."""

    def __next__(self) -> Batch:
        started = time.perf_counter()
        with self._clock.during("loader"):
            batch = next(self._batches)
        self.waited += time.perf_counter() - started
        self.positions += batch.tokens_BS.numel()
        return batch


def train_step(run: Run, step: int, micro_batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over the global batch number `step`.

    Returns:
        Losses, gradient norm and counts of the step.

    Raises:
        FloatingPointError: a loss or the gradient norm is not finite, on every rank at once and before anything is
            saved.
    """
    run.operation.clock.start_step(step + 1)
    run.profiler.before_step(step)
    counts = run.train_data.counts(step)
    run.steps.set_learning_rate(learning_rate(run.config, step))
    result = run.steps.train(micro_batches, counts, partial(_finite_losses, run, step, counts))
    if not math.isfinite(result.grad_norm):
        raise FloatingPointError(
            f"step {step + 1}: the gradient norm is not finite, though the loss is: {result.losses}; the weights can "
            "no longer be trusted and were not saved"
        )
    return result


def _finite_losses(run: Run, step: int, counts: StepCounts, sums: Sums) -> dict[str, float]:
    """The step's losses over all ranks, with their weighted total as "loss"; see `engine.steps.FiniteCheck`."""
    losses = reduce_metrics(sums, run.terms, counts, run.groups.stages_of_replicas)
    if not all(math.isfinite(value) for value in losses.values()):
        raise FloatingPointError(f"step {step + 1}: a loss is not finite: {losses}; the weights were not updated")
    total = sum(term.weight * losses[term.name] for term in run.terms if term.weight is not None)
    return {"loss": total, **losses}
