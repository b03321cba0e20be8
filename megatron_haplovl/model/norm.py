"""The post-decoder's norm; the pre-decoder's is torch's LayerNorm as it is."""

from __future__ import annotations

import torch
from torch import nn

from megatron_haplovl.kernels.elementwise import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight.

    Args:
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return rms_norm(x_BSD, self.weight, self.eps)
