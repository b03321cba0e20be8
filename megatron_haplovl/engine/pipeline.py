"""How a pipeline stage passes a micro-batch on.

DeepSpeed has the schedule, the messages and the engine. It sees a stage as one layer: a module that turns the tensors
of the stage before into those for the next. The hidden state, the mask's two vectors and the positions travel between
stages. Whole batches are read on the first stage, which embeds them, and on the last, which has the loss.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.model.haplovl import LayeredModel, run_layers
from megatron_haplovl.parallel.groups import ParallelGroups


class MicroBatchSlot:
    """The micro-batch that DeepSpeed has loaded on this rank and that comes next."""

    def __init__(self) -> None:
        self._batch: Batch | None = None

    def put(self, batch: Batch) -> None:
        """Called when DeepSpeed loads a micro-batch."""
        assert self._batch is None
        self._batch = batch

    def take(self) -> Batch:
        """Called by the forward pass that follows."""
        batch, self._batch = self._batch, None
        assert batch is not None
        return batch


class PipelineStage(nn.Module):
    """What DeepSpeed's pipeline engine runs on this rank.

    Args:
        model: the model, with the layers of this stage only.
        layers: names of these layers.
        slot: where the first and the last stage find the whole micro-batch.
        loss: the end of the last stage: (the head's input, micro-batch) -> loss.
        placeholders: parameters for the optimizer groups that have none on this stage.
    """

    def __init__(
        self,
        model: LayeredModel,
        layers: Sequence[str],
        slot: MicroBatchSlot,
        loss: Callable[[torch.Tensor, Batch], torch.Tensor],
        placeholders: nn.ParameterList,
    ) -> None:
        super().__init__()
        self.model, self.slot, self.loss = model, slot, loss
        self.placeholders = placeholders
        self.is_first, self.is_last = layers[0] == "embedding", layers[-1] == model.HEAD
        self.inner = [name for name in layers if name not in ("embedding", model.HEAD)]

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """One micro-batch.

        Args:
            tensors: hidden state [B, S, D] (not on the first stage), `kv_start_BS`, `kv_end_BS`, `position_ids_BS`.

        Returns:
            The same for the next stage; on the last stage the loss.
        """
        *before, kv_start_BS, kv_end_BS, position_ids_BS = tensors
        if self.is_first or self.is_last:
            batch = self.slot.take()
            mask_vectors = (batch.kv_start_BS, batch.kv_end_BS)
        else:
            # Attention plans its work on the host, which waits for the device here.
            mask_vectors = (kv_start_BS.cpu(), kv_end_BS.cpu())
        inputs = self.model.attention_inputs(*mask_vectors, position_ids_BS)
        x_BSD = self.model.embedding(batch.to(position_ids_BS.device)) if self.is_first else before[0]
        layers = self.model.layers()
        x_BSD = run_layers((layers[name] for name in self.inner), x_BSD, inputs)
        if self.is_last:
            return self.loss(x_BSD, batch)
        # A message cannot be made of a view of part of a sequence.
        return (x_BSD.contiguous(), kv_start_BS, kv_end_BS, position_ids_BS)


def pipeline_module(stage: PipelineStage, groups: ParallelGroups) -> Any:
    """DeepSpeed's description of a pipeline: one layer per stage. A rank builds the one of its own stage.

    Args:
        stage: this rank's stage.
        groups: every group of this rank; DeepSpeed must arrange the ranks in the same way.
    """
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(
        num_pp=groups.pipeline.size, num_mp=groups.tensor.size, num_dp=groups.replicas.size
    )
    layers = [stage] * groups.pipeline.size
    # DeepSpeed prints the place of every single rank.
    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineModule(layers, topology=topology, partition_method="uniform")


def separate_buffers(engine: Any, device: torch.device) -> None:
    """Let a pipeline engine receive gradients in buffers of their own.

    DeepSpeed would receive them in the buffer of activations, even if their number formats differ.
    """
    engine._allocate_or_extend_buffers = lambda _index, shape, dtype: torch.zeros(shape, dtype=dtype, device=device)
