"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megatron_haplovl.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the optimizer step number `step`, counted from 0.

    Linear warm-up from lr / lr_warmup_iters to --lr, then decay to --min-lr at --lr-decay-iters, constant after that.
    """
    schedule, peak, floor = config.schedule, config.optimizer.lr, config.optimizer.min_lr
    if step < schedule.lr_warmup_iters:
        return peak * (step + 1) / schedule.lr_warmup_iters
    end = schedule.train_iters if schedule.lr_decay_iters is None else schedule.lr_decay_iters
    progress = min(1.0, (step - schedule.lr_warmup_iters) / (end - schedule.lr_warmup_iters))
    if schedule.lr_decay_style == "constant":
        return peak
    if schedule.lr_decay_style == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
