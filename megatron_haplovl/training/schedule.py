"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the optimizer step number `step`, counted from 0.

    Linear warm-up from lr / lr_warmup_iters to --lr, then decay to --min-lr at --lr-decay-iters, constant after that.
    With --train-samples the same over the samples that are consumed.
    """
    schedule, peak, floor = config.schedule, config.optimizer.lr, config.optimizer.min_lr
    begin, end, full = float(step), float(step + 1), 1
    if schedule.counted_in == "samples":
        # In full batches: without a ramp these are steps, and the rates those of a run in steps to the last bit.
        batches, full = BatchSchedule.of(schedule), schedule.global_batch_size
        begin, end = batches.before(step) / full, batches.before(step + 1) / full
    warmup, decayed = schedule.warmup / full, schedule.decay_end / full
    if begin < warmup:
        return peak * min(end, warmup) / warmup
    progress = min(1.0, (begin - warmup) / (decayed - warmup))
    if schedule.lr_decay_style == "constant":
        return peak
    if schedule.lr_decay_style == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
