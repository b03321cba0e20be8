"""One rank's part of the model, and how it belongs to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megatron_haplovl.model.haplovl import LayeredModel
from megatron_haplovl.parallel.groups import ParallelGroups
from megatron_haplovl.parallel.pipeline import PipelineCut


@dataclass(frozen=True)
class ShardedModel:
    """The layers of this rank's stage, each parameter whole or sliced over the tensor-parallel ranks.

    Parameters have the names of the serial model.
    """

    module: LayeredModel
    shapes: dict[str, torch.Size]
    """Every parameter of the serial model with its shape there, in order."""
    groups: ParallelGroups = field(default_factory=ParallelGroups)
    stages: PipelineCut | None = None
    """None without a pipeline."""

    def owner(self, parameter: str) -> int:
        """The stage that writes a parameter to checkpoints."""
        return 0 if self.stages is None else self.stages.of_parameter(parameter)

    def own_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This stage's parameters, without those that are only copies (stage 1's word matrix beside the heads)."""
        for name, parameter in self.module.named_parameters():
            if self.owner(name) == self.groups.pipeline.rank:
                yield name, parameter
