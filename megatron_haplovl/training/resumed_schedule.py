"""Which learning rates a resumed run goes on with, if flags and checkpoint differ: Megatron's two flags decide."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.schema import Config
from megatron_haplovl.training.schedule import learning_rate

_RATES = ("lr", "min_lr", "embedding_lr", "pre_decoder_lr", "connector_lr", "post_decoder_lr")


@dataclasses.dataclass(frozen=True)
class ResumedSchedule:
    """What a resumed run goes on with."""

    config: Config
    """The settings, with the checkpoint's learning rates if they were asked for."""
    remark: str
    """What the log says about a difference; empty if there is none."""
    is_jump: bool
    """Whether the rate of the next step is another one than it would have been, and nobody has asked for that."""


def resumed_schedule(config: Config, resumed: Path, step: int) -> ResumedSchedule:
    """Compare the learning rates of a run with those that a checkpoint was on its way with.

    Args:
        config: the run's settings.
        resumed: the checkpoint.
        step: optimizer steps that are done.

    Raises:
        ValueError: the checkpoint's settings cannot be read, or its schedule is asked for and counts something else.
    """
    was = read_config(resumed)
    differences = _differences(was, config)
    if not differences:
        return ResumedSchedule(config, "", is_jump=False)
    old, new = learning_rate(was, step), learning_rate(config, step)
    both = f"{', '.join(differences)}: at step {step + 1} the checkpoint's rate is {old:.6g}, the flags' {new:.6g}"
    if config.checkpoint.use_checkpoint_opt_param_scheduler:
        remark = f"learning rate: the checkpoint's schedule goes on ({both})"
        return ResumedSchedule(_with_schedule_of(was, config), remark, is_jump=False)
    if config.checkpoint.override_opt_param_scheduler:
        return ResumedSchedule(config, f"learning rate: the flags' schedule from here on ({both})", is_jump=False)
    parts_differ = any(getattr(was.optimizer, name) != getattr(config.optimizer, name) for name in _RATES[2:])
    is_jump = old != new or parts_differ
    return ResumedSchedule(
        config,
        f"the learning rate {'jumps' if is_jump else 'will differ from what it would have been'} ({both}); "
        "--use-checkpoint-opt_param-scheduler goes on with the checkpoint's schedule, "
        "--override-opt_param-scheduler says that the flags' is meant",
        is_jump,
    )


def _decay_end(config: Config) -> int | None:
    schedule = config.schedule
    return None if schedule.lr_decay_style == "constant" else schedule.decay_end


def _differences(was: Config, now: Config) -> list[str]:
    """What differs, as flags with both values."""
    found = []
    counted = now.schedule.counted_in
    pairs = [(name, getattr(was.optimizer, name), getattr(now.optimizer, name)) for name in _RATES]
    for name in ("lr_decay_style", f"lr_warmup_{counted}"):
        pairs.append((name, getattr(was.schedule, name), getattr(now.schedule, name)))
    if was.schedule.counted_in == counted:
        by_length = all(getattr(config.schedule, f"lr_decay_{counted}") is None for config in (was, now))
        pairs.append((f"train_{counted}" if by_length else f"lr_decay_{counted}", _decay_end(was), _decay_end(now)))
    else:
        pairs.append(("train_samples", was.schedule.train_samples, now.schedule.train_samples))
    for name, old, new in pairs:
        if old != new:
            found.append(f"--{name.replace('_', '-')} was {old} and is {new}")
    return found


def _with_schedule_of(was: Config, config: Config) -> Config:
    counted = config.schedule.counted_in
    if was.schedule.counted_in != counted:
        raise ValueError(
            f"--use-checkpoint-opt_param-scheduler: the checkpoint's learning rate is counted in "
            f"{was.schedule.counted_in}, this run in {counted}; give --train-{was.schedule.counted_in}, as before, or "
            "leave it out"
        )
    rates = {name: getattr(was.optimizer, name) for name in _RATES}
    of_checkpoint: dict[str, Any] = {
        "lr_decay_style": was.schedule.lr_decay_style,
        f"lr_warmup_{counted}": was.schedule.warmup,
        # In words of its own, because the length may be another one now.
        f"lr_decay_{counted}": _decay_end(was),
    }
    schedule = dataclasses.replace(config.schedule, **of_checkpoint)
    return dataclasses.replace(config, schedule=schedule, optimizer=dataclasses.replace(config.optimizer, **rates))
