"""What this machine offers beyond the required packages. Every optional import is checked here and nowhere else."""

from __future__ import annotations

import importlib.util


def has_tensorboard() -> bool:
    """Whether `torch.utils.tensorboard` can write events."""
    return importlib.util.find_spec("tensorboard") is not None


def has_wandb() -> bool:
    """Whether Weights & Biases is installed."""
    return importlib.util.find_spec("wandb") is not None
