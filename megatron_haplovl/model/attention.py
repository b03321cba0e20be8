"""Self-attention of both decoders."""

from __future__ import annotations

import torch
from torch import nn

from megatron_haplovl.config.schema import RopeScalingConfig
from megatron_haplovl.kernels.elementwise import rotate
from megatron_haplovl.model.attention_inputs import AttentionInputs


class SelfAttention(nn.Module):
    """Multi-head (or grouped-query) attention with RoPE under the mixed mask.

    The number of heads is read from the projected tensors, so a rank that holds a slice of the projections computes
    its slice of the heads with this same code.

    Args:
        hidden_size: width D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; G divides H.
        rope_theta: base of the rotary embedding.
        rope_scaling: how its frequencies are stretched for long contexts.
        qkv_bias: biases on q, k and v.
        output_bias: bias on the output projection.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        rope_theta: float,
        rope_scaling: RopeScalingConfig,
        *,
        qkv_bias: bool,
        output_bias: bool,
    ) -> None:
        super().__init__()
        self.head_width = hidden_size // num_heads
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_width, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_width, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_width, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * self.head_width, hidden_size, bias=output_bias)

    def forward(self, x_BSD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        q_BSHK, k_BSGK, v_BSGK = (
            projection(x_BSD).unflatten(-1, (-1, self.head_width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = inputs.rope(self.head_width, self.rope_theta, self.rope_scaling, q_BSHK.dtype)
        out_BSHK = inputs.attend(
            rotate(q_BSHK, cos, sin),
            rotate(k_BSGK, cos, sin),
            v_BSGK,
            inputs.mask,
            backend=inputs.attention_backend,
        )
        return self.o_proj(out_BSHK.flatten(2))
