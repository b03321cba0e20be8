"""Pipeline parallelism: which layers a stage keeps. `engine.pipeline` says how a stage runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from megatron_haplovl.model.haplovl import LayeredModel


@dataclass(frozen=True)
class PipelineCut:
    """Who holds what: the flat layer list, cut into contiguous stages."""

    layers: tuple[str, ...]
    """Names of all layers, in order."""
    first: tuple[int, ...]
    """Place in `layers` of each stage's first layer; see `planning.partition`."""

    def of(self, stage: int) -> tuple[str, ...]:
        """Names of a stage's layers."""
        end = self.first[stage + 1] if stage + 1 < len(self.first) else len(self.layers)
        return self.layers[self.first[stage] : end]

    def of_parameter(self, name: str) -> int:
        """The stage that holds a parameter."""
        layer, number = name.split(".")[:2]
        place = self.layers.index(f"{layer}.{number}" if number.isdecimal() else layer)
        return sum(first <= place for first in self.first) - 1

    @property
    def partition(self) -> str:
        """The cut as `--pipeline-partition` takes it."""
        return ",".join(self.layers[first] for first in self.first[1:])


def keep_stage(model: LayeredModel, layers: Sequence[str]) -> None:
    """Drop all layers of the model but these, on the meta device. Their parameters keep their names.

    The heads of stage 1 read the frozen matrix of the embedding, so the last stage keeps a copy of it, in an
    `embedding` that is no layer of that stage.
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
