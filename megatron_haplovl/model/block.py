"""A transformer block, and the two kinds of it that the model is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_haplovl.config.schema import PostDecoderConfig, PreDecoderConfig, RopeScalingConfig
from megatron_haplovl.model.attention import SelfAttention
from megatron_haplovl.model.attention_inputs import AttentionInputs
from megatron_haplovl.model.mlp import GatedMLP, PlainMLP, SwiGLU
from megatron_haplovl.model.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)).

    `recompute` says what backward computes again and forward does not keep: "none", "selective" (the MLP half, whose
    wide tensors are most of what a block keeps; fused attention keeps little more than its inputs) or "full".
    """

    def __init__(self, attention_norm: nn.Module, attention: SelfAttention, mlp_norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.recompute = "none"

    def forward(self, x_BSD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.recompute == "full":
            return _checkpoint(self._both_halves, x_BSD, inputs)
        return self._both_halves(x_BSD, inputs)

    def _both_halves(self, x_BSD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), inputs)
        if self.recompute == "selective":
            return x_BSD + _checkpoint(self._mlp_half, x_BSD)
        return x_BSD + self._mlp_half(x_BSD)

    def _mlp_half(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.mlp_norm(x_BSD))


def _checkpoint(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Keep the arguments only. Nothing in a block is random, so no random state has to be kept either."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def pre_decoder_block(config: PreDecoderConfig) -> Block:
    """A vision transformer's block plus RoPE (paper Sec. 3.1, "Pre-decoder"); with `gated_mlp`, as released."""
    mlp = GatedMLP if config.gated_mlp else PlainMLP
    return Block(
        nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon),
        SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_attention_heads,
            config.rope_theta,
            RopeScalingConfig(),
            qkv_bias=True,
            output_bias=True,
        ),
        nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon),
        mlp(config.hidden_size, config.ffn_hidden_size, config.activation),
    )


def post_decoder_block(config: PostDecoderConfig) -> Block:
    """A Llama block (paper Sec. 3.1, "Post-decoder"); with `qkv_bias`, a Qwen2.5 block.

    With `linear_bias` every projection has a bias, as in released checkpoints.
    """
    return Block(
        RMSNorm(config.hidden_size, eps=config.norm_epsilon),
        SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rope_theta,
            config.rope_scaling,
            qkv_bias=config.qkv_bias,
            output_bias=config.linear_bias,
        ),
        RMSNorm(config.hidden_size, eps=config.norm_epsilon),
        SwiGLU(config.hidden_size, config.ffn_hidden_size, bias=config.linear_bias),
    )
