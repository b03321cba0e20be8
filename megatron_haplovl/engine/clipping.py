"""Gradient norm and clipping where DeepSpeed leaves gradients in the parameters: without ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import split_dim


class GradientClipping:
    """Clips by the norm over all ranks when the optimizer is about to step; registered as its step pre-hook.

    DeepSpeed's own does not report the norm, and in a pipeline leaves out what is whole on every tensor-parallel rank
    of all stages but the first.

    Args:
        model: its gradients are complete sums over the replicas by then.
        max_norm: 0 turns clipping off; the norm is still taken.
    """

    def __init__(self, model: ShardedModel, max_norm: float) -> None:
        self._model = model
        self.max_norm = max_norm
        self.norm = torch.zeros(())
        """Of the last step, before clipping."""

    def __call__(self, _optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        split: list[torch.Tensor] = []
        whole: list[torch.Tensor] = []
        parameters = dict(self._model.module.named_parameters())
        device = next(iter(parameters.values())).device
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                (whole if split_dim(name) is None else split).append(parameter.grad)
        groups = self._model.groups
        # Slices are different on every tensor-parallel rank, what is whole is the same.
        square = groups.pipeline.sum(groups.tensor.sum(_square_norm(split, device)) + _square_norm(whole, device))
        self.norm = square.sqrt()
        if self.max_norm > 0.0:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.max_norm, self.norm)


def _square_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    # The norm of none at all would lie on the CPU.
    return torch.nn.utils.get_total_norm(gradients).float().square().to(device)
