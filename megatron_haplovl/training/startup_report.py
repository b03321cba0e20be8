"""What the first lines of a run's log say: ranks, device, number format, kernels, batches, parameters."""

from __future__ import annotations

from collections import Counter

import torch

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.schema import Config, ParallelConfig, RecipeConfig
from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.engine.optimizer import ADAMW_NAMES, adamw_implementation
from megatron_haplovl.kernels.attention import describe_backend, resolve_backend
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.training.recipe import is_trained, part_of


def describe_run(config: Config, groups: ParallelGroups, device: torch.device) -> str:
    """The layout and everything that was chosen for this machine, in one line.

    Raises:
        ValueError: an attention backend that does not run here.
    """
    adamw = adamw_implementation(config.optimizer, device, offloaded=config.parallel.offload_optimizer == "cpu")
    return (
        f"ranks: {groups.world.size}{_layout(groups)} | device: {device} | "
        f"precision: {'bf16' if config.precision.bf16 else 'fp32'} | ZeRO stage: {config.parallel.zero_stage} | "
        f"offloaded: {_offloaded(config.parallel)} | attention backend: {_attention_backends(config, device)} | "
        f"AdamW: {ADAMW_NAMES[adamw]} | recomputed: {_RECOMPUTED[config.parallel.recompute_granularity]} | "
        f"blocks: {'compiled' if config.precision.compile else 'not compiled'}"
    )


_RECOMPUTED = {"none": "nothing", "selective": "the MLP of every block", "full": "every block"}


def _layout(groups: ParallelGroups) -> str:
    """The layout in words, if the ranks are not all data-parallel."""
    if groups.data.size == groups.world.size:
        return ""
    return (
        f" (pipeline {groups.pipeline.size} x data {groups.data.size} x context {groups.context.size} x tensor "
        f"{groups.tensor.size})"
    )


def _offloaded(parallel: ParallelConfig) -> str:
    """What lies in the host's memory instead of the device's, in words."""
    moved = {"optimizer": parallel.offload_optimizer, "parameters": parallel.offload_param}
    return " and ".join(name for name, place in moved.items() if place == "cpu") or "none"


def _attention_backends(config: Config, device: torch.device) -> str:
    """What each decoder's attention runs on."""
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    names = []
    for part in (config.model.pre, config.model.post):
        width = part.hidden_size // part.num_attention_heads
        name = resolve_backend(config.precision.attention_backend, device, dtype, width)
        names.append(describe_backend(name, device, dtype, width))
    return names[0] if names[0] == names[1] else f"{names[0]} (pre-decoder), {names[1]} (post-decoder)"


def describe_parameters(model: ShardedModel, recipe: RecipeConfig) -> str:
    """How many parameters there are, over all ranks, and how many of them train, part by part."""
    sizes = {name: shape.numel() for name, shape in model.shapes.items()}
    trained = Counter[str]()
    for name, size in sizes.items():
        trained[part_of(name)] += size if is_trained(name, recipe) else 0
    parts = ", ".join(f"{part} {size:,}" if size else f"{part} frozen" for part, size in trained.items())
    return f"parameters: {sum(sizes.values()):,}, of which {trained.total():,} are trained: {parts}"


def _from_to(first: int, last: int) -> str:
    return str(last) if first == last else f"{first} to {last}"


def describe_batches(config: Config, data: BatchLoader, groups: ParallelGroups) -> str:
    """How a step's batch is put together, in one line."""
    schedule = config.schedule
    unit = "samples" if schedule.batch_unit == "samples" else "sequences"
    sizes, numbers = BatchSchedule.of(schedule).sizes, (data.fewest_micro_batches, data.most_micro_batches)
    return (
        f"a step: {_from_to(sizes[0], sizes[-1])} {unit} of {config.data.seq_length} tokens at most = "
        f"{groups.data.size} data-parallel ranks x {_from_to(*numbers)} micro-batches x "
        f"{schedule.micro_batch_size}; {schedule.train_iters} steps"
    )
