"""Checks of the settings about saving and resuming."""

from __future__ import annotations

from megatron_haplovl.config.bounds import check_at_least_1
from megatron_haplovl.config.schema import Config


def validate_checkpoint(config: Config) -> None:
    """Check that the settings about saving and resuming fit together.

    Raises:
        ValueError: the first contradiction found.
    """
    settings = config.checkpoint
    check_at_least_1(
        settings,
        *("save_interval", "exit_interval", "exit_duration_in_mins", "keep_last", "keep_every", "max_failed_saves"),
        "non_persistent_save_interval",
    )
    if settings.save is None:
        _refuse_without_save(config)
    if settings.keep_every is not None and settings.keep_last is None:
        raise ValueError("--keep-every keeps some of those that --keep-last would delete; give --keep-last, too")
    if (settings.non_persistent_save_interval is None) != (settings.non_persistent_local_ckpt_dir is None):
        raise ValueError("--non-persistent-save-interval and --non-persistent-local-ckpt-dir need each other")
    _validate_resuming(config)


def _refuse_without_save(config: Config) -> None:
    settings = config.checkpoint
    if settings.save_interval is not None:
        raise ValueError("--save-interval needs --save")
    if settings.keep_last is not None or settings.async_save:
        raise ValueError("--keep-last and --async-save need --save")
    for name in ("exit_interval", "exit_duration_in_mins", "kill_switch_file"):
        if getattr(settings, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} saves before the run leaves, so it needs --save")
    if settings.non_persistent_save_interval is not None:
        raise ValueError("--non-persistent-save-interval copies what --save keeps, so it needs --save")


def _validate_resuming(config: Config) -> None:
    settings = config.checkpoint
    if settings.allow_fallback and settings.load is None:
        raise ValueError("--allow-fallback needs --load")
    if settings.override_opt_param_scheduler and settings.use_checkpoint_opt_param_scheduler:
        raise ValueError(
            "--override-opt_param-scheduler takes the learning rates of the flags, and "
            "--use-checkpoint-opt_param-scheduler those of the checkpoint; keep one of them"
        )
    if settings.use_checkpoint_opt_param_scheduler and config.resume_from is None:
        raise ValueError("--use-checkpoint-opt_param-scheduler is for a run that goes on, so it needs --load")
    if settings.finetune:
        _validate_finetune(config)


def _validate_finetune(config: Config) -> None:
    if config.checkpoint.load is None:
        raise ValueError("--finetune takes the weights of --load; give that, too")
    if config.init.pretrained_checkpoint is not None:
        raise ValueError("--finetune starts from the weights of --load; leave --pretrained-checkpoint out")
    if config.checkpoint.save == config.checkpoint.load:
        raise ValueError(
            "--finetune starts anew from --load, so with the same --save a restart would lose what the run has done; "
            "give another --save, or --pretrained-checkpoint instead of --finetune, and --load for the run's own folder"
        )
