"""The feed-forward networks: CLIP's two-layer MLP, its gated form in released checkpoints, and Llama's SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_haplovl.kernels.elementwise import quick_gelu, silu_product


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}


class PlainMLP(nn.Module):
    """down(activation(up(x))), with biases: the pre-decoder's MLP (paper Sec. 3.1, "Pre-decoder")."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down_proj(self.activation(self.up_proj(x_BSD)))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), with biases: the pre-decoder's MLP in released checkpoints."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down_proj(self.activation(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the post-decoder's MLP, which has no biases in the inherited language models."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=bias)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=bias)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down_proj(silu_product(self.gate_proj(x_BSD), self.up_proj(x_BSD)))
