"""The optimizer: AdamW by whichever implementation is asked for."""

from __future__ import annotations

from typing import Any

import torch

from megatron_haplovl.config.schema import OptimizerConfig
from megatron_haplovl.kernels.capabilities import has_apex


def adamw_implementation(config: OptimizerConfig, device: torch.device) -> str:
    """What `--adamw-implementation` stands for on a device, for the log."""
    deepspeed = "DeepSpeed's CPUAdam" if device.type == "cpu" else "DeepSpeed's FusedAdam"
    names = {"auto": "torch fused", "torch": "torch fused", "deepspeed": deepspeed, "apex": "apex FusedAdam"}
    return names[config.adamw_implementation]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (paper Tables 8 and 9).

    Args:
        groups: see `training.recipe.parameter_groups`.
        config: learning rate, betas, epsilon, implementation.
        device: where the weights will lie.

    Raises:
        ValueError: an implementation that is not there, or not for this device.
    """
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    match config.adamw_implementation:
        case "auto" | "torch":
            return torch.optim.AdamW(groups, fused=True, **settings)
        case "deepspeed" if device.type == "cpu":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        case "deepspeed":
            from deepspeed.ops.adam import FusedAdam

            return FusedAdam(groups, adam_w_mode=True, **settings)
        case "apex":
            if not has_apex():
                raise ValueError("--adamw-implementation apex: NVIDIA apex with its CUDA extensions is not installed")
            if device.type == "cpu":
                raise ValueError("--adamw-implementation apex runs on a GPU, not on the CPU; use auto")
            from apex.optimizers import FusedAdam as ApexAdam

            return ApexAdam(groups, adam_w_mode=True, **settings)
        case name:
            raise ValueError(f"unknown --adamw-implementation {name!r}")
