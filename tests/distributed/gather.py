"""Whole tensors from the ranks that hold parts of them, for comparisons."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist

from megatron_haplovl.parallel.collectives import all_gather
from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import split_dim


def full_weights(model: ShardedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, whole and on the CPU, one at a time. Called by every rank, which must read to the end."""
    tensor, pipeline = model.groups.tensor, model.groups.pipeline
    parameters = dict(model.module.named_parameters())
    any_parameter = next(iter(parameters.values()))
    for name, shape in model.shapes.items():
        owner = model.owner(name)
        if owner == pipeline.rank:
            # Outside ZeRO-3 a parameter is in one piece already and this gathers nothing.
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                dim = split_dim(name)
                mine = parameters[name].detach()
                whole = mine.clone() if dim is None or tensor.size == 1 else all_gather(mine, tensor, dim)
        else:
            whole = any_parameter.new_empty(shape)
        if pipeline.size > 1:
            dist.broadcast(whole, src=pipeline.ranks[owner], group=pipeline.process_group)
        yield name, whole.cpu()
