"""What saving will take, said before the first step: number and size of the checkpoints, and the room that there is."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from megatron_haplovl.checkpoint.folders import complete_checkpoints, step_of
from megatron_haplovl.checkpoint.space import Keeping, checkpoint_bytes, free_bytes, gigabytes
from megatron_haplovl.config.schema import Config
from megatron_haplovl.parallel.launch import ranks_on_this_machine
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.recipe import is_trained

logger = logging.getLogger(__name__)


def bytes_to_save(config: Config, model: ShardedModel) -> int:
    """Bytes of one checkpoint of a run."""
    return checkpoint_bytes(
        model.shapes,
        {name for name in model.shapes if is_trained(name, config.recipe)},
        torch.bfloat16 if config.precision.bf16 else torch.float32,
        ranks=model.groups.world.size,
        tensor_ranks=model.groups.tensor.size,
    )


def report_saving(config: Config, size: int, first_step: int) -> None:
    """Log what the run's checkpoints will take, and warn if there is no room. Called by the first rank.

    Args:
        config: with `checkpoint.save`.
        size: bytes of one checkpoint.
        first_step: optimizer steps that are done.
    """
    settings = config.checkpoint
    assert settings.save is not None
    root = Path(settings.save)
    there = [step_of(folder) for folder in complete_checkpoints(root)]
    keeping = Keeping(settings.save_interval, settings.keep_last, settings.keep_every)
    number = keeping.most_at_once(first_step, config.schedule.train_iters, there)
    free, new = free_bytes(root), max(0, number - len(there))
    beside = f" (of which {len(there)} are there)" if there else ""
    logger.info(f"checkpoints: {number} x {gigabytes(size)}{beside}, {gigabytes(free)} free in {root}")
    if new * size > free:
        logger.warning(
            f"there is no room for {new} more checkpoints of {gigabytes(size)} in {root} ({gigabytes(free)} free): "
            "give --keep-last N (one more is there while it is written), a longer --save-interval, or a --save with "
            "more room"
        )
    if settings.non_persistent_local_ckpt_dir is not None:
        ranks, here = int(os.environ.get("WORLD_SIZE", "1")), ranks_on_this_machine()
        logger.info(
            f"local copies: 2 x {gigabytes(size * here // ranks)}, {gigabytes(size)} after a restart, "
            f"{gigabytes(free_bytes(Path(settings.non_persistent_local_ckpt_dir)))} free in "
            f"{settings.non_persistent_local_ckpt_dir}"
        )
