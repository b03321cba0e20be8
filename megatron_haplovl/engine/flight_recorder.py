"""NCCL's flight recorder: what each rank has sent last, kept for the case that a collective never ends."""

from __future__ import annotations

from collections.abc import MutableMapping

from megatron_haplovl.config.schema import CheckpointConfig

_COLLECTIVES = 2000
"""That each rank remembers."""
_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": None,
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
"""Variables of torch 2.11 to 2.13, and older names that it takes, too."""


def record_collectives(environment: MutableMapping[str, str], config: CheckpointConfig) -> None:
    """Ask torch to record collectives and to write them into `debug` in --save, unless the user has decided already.

    Torch writes a file for each rank when a collective has taken longer than its timeout.

    Args:
        environment: of this process, before its process group is made.
        config: where the run saves.
    """
    wanted = {"TORCH_FR_BUFFER_SIZE": str(_COLLECTIVES), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if config.save is not None:
        wanted["TORCH_FR_DUMP_TEMP_FILE"] = f"{config.save}/debug/nccl_rank_"
    for name, value in wanted.items():
        if name not in environment and _NAMES[name] not in environment:
            environment[name] = value
