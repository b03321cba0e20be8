"""Figures of weights and gradients over all ranks, each element counted once, in every layout."""

from __future__ import annotations

from typing import Any

import torch

from megatron_haplovl.checkpoint.pieces import WEIGHT
from megatron_haplovl.engine.engine_state import gradient_places, local_pieces, make_optimizer_state
from megatron_haplovl.parallel.sharded_model import ShardedModel


def parameters_norm(engine: Any, model: ShardedModel) -> float:
    """Norm of all weights, frozen ones included; of trained ones, the fp32 values. Called by every rank."""
    make_optimizer_state(engine, None)
    squares = [
        float(torch.linalg.vector_norm(local.values, dtype=torch.float32)) ** 2
        for local in local_pieces(engine, model)
        if local.is_written and local.piece.kind == WEIGHT
    ]
    total = torch.tensor(sum(squares), dtype=torch.float64)
    return float(model.groups.control.sum(total).sqrt())


class GradientZeros:
    """Counts the elements of the gradient that are zero when the optimizer is about to step; its step pre-hook.

    Args:
        engine: steps the optimizer.
        model: what is trained.
    """

    def __init__(self, engine: Any, model: ShardedModel) -> None:
        self._engine, self._model = engine, model
        self._found = 0
        self.wanted = False
        """Whether the next step is counted: it costs a pass over the gradients."""
        engine.basic_optimizer.register_step_pre_hook(self._before_step)

    def take(self) -> int:
        """The count of the last step, over all ranks. Called by every rank."""
        total = torch.tensor(self._found, dtype=torch.int64)
        self._found = 0
        return int(self._model.groups.control.sum(total))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # ZeRO steps group by group, and then only that group has a gradient.
        if not self.wanted:
            return
        keys = {id(key): key for group in optimizer.param_groups for key in group["params"] if key.grad is not None}
        for key, first, length in gradient_places(self._engine, self._model):
            if id(key) in keys:
                here = keys[id(key)].grad.view(-1).narrow(0, first, length)
                self._found += here.numel() - int(torch.count_nonzero(here))
