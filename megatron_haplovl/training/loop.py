"""The training loop: one optimizer step after the other, with logging, evaluation and saving in between."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from megatron_haplovl.data.batch import Batch, StepCounts
from megatron_haplovl.engine.metrics import reduce_metrics
from megatron_haplovl.engine.steps import StepResult, Sums
from megatron_haplovl.training.flops import training_flops
from megatron_haplovl.training.logging import NO_PREFIX, training_line
from megatron_haplovl.training.schedule import learning_rate
from megatron_haplovl.training.setup import Run
from megatron_haplovl.training.source_report import SourceLosses, consumed_columns

logger = logging.getLogger(__name__)


@dataclass
class _Progress:
    """What the log line counts, since the last line and since the start."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of these that this rank spent waiting for batches."""
    tokens: int = 0
    flops: float = 0.0


class _TimedBatches(Iterator[Batch]):
    """Micro-batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.waited = 0.0

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - started
        return batch


def train(run: Run) -> None:
    """Train until --train-iters (or --exit-interval), saving and evaluating on the way.

    Raises:
        FloatingPointError: see :func:`train_step`.
        OSError: the last checkpoint could not be saved.
    """
    config, last_step = run.config, run.config.schedule.train_iters
    micro_batches = _TimedBatches(run.train_data.micro_batches(run.first_step) if run.steps.reads_data else iter(()))
    window, consumed_tokens = _Progress(), run.train_data.counts_before(run.first_step).tokens
    by_source = SourceLosses(run.train_data.source_names, run.terms, run.device)
    consumed = run.train_data.counts_by_source(range(run.first_step))
    step = run.first_step
    if step >= last_step:
        logger.info(f"nothing to do: {step} steps are done, --train-iters is {last_step}")
    if step < last_step and step == 0:
        evaluate(run, step)
    while step < last_step:
        started, waited = time.perf_counter(), micro_batches.waited
        result = train_step(run, step, micro_batches)
        step += 1
        consumed_tokens += result.counts.tokens
        window.steps += 1
        window.seconds += time.perf_counter() - started
        window.waited += micro_batches.waited - waited
        window.tokens += result.counts.tokens
        window.flops += _flops(run, result)
        counts_of_sources = run.train_data.counts_by_source(range(step - 1, step))
        by_source.add(result.sums, counts_of_sources)
        consumed += counts_of_sources
        if step % config.logging.log_interval == 0 or step == last_step:
            of_sources = {
                **by_source.columns(run.groups.stages_of_replicas),
                **consumed_columns(run.train_data.source_names, consumed),
            }
            _report(run, step, result, window, consumed_tokens, of_sources)
            window = _Progress()
            by_source.clear()
        if _is_due(config.logging.eval_interval, step) or step == last_step:
            evaluate(run, step)
        leave = _is_due(config.checkpoint.exit_interval, step)
        if run.writer is not None and (_is_due(config.checkpoint.save_interval, step) or step == last_step or leave):
            run.writer.save(step, run.train_data.plan_key)
        if leave and step < last_step:
            logger.info(f"leaving after step {step} (--exit-interval {config.checkpoint.exit_interval})")
            break
    if run.writer is not None:
        run.writer.close()


def train_step(run: Run, step: int, micro_batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over the global batch number `step`.

    Returns:
        Losses, gradient norm and counts of the step.

    Raises:
        FloatingPointError: a loss or the gradient norm is not finite, on every rank at once and before anything is
            saved.
    """
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


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Losses on --valid-data-path over --eval-iters global batches, the same ones every time.

    Returns:
        What was logged, by name; nothing without --valid-data-path.
    """
    if run.valid_data is None:
        return {}
    steps = min(run.config.logging.eval_iters, run.valid_data.steps_available)
    number = steps * run.valid_data.micro_batches_per_step
    micro_batches = run.valid_data.micro_batches(0) if run.steps.reads_data else iter(())
    sums = run.steps.evaluate(micro_batches, number)
    counts = run.valid_data.counts_before(steps)
    reduced = reduce_metrics(sums, run.terms, counts, run.groups.stages_of_replicas)
    by_source = SourceLosses(run.valid_data.source_names, run.terms, run.device)
    by_source.add(sums, run.valid_data.counts_by_source(range(steps)))
    reduced |= by_source.columns(run.groups.stages_of_replicas)
    metrics = {f"valid {name}": value for name, value in reduced.items()}
    line = training_line(step, run.config.schedule.train_iters, metrics, title="validation at iteration")
    logger.info(line, extra=NO_PREFIX)
    run.sinks.record(step, metrics)
    return metrics


def _report(
    run: Run,
    step: int,
    result: StepResult,
    window: _Progress,
    consumed_tokens: int,
    of_sources: dict[str, float | int],
) -> None:
    batch_size = run.config.schedule.global_batch_size
    columns: dict[str, float | int] = {
        "consumed samples": step * batch_size,
        "consumed tokens": consumed_tokens,
        "elapsed time per iteration (ms)": 1000.0 * window.seconds / window.steps,
        "loader wait (ms)": 1000.0 * window.waited / window.steps,
        "learning rate": learning_rate(run.config, step - 1),
        "global batch size": batch_size,
        **result.losses,
        "grad norm": result.grad_norm,
        "number of skipped iterations": run.steps.skipped,
        "samples per second": window.steps * batch_size / window.seconds,
        "tokens per gpu per second (tgs)": window.tokens / window.seconds / run.groups.world.size,
        "TFLOPs": window.flops / window.seconds / run.groups.world.size / 1e12,
        **of_sources,
    }
    logger.info(training_line(step, run.config.schedule.train_iters, columns), extra=NO_PREFIX)
    run.sinks.record(step, columns)


def _flops(run: Run, result: StepResult) -> float:
    stage = run.config.stage
    return training_flops(
        run.config.model,
        tokens=result.counts.tokens,
        head_tokens=getattr(result.counts, stage.head_tokens),
        # The other ranks' sequences are packed alike; their exact pairs are not worth a message.
        visible_pairs=result.visible_pairs * run.groups.data.size,
        stage=stage,
    )


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
