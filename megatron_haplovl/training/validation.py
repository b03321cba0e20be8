"""Losses on held-out data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.data.source_counts import SOURCE_COUNT_NAMES, IntArray
from megatron_haplovl.engine.metrics import reduce_metrics
from megatron_haplovl.training.logging import NO_PREFIX, training_line
from megatron_haplovl.training.setup import Run
from megatron_haplovl.training.source_report import SourceLosses
from megatron_haplovl.training.stages import stage_of
from megatron_haplovl.training.step import TimedBatches

logger = logging.getLogger(__name__)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Losses on --valid-data-path over --eval-iters global batches, the same ones every time.

    Returns:
        What was logged, by name; nothing without --valid-data-path.
    """
    if run.valid_data is None:
        return {}
    with run.operation.clock.during("evaluate"):
        return _evaluate(run, run.valid_data, step)


def _evaluate(run: Run, data: BatchLoader, step: int) -> dict[str, float]:
    steps = min(run.config.logging.eval_iters, data.steps_available)
    number = sum(map(data.micro_batches_of, range(steps)))
    read = data.micro_batches(0) if run.steps.reads_data else iter(())
    micro_batches = TimedBatches(read, run.operation.clock, partial(_describe, data))
    with run.collection.around_evaluation():
        sums = run.steps.evaluate(run.bad_samples.settle(data, micro_batches, number, step), number)
    counts = data.counts_before(steps)
    figures = stage_of(run.config).figures
    for figure in figures:
        # A stage of a pipeline without the head has none.
        sums.setdefault(figure.name, torch.zeros((), device=run.device))
    reduced = reduce_metrics(sums, (*run.terms, *figures), counts, run.groups.stages_of_replicas)
    by_source = SourceLosses(data.source_names, run.terms, run.device)
    counts_of_sources = data.counts_by_source(range(steps))
    by_source.add(sums, counts_of_sources)
    reduced |= by_source.columns(run.groups.stages_of_replicas)
    metrics = {f"valid {name}": value for name, value in reduced.items()}
    line = training_line(step, run.config.schedule.train_iters, metrics, title="validation at iteration")
    logger.info(line, extra=NO_PREFIX)
    run.sinks.record(step, metrics)
    if step == run.first_step and run.groups.world.rank == 0:
        name_unread_sources(data.source_names, counts_of_sources, steps)
    return metrics


def _describe(data: BatchLoader, number: int) -> str:
    return f"validation {data.describe(0, number)}"


def name_unread_sources(names: Sequence[str], counts: IntArray, steps: int) -> None:
    """Say which sources no batch holds: held-out samples are read in order, so --eval-iters may not reach them all."""
    samples = counts[:, SOURCE_COUNT_NAMES.index("samples")]
    unread = [name for name, number in zip(names, samples.tolist(), strict=True) if number == 0]
    if unread:
        logger.warning(
            f"held-out data: no sample of {', '.join(unread)} is in the {steps} global batches of an evaluation, so "
            "there is no loss of it; raise --eval-iters"
        )
