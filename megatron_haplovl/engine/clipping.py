"""Gradient norm and clipping where DeepSpeed leaves gradients in the parameters: without ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from megatron_haplovl.parallel.sharded_model import ShardedModel
from megatron_haplovl.parallel.tensor_parallel import split_dim


class GradientClipping:
    """Clips by the norm over all ranks when the optimizer is about to step; registered as its step pre-hook.

    DeepSpeed's own clipping does not report the norm. In a pipeline it also leaves some gradients out: on all stages
    but the first, those of parameters that every tensor-parallel rank holds whole.

    Args:
        model: its gradients must be complete sums over the replicas by then.
        max_norm: 0 turns clipping off; the norm is still taken.
    """

    def __init__(self, model: ShardedModel, max_norm: float) -> None:
        self._model = model
        self.max_norm = max_norm
        self.norm = torch.zeros(())
        """Norm of the last step's gradients, before clipping."""

    def __call__(self, _optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        split: list[torch.Tensor] = []
        whole: list[torch.Tensor] = []
        parameters = dict(self._model.module.named_parameters())
        device = next(iter(parameters.values())).device
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                (whole if split_dim(name) is None else split).append(parameter.grad)
        groups = self._model.groups
        # Slices differ between tensor-parallel ranks; a whole parameter's gradient is the same on all of them.
        square = groups.pipeline.sum(groups.tensor.sum(_square_norm(split, device)) + _square_norm(whole, device))
        self.norm = square.sqrt()
        if self.max_norm > 0.0:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.max_norm, self.norm)


def _square_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    # The norm of no gradients at all would lie on the CPU.
    return torch.nn.utils.get_total_norm(gradients).float().square().to(device)
