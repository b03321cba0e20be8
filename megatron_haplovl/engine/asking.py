"""One micro-batch through the model as it is in training, for something else than its losses.

The same layers, hooks and messages as in training, in every layout. Nothing is learned, and nothing that training reads
is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.model.haplovl import run_layers
from megatron_haplovl.parallel.groups import Group
from megatron_haplovl.parallel.sharded_model import ShardedModel

Found = TypeVar("Found")

# A message of these says what the next one holds.
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def ask(engine: Any, model: ShardedModel, batch: Batch, read: Callable[..., Found]) -> Found | None:
    """Call `read` in the place of the stage's loss. Called by every rank, all of a pipeline with the same batch.

    Args:
        engine: the DeepSpeed engine.
        model: this rank's part of the model.
        batch: the micro-batch, on the device. All sizes are free, but ranks that share sequences must be able to.
        read: gets what the loss of the stage gets: in stage 2 hidden states and labels of the positions with a label,
            and this rank's words of the output head.

    Returns:
        What `read` has found; None on every stage of a pipeline but the last.
    """
    engine.eval()
    found = engine(batch, read) if model.stages is None else _through_stages(engine, model, batch, read)
    engine.train()
    return found


def _through_stages(engine: Any, model: ShardedModel, batch: Batch, read: Callable[..., Found]) -> Found | None:
    from deepspeed.runtime.torch_autocast import autocast_if_enabled

    assert model.stages is not None
    module, pipeline = model.module, model.groups.pipeline
    names = model.stages.of(pipeline.rank)
    layers = module.layers()
    with autocast_if_enabled(engine):
        inputs = module.attention_inputs(batch.kv_start_BS, batch.kv_end_BS, batch.position_ids_BS)
        x_BSD = module.embedding(batch) if pipeline.rank == 0 else _receive(pipeline, batch.tokens_BS.device)
        inner = [layers[name] for name in names if name not in ("embedding", module.HEAD)]
        x_BSD = run_layers(inner, x_BSD, inputs)
        if pipeline.rank == pipeline.size - 1:
            found: Found = module.losses(x_BSD, batch, read)
            return found
    _send(x_BSD, pipeline)
    return None


def _send(x_BSD: torch.Tensor, pipeline: Group) -> None:
    """Pass a hidden state to the next stage, its shape and format first."""
    following = pipeline.ranks[pipeline.rank + 1]
    header = torch.tensor([*x_BSD.shape, _FORMATS.index(x_BSD.dtype)], device=x_BSD.device)
    dist.send(header, following, group=pipeline.process_group)
    dist.send(x_BSD.contiguous(), following, group=pipeline.process_group)


def _receive(pipeline: Group, device: torch.device) -> torch.Tensor:
    before = pipeline.ranks[pipeline.rank - 1]
    header = torch.empty(4, dtype=torch.int64, device=device)
    dist.recv(header, before, group=pipeline.process_group)
    *shape, number_format = header.tolist()
    x_BSD = torch.empty(shape, dtype=_FORMATS[number_format], device=device)
    dist.recv(x_BSD, before, group=pipeline.process_group)
    return x_BSD
