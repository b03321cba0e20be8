"""What is logged of the steps since the last log line."""

from __future__ import annotations

import logging

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.engine.norms import parameters_norm
from megatron_haplovl.engine.steps import StepResult
from megatron_haplovl.training.flops import training_flops
from megatron_haplovl.training.forecast import Forecast
from megatron_haplovl.training.logging import NO_PREFIX, training_line
from megatron_haplovl.training.memory import GIB, peak_bytes
from megatron_haplovl.training.rank_figures import RankFigures, forward_is_alone, gather_figures, rank_columns, readers
from megatron_haplovl.training.recipe import trained_parts
from megatron_haplovl.training.schedule import learning_rate
from megatron_haplovl.training.setup import Run
from megatron_haplovl.training.source_report import SourceLosses, consumed_columns
from megatron_haplovl.training.token_kinds import TokenKinds

logger = logging.getLogger(__name__)


class Window:
    """Counts steps, and writes the training line and the same numbers to every sink.

    Args:
        run: what is trained; counting begins at its first step.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._kinds = TokenKinds(run.terms, run.train_data.counts_before(run.first_step))
        self._consumed = run.train_data.counts_by_source(range(run.first_step))
        self._by_source = SourceLosses(run.train_data.source_names, run.terms, run.device)
        self._forecast = Forecast(run.config, run.operation.clock, run.first_step)
        self._forward_counts = forward_is_alone(run.groups, run.config.parallel.zero_stage)
        self._batches = BatchSchedule.of(run.config.schedule)
        self._positions = 0
        self._clear()
        self._expect(run.first_step + 1)

    def _clear(self) -> None:
        self._steps, self._tokens, self._read_tokens, self._flops = 0, 0, 0, 0.0
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
        self._kinds.add(result.counts)
        # A step that is passed over is read, too.
        self._read_tokens += result.counts.tokens
        if result.losses:
            self._tokens += result.counts.tokens
            self._flops += _flops(self._run, result)
        self._seconds += seconds
        self._waited += waited
        self._forecast.add(seconds)
        counts_of_sources = self._run.train_data.counts_by_source(range(step - 1, step))
        if result.updated:
            self._by_source.add(result.sums, counts_of_sources)
        self._consumed += counts_of_sources
        self._expect(step + 1)

    def report(self, step: int, result: StepResult, positions: int) -> None:
        """Log the window that ends with this step, and begin the next one. Called by every rank.

        Args:
            step: optimizer steps done.
            result: the last one's.
            positions: of the micro-batches that this rank has read so far, padding included.
        """
        run, config = self._run, self._run.config
        batches, ranks = self._batches, run.groups.world.size
        forward = run.forward_time.take() if self._forward_counts else 0.0
        mine = RankFigures(self._waited, self._waited + forward, peak_bytes(run.device), positions - self._positions)
        figures = gather_figures(mine, run.groups.control)
        self._positions = positions
        read = sum(figure.positions for figure in readers(figures, run.groups))
        rate = self._flops / self._seconds / ranks
        columns: dict[str, float | int] = {
            "consumed samples": batches.before(step),
            **self._kinds.columns(),
            "elapsed time per iteration (ms)": 1000.0 * self._seconds / self._steps,
            "loader wait (ms)": 1000.0 * max(figure.waited for figure in figures) / self._steps,
            **rank_columns(figures, self._steps),
            "learning rate": learning_rate(config, step - 1),
            **self._learning_rates(),
            "global batch size": batches.size(step - 1),
            **result.losses,
            **({} if result.grad_norm is None else {"grad norm": result.grad_norm}),
            **self._norms(),
            "number of skipped iterations": run.guard.skipped,
            "number of nan iterations": run.guard.not_finite,
            **run.bad_samples.columns(),
            "padding (%)": 100.0 * (1.0 - self._read_tokens / read),
            "samples per second": (batches.before(step) - batches.before(step - self._steps)) / self._seconds,
            "tokens per gpu per second (tgs)": self._tokens / self._seconds / ranks,
            "TFLOPs": rate / 1e12,
            **({} if run.peak_operations is None else {"MFU (%)": 100.0 * rate / run.peak_operations}),
            "peak memory (GiB)": max(figure.peak_bytes for figure in figures) / GIB,
            "time to the end (h)": self._forecast.seconds_left(step) / 3600.0,
            **self._by_source.columns(run.groups.stages_of_replicas),
            **consumed_columns(run.train_data.source_names, self._consumed),
        }
        logger.info(training_line(step, config.schedule.train_iters, columns), extra=NO_PREFIX)
        run.sinks.record(step, columns)
        run.display.report(columns)
        self._clear()

    def _learning_rates(self) -> dict[str, float]:
        """Rates of the parts, if any has one of its own."""
        rates = self._run.steps.learning_rates()
        return {f"learning rate/{part}": rate for part, rate in rates.items()} if len(set(rates.values())) > 1 else {}

    def _norms(self) -> dict[str, float | int]:
        run, found = self._run, dict[str, float | int]()
        if run.config.logging.log_params_norm:
            found["params norm"] = parameters_norm(run.engine, run.model)
        if run.zeros is not None:
            found["num zeros"] = run.zeros.take()
        return found

    def _expect(self, step: int) -> None:
        """The step that comes next: its gradient is looked at if a line follows it."""
        if self._run.zeros is not None:
            interval, last = self._run.config.logging.log_interval, self._run.config.schedule.train_iters
            self._run.zeros.wanted = step == last or step % interval == 0


def _flops(run: Run, result: StepResult) -> float:
    stage = run.config.stage
    return training_flops(
        run.config.model,
        tokens=result.counts.tokens,
        head_tokens=getattr(result.counts, stage.head_tokens),
        visible_pairs=result.counts.pairs,
        stage=stage,
        trained=trained_parts(run.config.recipe),
    )
