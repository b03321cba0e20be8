"""What is logged of the steps since the last log line."""

from __future__ import annotations

import logging

from megatron_haplovl.engine.steps import StepResult
from megatron_haplovl.training.flops import training_flops
from megatron_haplovl.training.logging import NO_PREFIX, training_line
from megatron_haplovl.training.schedule import learning_rate
from megatron_haplovl.training.setup import Run
from megatron_haplovl.training.source_report import SourceLosses, consumed_columns

logger = logging.getLogger(__name__)


class Window:
    """Counts steps, and writes the training line and the same numbers to every sink.

    Args:
        run: what is trained; counting begins at its first step.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._consumed_tokens = run.train_data.counts_before(run.first_step).tokens
        self._consumed = run.train_data.counts_by_source(range(run.first_step))
        self._by_source = SourceLosses(run.train_data.source_names, run.terms, run.device)
        self._clear()

    def _clear(self) -> None:
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._seconds, self._waited = 0.0, 0.0
        self._by_source.clear()

    def add(self, step: int, result: StepResult, seconds: float, waited: float) -> None:
        """Count a step.

        Args:
            step: optimizer steps done, this one included.
            result: what it reports.
            seconds: that it took.
            waited: seconds of these that this rank spent waiting for batches.
        """
        self._steps += 1
        self._consumed_tokens += result.counts.tokens
        if result.losses:
            self._tokens += result.counts.tokens
            self._flops += _flops(self._run, result)
        self._seconds += seconds
        self._waited += waited
        counts_of_sources = self._run.train_data.counts_by_source(range(step - 1, step))
        if result.updated:
            self._by_source.add(result.sums, counts_of_sources)
        self._consumed += counts_of_sources

    def report(self, step: int, result: StepResult) -> None:
        """Log the window that ends with this step, and begin the next one. Called by every rank."""
        run, config = self._run, self._run.config
        batch_size, ranks = config.schedule.global_batch_size, run.groups.world.size
        columns: dict[str, float | int] = {
            "consumed samples": step * batch_size,
            "consumed tokens": self._consumed_tokens,
            "elapsed time per iteration (ms)": 1000.0 * self._seconds / self._steps,
            "loader wait (ms)": 1000.0 * self._waited / self._steps,
            "learning rate": learning_rate(config, step - 1),
            "global batch size": batch_size,
            **result.losses,
            **({} if result.grad_norm is None else {"grad norm": result.grad_norm}),
            "number of skipped iterations": run.guard.skipped,
            "number of nan iterations": run.guard.not_finite,
            **run.bad_samples.columns(),
            "samples per second": self._steps * batch_size / self._seconds,
            "tokens per gpu per second (tgs)": self._tokens / self._seconds / ranks,
            "TFLOPs": self._flops / self._seconds / ranks / 1e12,
            **self._by_source.columns(run.groups.stages_of_replicas),
            **consumed_columns(run.train_data.source_names, self._consumed),
        }
        logger.info(training_line(step, config.schedule.train_iters, columns), extra=NO_PREFIX)
        run.sinks.record(step, columns)
        self._clear()


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
