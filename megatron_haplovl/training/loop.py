"""The training loop: one optimizer step after the other, with logging, evaluation and saving in between."""

from __future__ import annotations

import logging
import time
from functools import partial

from megatron_haplovl.operation.endings import Ending, ExitCode
from megatron_haplovl.training.setup import Run
from megatron_haplovl.training.step import TimedBatches, train_step
from megatron_haplovl.training.validation import evaluate
from megatron_haplovl.training.window import Window

logger = logging.getLogger(__name__)


def train(run: Run) -> Ending:
    """Train until the last step, or until there is a reason to leave, saving and evaluating on the way.

    Returns:
        How the run has ended: done, or to be started again. Every other end is raised.

    Raises:
        RunEnd: see :func:`train_step`; or replicas differ before a save.
        ValueError: too many checkpoints, or the last one, could not be saved; or another run has taken --save over.
    """
    config, last_step = run.config, run.config.schedule.train_iters
    batches = run.train_data.micro_batches(run.first_step) if run.steps.reads_data else iter(())
    micro_batches = TimedBatches(batches, run.operation.clock, partial(run.train_data.describe, run.first_step))
    window = Window(run)
    step, reason = run.first_step, None
    if step >= last_step:
        logger.info(f"nothing to do: {step} steps are done, and the run has {last_step}")
    if step < last_step and step == 0:
        evaluate(run, step)
    while step < last_step and reason is None:
        started, waited = time.perf_counter(), micro_batches.waited
        result = train_step(run, step, micro_batches)
        if step == run.first_step:
            run.settle()
        step += 1
        seconds = time.perf_counter() - started
        window.add(step, result, seconds, micro_batches.waited - waited)
        run.after_step(step, seconds)
        is_last = step == last_step
        if is_last or _is_due(config.logging.log_interval, step):
            window.report(step, result, micro_batches.positions)
        if is_last or _is_due(config.logging.eval_interval, step):
            evaluate(run, step)
        if run.questions is not None and (is_last or _is_due(config.logging.sample_interval, step)):
            with run.operation.clock.during("evaluate"):
                run.questions.answer(step, run.engine, run.model, run.device, run.operation.clock.enter)
        reason = None if is_last else run.leaving.agreed(step)
        if _save(run, step, must=is_last or reason is not None) and not is_last and reason is None:
            # Whoever asked while it was being saved need not wait for another step and another checkpoint.
            reason = run.leaving.agreed(step)
    if run.writer is not None:
        with run.operation.clock.during("save"):
            run.writer.close()
    run.leaving.obeyed()
    if reason is not None:
        kept = "nothing is saved without --save" if run.writer is None else "everything is saved"
        sentence = f"left after step {step} of {last_step}: {reason}; {kept}"
        return Ending(ExitCode.COME_BACK, sentence, "leaving", step)
    return Ending(ExitCode.DONE, f"all {last_step} steps are done", "done", step)


def _save(run: Run, step: int, *, must: bool) -> bool:
    """Save where that is due, or must be, and say so; otherwise a local copy may be due."""
    if run.writer is None:
        return False
    run.operation.notice_lost_lock()
    if must or run.writer.is_due(step):
        with run.operation.clock.during("save"):
            run.guard.before_save(step)
            run.writer.save(step, run.train_data.plan_key)
        return True
    if run.copies is not None and run.copies.is_due(step):
        with run.operation.clock.during("save"):
            run.guard.before_save(step)
            run.copies.save(run.engine, run.model, step, run.train_data.plan_key, run.writer.more_state())
    return False


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
