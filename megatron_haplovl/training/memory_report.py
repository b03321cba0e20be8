"""What the planner expects a rank to hold, beside what is free for it."""

from __future__ import annotations

import logging
import os

import torch

from megatron_haplovl.config.layout import Layout, Workload
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.pipeline import PipelineCut
from megatron_haplovl.planning.estimate import RankMemory, estimate
from megatron_haplovl.planning.machine import DataSheet
from megatron_haplovl.planning.work import Work
from megatron_haplovl.training.memory import GIB, free_bytes
from megatron_haplovl.training.recipe import trained_parts

logger = logging.getLogger(__name__)


def expected_memory(
    config: Config, groups: ParallelGroups, device: torch.device, data: BatchLoader, stages: PipelineCut | None
) -> RankMemory:
    """The memory of a rank of this one's stage, by the planner, for a mean sequence of the data."""
    layout = Layout.of(config, data=groups.data.size)
    planned = estimate(
        Workload.of(config),
        mean_sequence(config, data),
        layout,
        DataSheet().cluster(gpus=groups.world.size),
        trained=trained_parts(config.recipe),
        bf16=config.precision.bf16,
        partition="auto" if stages is None else stages.partition,
        device=device.type,
    )
    return planned.stage_memories[groups.pipeline.rank]


def mean_sequence(config: Config, data: BatchLoader) -> Work:
    """A packed sequence with the mean contents of the first epoch's."""
    epoch = data.plan.epochs[0]
    lm, text, patches, tokens, _documents, tiles, pairs = (epoch.cumulative[-1] / epoch.num_packs).tolist()
    padding = config.data.seq_length - tokens
    return Work(
        tokens=config.data.seq_length,
        pairs=pairs + padding,
        patches=patches,
        tiles=tiles,
        head_tokens={"lm_tokens": lm, "text_tokens": text}[config.stage.head_tokens],
    )


def report_memory(memory: RankMemory, groups: ParallelGroups, device: torch.device) -> None:
    """Log what is expected of this rank beside what is free for it."""
    free, host_free = free_bytes(device), free_bytes(torch.device("cpu"))
    logger.info(describe_memory(memory, device, free, host_free))
    warning = does_not_fit(memory, device, free, host_free)
    # All ranks of a host are alike; the first of each tells.
    if warning is not None and (groups.world.rank == 0 or os.environ.get("LOCAL_RANK") == "0"):
        logger.warning(warning)


def describe_memory(memory: RankMemory, device: torch.device, free: int | None, host_free: int | None) -> str:
    """The expected memory of this rank and what is free for it, in one line.

    Args:
        memory: what is expected.
        device: what it runs on.
        free: bytes for this rank on the device.
        host_free: bytes for this rank on its host, for what is offloaded.
    """
    parts = {
        "weights": memory.engine.parameters,
        "gradients": memory.engine.gradients,
        "optimizer": memory.engine.optimizer,
        "buffers": memory.engine.buffers + memory.messages,
        "activations": memory.activations + memory.working,
        "teacher": memory.teacher,
    }
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    sentence = f"memory: {memory.peak / GIB:.2f} GiB expected on this rank ({listed}), {_words(free)} free on {device}"
    if memory.engine.host:
        sentence += f"; {memory.engine.host / GIB:.2f} GiB expected on its host, {_words(host_free)} free there"
    return sentence


def does_not_fit(memory: RankMemory, device: torch.device, free: int | None, host_free: int | None) -> str | None:
    """What to change if the expected memory is more than there is; None if it is not, or if nobody knows."""
    for needed, there, place, advice in (
        (memory.peak, free, str(device), "--recompute-granularity, a higher --zero-stage, more ranks or"),
        (memory.engine.host, host_free, "the host", "fewer ranks on a host, or no"),
    ):
        if there is not None and needed > there:
            remedy = f"{advice} {'--offload-optimizer cpu' if place != 'the host' else '--offload-optimizer'}"
            return (
                f"this run is expected to need {needed / GIB:.2f} GiB on {place}, where {there / GIB:.2f} GiB are free "
                f"for a rank; it may end out of memory; change {remedy}"
            )
    return None


def _words(size: int | None) -> str:
    return "an unknown number of GiB" if size is None else f"{size / GIB:.2f} GiB"
