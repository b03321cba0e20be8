"""Where in the model numbers stop being finite: in a weight, or in the output of a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class OutputTrace:
    """Modules in the order in which they finished, with whether their outputs were finite."""

    flags: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    def first(self) -> tuple[int, str] | None:
        """Place in the order and name of the first module whose output was not finite."""
        for order, (name, finite) in enumerate(self.flags):
            if not finite:
                return order, name
        return None


@contextlib.contextmanager
def traced_outputs(model: nn.Module) -> Iterator[OutputTrace]:
    """Look at every module's output while the model runs."""
    trace = OutputTrace()

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            finite = [value.detach().isfinite().all() for value in _tensors(output) if value.is_floating_point()]
            if finite:
                trace.flags.append((name, torch.stack(finite).all()))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def first_weight_not_finite(model: nn.Module) -> str | None:
    """Name of the first parameter of which this rank holds something that is not finite."""
    for name, parameter in model.named_parameters():
        # Of ZeRO 3's parameters this rank's part: what is whole beside it was gathered from all ranks.
        held = getattr(parameter, "ds_tensor", parameter)
        if not held.detach().isfinite().all():
            return name
    return None
