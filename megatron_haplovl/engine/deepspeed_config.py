"""From flags to a DeepSpeed configuration; a JSON given by the user is merged in and must not contradict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_haplovl.config.layout import check_batch
from megatron_haplovl.config.schema import Config

_SET_BY_FLAGS = ("optimizer", "scheduler", "fp16", "pipeline", "tensorboard", "wandb", "csv_monitor", "comet")
"""Sections of a DeepSpeed JSON for what flags do here in another way."""


def deepspeed_config(config: Config, data_parallel_size: int, sequences: int | None = None) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, whose batch sizes count sequences.

    Args:
        config: flags.
        data_parallel_size: ranks that hold different sequences.
        sequences: of a step, empty ones included; None: --global-batch-size is their number.

    Raises:
        ValueError: the global batch does not divide, the JSON is unreadable, or it contradicts a flag.
    """
    schedule = config.schedule
    sequences = schedule.global_batch_size if sequences is None else sequences
    per_pass = schedule.micro_batch_size * data_parallel_size
    sentence = check_batch(sequences, schedule.micro_batch_size, data_parallel_size)
    if sentence is not None:
        raise ValueError(sentence)
    ours: dict[str, Any] = {
        "train_batch_size": sequences,
        "train_micro_batch_size_per_gpu": schedule.micro_batch_size,
        "gradient_accumulation_steps": sequences // per_pass,
        "gradient_clipping": config.optimizer.clip_grad,
        # DeepSpeed keeps fp32 master weights beside bf16 ones only under ZeRO. Without it, fp32 weights and bf16
        # arithmetic (autocast) give the same training.
        "bf16": {"enabled": config.precision.bf16 and config.parallel.zero_stage > 0},
        "torch_autocast": {"enabled": config.precision.bf16 and config.parallel.zero_stage == 0, "dtype": "bfloat16"},
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            # Unless told otherwise, DeepSpeed pins the host's memory if there is a GPU.
            "offload_optimizer": {"device": config.parallel.offload_optimizer},
            "offload_param": {"device": config.parallel.offload_param},
        },
    }
    if config.parallel.offload_optimizer == "cpu" and config.optimizer.adamw_implementation == "torch":
        # By default DeepSpeed offloads no optimizer but its own.
        ours["zero_force_ds_cpu_optimizer"] = False
    quiet: dict[str, Any] = {
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": config.profile.wall_clock_breakdown,
        "zero_allow_untested_optimizer": True,
    }
    if config.precision.bf16 and config.parallel.zero_stage > 0:
        quiet["data_types"] = {"grad_accum_dtype": "fp32"}
    # Every tensor-parallel rank sends its own hidden states, because with sequence parallelism they differ.
    quiet["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.parallel.deepspeed_config is None:
        return _as_engine_wants({**quiet, **ours}, config)
    theirs = _read(config.parallel.deepspeed_config)
    for forbidden in _SET_BY_FLAGS:
        if forbidden in theirs and theirs[forbidden] != {"enabled": False}:
            raise ValueError(
                f"{config.parallel.deepspeed_config}: {forbidden!r} is set by flags here (--lr, --lr-decay-style, "
                "--bf16, --pipeline-partition, --tensorboard-dir, ...); remove it from the JSON"
            )
    merged = _merge(ours, theirs, config.parallel.deepspeed_config)
    _check_offload(merged["zero_optimization"], config.parallel.deepspeed_config)
    return _as_engine_wants({**quiet, **merged}, config)


def _check_offload(zero: dict[str, Any], path: str) -> None:
    """Refuse keys that DeepSpeed would ignore without NVMe, and one that our learning rates would not reach.

    With `ratio` below 1, DeepSpeed steps a second optimizer whose learning rate nothing schedules.
    """
    for key, flag in (("cpu_offload", "--offload-optimizer cpu"), ("cpu_offload_param", "--offload-param cpu")):
        if key in zero:
            raise ValueError(f"{path}: zero_optimization.{key} is an old name; remove it and give {flag} instead")
    for section in ("offload_optimizer", "offload_param"):
        for key in zero[section]:
            if key not in ("device", "pin_memory"):
                raise ValueError(
                    f"{path}: zero_optimization.{section}.{key} is not used here; remove it (device and pin_memory are)"
                )


def _as_engine_wants(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """Adapt the settings that DeepSpeed understands in another way than we mean them."""
    # DeepSpeed counts context-parallel ranks as data-parallel ones, so it must multiply out the global batch itself.
    del settings["train_batch_size"]
    if config.parallel.zero_stage == 0:
        settings["gradient_clipping"] = 0.0  # See `engine.clipping`.
    return settings


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--deepspeed_config {path}: not a JSON object")
    return content


def _merge(ours: dict[str, Any], theirs: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, path, f"{prefix}{key}.")
        elif value == "auto":
            if key not in ours:
                raise ValueError(f"{path}: {prefix}{key} is 'auto', and no flag sets it; give its value")
        elif key not in ours:
            merged[key] = value
        elif value != ours[key]:
            raise ValueError(f"{path}: {prefix}{key} is {value!r}, but the flags say {ours[key]!r}; make them agree")
    return merged
