"""Losses on held-out data."""

from __future__ import annotations

import logging

from megatron_haplovl.engine.metrics import reduce_metrics
from megatron_haplovl.training.logging import NO_PREFIX, training_line
from megatron_haplovl.training.setup import Run
from megatron_haplovl.training.source_report import SourceLosses

logger = logging.getLogger(__name__)


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
    with run.collection.around_evaluation():
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
