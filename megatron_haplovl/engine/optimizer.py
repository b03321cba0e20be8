"""The optimizer: AdamW in the implementation that is asked for."""

from __future__ import annotations

from typing import Any

import torch

from megatron_haplovl.config.schema import OptimizerConfig
from megatron_haplovl.kernels.capabilities import has_apex

ADAMW_NAMES = {
    "torch": "torch fused",
    "cpu_adam": "DeepSpeed's CPUAdam",
    "fused_adam": "DeepSpeed's FusedAdam",
    "apex": "apex FusedAdam",
}
"""What the log calls each implementation."""


def adamw_implementation(config: OptimizerConfig, device: torch.device, *, offloaded: bool) -> str:
    """What `--adamw-implementation` stands for on a device: torch, cpu_adam or fused_adam (DeepSpeed's), or apex.

    Args:
        config: says which implementation is asked for.
        device: what the model runs on.
        offloaded: the optimizer steps on the host, whatever the device is (--offload-optimizer cpu).
    """
    match config.adamw_implementation:
        case "auto":
            return "cpu_adam" if offloaded else "torch"
        case "deepspeed":
            return "cpu_adam" if offloaded or device.type == "cpu" else "fused_adam"
        case name:
            return name


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device, *, offloaded: bool = False
) -> torch.optim.Optimizer:
    """AdamW (paper Tables 8 and 9).

    Args:
        groups: see `training.recipe.parameter_groups`.
        config: learning rate, betas, epsilon, implementation.
        device: what the model runs on.
        offloaded: see :func:`adamw_implementation`.

    Raises:
        ValueError: the implementation is not installed, or does not run on this device.
    """
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    match adamw_implementation(config, device, offloaded=offloaded):
        case "torch":
            return torch.optim.AdamW(groups, fused=True, **settings)
        case "cpu_adam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        case "fused_adam":
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
