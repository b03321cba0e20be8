"""The training loop: one optimizer step after the other, with logging, evaluation and saving in between."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_haplovl.data.batch import Batch, StepCounts
from megatron_haplovl.engine.metrics import reduce_metrics
from megatron_haplovl.engine.steps import Sums
from megatron_haplovl.model.haplovl import attention_mask
from megatron_haplovl.training.flops import training_flops
from megatron_haplovl.training.logging import training_line
from megatron_haplovl.training.schedule import learning_rate
from megatron_haplovl.training.setup import Run


@dataclass
class _Progress:
    """What the log line counts, since the last line and since the start."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0


def train(run: Run) -> None:
    """Train until --train-iters (or --exit-interval), saving and evaluating on the way."""
    config, last_step = run.config, run.config.schedule.train_iters
    micro_batches = run.train_data.micro_batches(run.first_step) if run.steps.reads_data else iter(())
    window, consumed_tokens = _Progress(), _tokens_before(run, run.first_step)
    step = run.first_step
    if step >= last_step:
        run.logger.print(f"nothing to do: {step} steps are done, --train-iters is {last_step}")
    if step < last_step and step == 0:
        evaluate(run, step)
    while step < last_step:
        started = time.perf_counter()
        metrics, pairs = train_step(run, step, micro_batches)
        counts = run.train_data.counts(step)
        step += 1
        consumed_tokens += counts.tokens
        window.steps += 1
        window.seconds += time.perf_counter() - started
        window.tokens += counts.tokens
        window.flops += _flops(run, counts, pairs)
        if step % config.logging.log_interval == 0 or step == last_step:
            _log(run, step, metrics, window, consumed_tokens)
            window = _Progress()
        if _is_due(config.logging.eval_interval, step) or step == last_step:
            evaluate(run, step)
        leave = _is_due(config.checkpoint.exit_interval, step)
        if run.writer is not None and (_is_due(config.checkpoint.save_interval, step) or step == last_step or leave):
            run.writer.save(step, run.train_data.plan_key)
        if leave and step < last_step:
            run.logger.print(f"leaving after step {step} (--exit-interval {config.checkpoint.exit_interval})")
            break
    if run.writer is not None:
        run.writer.close()


def train_step(run: Run, step: int, micro_batches: Iterator[Batch]) -> tuple[dict[str, float], int]:
    """One optimizer step over the global batch number `step`.

    Returns:
        Losses of the step, with "loss" their trained sum and "grad norm" the norm before clipping, equal on every rank;
        and this rank's visible (query, key) pairs.

    Raises:
        FloatingPointError: a loss or the gradient norm is not finite, on every rank at once and before anything is
            saved.
    """
    counts = run.train_data.counts(step)
    for param_group in run.engine.optimizer.param_groups:
        param_group["lr"] = learning_rate(run.config, step) * param_group["lr_ratio"]
    metrics: dict[str, float] = {}
    pairs = _PairCounter(micro_batches, run.config.model.image_attention)
    norm = run.steps.train(pairs, counts, lambda sums: metrics.update(_checked_metrics(run, step, sums, counts)))
    metrics["grad norm"] = norm
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step + 1}: the gradient norm is not finite, though the loss is: {metrics}; the weights can no "
            "longer be trusted and were not saved"
        )
    return metrics, pairs.count


class _PairCounter:
    """Passes micro-batches on and counts their visible (query, key) pairs."""

    def __init__(self, micro_batches: Iterator[Batch], image_attention: str) -> None:
        self._micro_batches, self._image_attention = micro_batches, image_attention
        self.count = 0

    def __iter__(self) -> _PairCounter:
        return self

    def __next__(self) -> Batch:
        batch = next(self._micro_batches)
        self.count += attention_mask(batch, self._image_attention).visible_pairs
        return batch


def _checked_metrics(run: Run, step: int, sums: Sums, counts: StepCounts) -> dict[str, float]:
    metrics = reduce_metrics(sums, run.terms, counts, run.groups.stages_of_replicas)
    if not all(math.isfinite(value) for value in metrics.values()):
        raise FloatingPointError(f"step {step + 1}: a loss is not finite: {metrics}; the weights were not updated")
    return {"loss": sum(metrics[term.name] for term in run.terms if term.trained), **metrics}


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Losses on --valid-data-path over --eval-iters global batches, the same ones every time; logged and returned."""
    if run.valid_data is None:
        return {}
    steps = min(run.config.logging.eval_iters, run.valid_data.steps_available)
    number = steps * run.engine.gradient_accumulation_steps()
    micro_batches = run.valid_data.micro_batches(0) if run.steps.reads_data else iter(())
    sums = run.steps.evaluate(micro_batches, number)
    counts = _sum_counts([run.valid_data.counts(i) for i in range(steps)])
    reduced = reduce_metrics(sums, run.terms, counts, run.groups.stages_of_replicas)
    metrics = {f"valid {name}": value for name, value in reduced.items()}
    run.logger.print(" validation at iteration " + training_line(step, run.config.schedule.train_iters, metrics)[10:])
    run.logger.record(step, metrics)
    return metrics


def _sum_counts(counts: list[StepCounts]) -> StepCounts:
    return StepCounts(**{name: sum(getattr(c, name) for c in counts) for name in vars(counts[0])})


def _log(run: Run, step: int, metrics: dict[str, float], window: _Progress, consumed_tokens: int) -> None:
    batch_size = run.config.schedule.global_batch_size
    losses = {name: value for name, value in metrics.items() if name != "grad norm"}
    columns: dict[str, float | int] = {
        "consumed samples": step * batch_size,
        "consumed tokens": consumed_tokens,
        "elapsed time per iteration (ms)": 1000.0 * window.seconds / window.steps,
        "learning rate": learning_rate(run.config, step - 1),
        "global batch size": batch_size,
        **losses,
        "grad norm": metrics["grad norm"],
        "number of skipped iterations": int(run.engine.skipped_steps),
        "number of nan iterations": 0,
        "samples per second": window.steps * batch_size / window.seconds,
        "tokens per gpu per second (tgs)": window.tokens / window.seconds / run.groups.world.size,
        "TFLOPs": window.flops / window.seconds / run.groups.world.size / 1e12,
    }
    run.logger.print(training_line(step, run.config.schedule.train_iters, columns))
    run.logger.record(step, columns)


def _flops(run: Run, counts: StepCounts, local_pairs: int) -> float:
    stage1 = run.config.recipe.recipe == "distill"
    return training_flops(
        run.config.model,
        tokens=counts.tokens,
        head_tokens=counts.text_tokens if stage1 else counts.lm_tokens,
        # The other ranks' sequences are packed alike; their exact pairs are not worth a message.
        visible_pairs=local_pairs * run.groups.data.size,
        with_post_decoder=not stage1,
    )


def _tokens_before(run: Run, step: int) -> int:
    return sum(run.train_data.counts(i).tokens for i in range(step))


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
