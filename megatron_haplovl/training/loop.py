"""The training loop: one optimizer step after the other, with logging, evaluation and saving in between."""

from __future__ import annotations

import logging
import time

from megatron_haplovl.operation.endings import Ending, ExitCode
from megatron_haplovl.training.setup import Run
from megatron_haplovl.training.step import TimedBatches, train_step
from megatron_haplovl.training.validation import evaluate
from megatron_haplovl.training.window import Window

logger = logging.getLogger(__name__)


def train(run: Run) -> Ending:
    """Train until --train-iters, or until there is a reason to leave, saving and evaluating on the way.

    Returns:
        How the run has ended: done, or to be started again. Every other end is raised.

    Raises:
        FloatingPointError: see :func:`train_step`.
        OSError: the last checkpoint could not be saved.
    """
    config, last_step = run.config, run.config.schedule.train_iters
    batches = run.train_data.micro_batches(run.first_step) if run.steps.reads_data else iter(())
    micro_batches = TimedBatches(batches, run.operation.clock)
    window = Window(run)
    step, reason = run.first_step, None
    if step >= last_step:
        logger.info(f"nothing to do: {step} steps are done, --train-iters is {last_step}")
    if step < last_step and step == 0:
        evaluate(run, step)
    while step < last_step and reason is None:
        started, waited = time.perf_counter(), micro_batches.waited
        result = train_step(run, step, micro_batches)
        step += 1
        window.add(step, result, time.perf_counter() - started, micro_batches.waited - waited)
        is_last = step == last_step
        if is_last or _is_due(config.logging.log_interval, step):
            window.report(step, result, micro_batches.positions)
        if is_last or _is_due(config.logging.eval_interval, step):
            with run.operation.clock.during("evaluate"):
                evaluate(run, step)
        reason = None if is_last else run.leaving.agreed(step)
        if run.writer is not None and (is_last or reason is not None or _is_due(config.checkpoint.save_interval, step)):
            with run.operation.clock.during("save"):
                run.writer.save(step, run.train_data.plan_key)
    if run.writer is not None:
        with run.operation.clock.during("save"):
            run.writer.close()
    if reason is not None:
        logger.info(f"leaving after step {step} ({reason})")
        return Ending(ExitCode.COME_BACK, f"left after step {step} of {last_step}: {reason}", "leaving", step)
    return Ending(ExitCode.DONE, f"all {last_step} steps are done", "done", step)


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
