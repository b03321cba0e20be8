"""A run whose length is counted in samples (--train-samples): what that is in steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.bounds import check_at_least_1
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.settings import SettingPath

_COUNTED = ("train", "lr_warmup", "lr_decay")


def with_length_in_steps(config: Config, said_by: Mapping[SettingPath, str]) -> Config:
    """The same run with its number of steps; and with nothing of its learning rate in steps, if it counts samples.

    Defaults in steps are taken as steps of full batches.

    Args:
        config: all settings.
        said_by: those that files and flags have set, each with who says so.

    Raises:
        ValueError: a run that counts samples has been given a number of steps, or sizes of batches that do not fit.
    """
    schedule = config.schedule
    if schedule.train_samples is None:
        return config
    for name in _COUNTED:
        where = said_by.get(("schedule", f"{name}_iters"))
        if where is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}-iters ({where}) counts steps, and a run of --train-samples {schedule.train_samples} is "
                f"counted in samples; leave it out{'' if name == 'train' else f' or give {flag}-samples'}, or leave "
                "out --train-samples"
            )
    check_at_least_1(schedule, "train_samples")
    batches, warmup, decay = BatchSchedule.of(schedule), schedule.lr_warmup_samples, schedule.lr_decay_samples
    if warmup is None:
        warmup = schedule.lr_warmup_iters * batches.full
    if decay is None and schedule.lr_decay_iters is not None:
        decay = schedule.lr_decay_iters * batches.full
    counted = dataclasses.replace(
        schedule,
        train_iters=batches.steps_for(schedule.train_samples),
        lr_warmup_iters=0,
        lr_warmup_samples=warmup,
        lr_decay_iters=None,
        lr_decay_samples=decay,
    )
    return dataclasses.replace(config, schedule=counted)
