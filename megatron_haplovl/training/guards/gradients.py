"""Which gradient of this rank is not finite, before DeepSpeed adds it to those of other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class GradientTrace:
    """Whether each parameter's gradient was finite, once for each micro-batch."""

    flags: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def first(self) -> tuple[int, str] | None:
        """The first micro-batch (from 0) with a gradient that was not finite, and the name of its parameter.

        Of several parameters the last one in the model: backward comes to it first.
        """
        found = [
            (index, -place, name)
            for place, (name, flags) in enumerate(self.flags.items())
            for index, finite in enumerate(flags)
            if not finite
        ]
        return None if not found else (min(found)[0], min(found)[2])


@contextlib.contextmanager
def traced_gradients(model: nn.Module) -> Iterator[GradientTrace]:
    """Look at every gradient that backward computes for a trained parameter, on its way to the parameter."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trace = GradientTrace({name: [] for name, _ in trained})

    def look(name: str) -> Callable[[torch.Tensor], None]:
        return lambda gradient: trace.flags[name].append(gradient.detach().isfinite().all())

    handles = [parameter.register_hook(look(name)) for name, parameter in trained]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
