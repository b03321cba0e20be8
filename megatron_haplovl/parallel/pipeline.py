"""Pipeline parallelism: which layers a stage keeps, and how it passes a micro-batch on.

DeepSpeed has the schedule, the messages and the engine. To it a stage is one layer: a module that turns the tensors of
the stage before into those for the next. Between stages travel the hidden state, the mask's two vectors and the
positions; images, tokens and labels do not. They are read where they are used, on the first and on the last stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation, run_layers
from megatron_haplovl.parallel.groups import ParallelGroups

_OUTER = ("embedding", "lm_head", "distillation")
"""Layers that need more than the hidden state and the context."""


@dataclass(frozen=True)
class Stages:
    """Who holds what: the flat layer list, cut into contiguous stages."""

    layers: tuple[str, ...]
    """Names of all layers, in order."""
    first: tuple[int, ...]
    """Place in `layers` of each stage's first layer; see `parallel.partition`."""

    def of(self, stage: int) -> tuple[str, ...]:
        """Names of a stage's layers."""
        return self.layers[slice(*(*self.first, len(self.layers))[stage : stage + 2])]

    def of_parameter(self, name: str) -> int:
        """The stage that holds a parameter."""
        layer, number = name.split(".")[:2]
        place = self.layers.index(f"{layer}.{number}" if number.isdecimal() else layer)
        return sum(first <= place for first in self.first) - 1

    def __str__(self) -> str:
        stages = (self.of(stage) for stage in range(len(self.first)))
        return " | ".join(names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}" for names in stages)


def keep_stage(model: HaploVL | HaploVLForDistillation, layers: Sequence[str]) -> None:
    """Drop every layer of the model but these, on the meta device. What stays keeps its name.

    The heads of stage 1 read the frozen matrix of the embedding, so the last stage keeps a copy of it.
    """
    words = model.embedding.text
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleList):
            kept = {number: block for number, block in child.named_children() if f"{name}.{number}" in layers}
            setattr(model, name, nn.ModuleDict(kept))
        elif name not in layers:
            delattr(model, name)
    if "distillation" in layers and "embedding" not in layers:
        copy = nn.Module()
        copy.text = words
        model.embedding = copy  # type: ignore[assignment]


class PipelineStage(nn.Module):
    """What DeepSpeed's pipeline engine runs on this rank.

    Args:
        model: with the layers of this stage only.
        layers: their names.
        loss: what the last stage ends in: what the head reads -> loss.
        placeholders: of optimizer groups that have no parameter here.
    """

    def __init__(
        self,
        model: HaploVL | HaploVLForDistillation,
        layers: Sequence[str],
        loss: Callable[[torch.Tensor], torch.Tensor],
        placeholders: nn.ParameterList,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.placeholders = placeholders
        self.is_first = "embedding" in layers
        self.is_last = layers[-1] in _OUTER[1:]
        self.inner = [name for name in layers if name not in _OUTER]

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """One micro-batch.

        Args:
            tensors: on the first stage the fields of a `Batch` in order (see :func:`first_stage_tensors`), else what
                the stage before returned.

        Returns:
            Hidden state [B, S, D], `kv_start_BS`, `kv_end_BS`, `position_ids_BS`; on the last stage the loss.
        """
        if self.is_first:
            batch = Batch(*tensors)
            x_BSD = self.model.embedding(batch)
            vectors = (batch.kv_start_BS, batch.kv_end_BS, batch.position_ids_BS)
        else:
            x_BSD, *vectors = tensors  # type: ignore[assignment]
        kv_start_BS, kv_end_BS, position_ids_BS = vectors
        # Attention plans its work on the host.
        context = self.model.context(kv_start_BS.cpu(), kv_end_BS.cpu(), position_ids_BS)
        layers = self.model.layers()
        x_BSD = run_layers((layers[name] for name in self.inner), x_BSD, context)
        return self.loss(x_BSD) if self.is_last else (x_BSD, *vectors)


def first_stage_tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    """A batch as the tuple of tensors that DeepSpeed wants to be given."""
    return tuple(getattr(batch, field.name) for field in dataclasses.fields(batch))


def pipeline_module(stage: PipelineStage, groups: ParallelGroups) -> Any:
    """DeepSpeed's description of a pipeline: one layer per stage, of which it builds its own.

    Args:
        stage: this rank's stage.
        groups: the mesh; DeepSpeed's must be the same.
    """
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(
        num_pp=groups.pipeline.size, num_mp=groups.tensor.size, num_dp=groups.replicas.size
    )
    layers = [stage] * groups.pipeline.size
    # DeepSpeed prints where every single rank stands.
    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineModule(layers, topology=topology, partition_method="uniform")
