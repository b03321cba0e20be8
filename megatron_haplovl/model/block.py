"""A transformer block, and the two kinds of it that the model is made of."""

from __future__ import annotations

import torch
from torch import nn

from megatron_haplovl.config.schema import PostDecoderConfig, PreDecoderConfig
from megatron_haplovl.model.attention import SelfAttention
from megatron_haplovl.model.context import SequenceContext
from megatron_haplovl.model.mlp import PlainMLP, SwiGLU
from megatron_haplovl.model.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention_norm: nn.Module, attention: SelfAttention, mlp_norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, x_BSD: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), context)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


def pre_decoder_block(config: PreDecoderConfig) -> Block:
    """A vision transformer's block plus RoPE (paper Sec. 3.1, "Pre-decoder")."""
    return Block(
        nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon),
        SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_attention_heads,
            config.rope_theta,
            qkv_bias=True,
            output_bias=True,
        ),
        nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon),
        PlainMLP(config.hidden_size, config.ffn_hidden_size, config.activation),
    )


def post_decoder_block(config: PostDecoderConfig) -> Block:
    """A Llama block (paper Sec. 3.1, "Post-decoder"); with `qkv_bias`, a Qwen2.5 block."""
    return Block(
        RMSNorm(config.hidden_size, eps=config.norm_epsilon),
        SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rope_theta,
            qkv_bias=config.qkv_bias,
            output_bias=False,
        ),
        RMSNorm(config.hidden_size, eps=config.norm_epsilon),
        SwiGLU(config.hidden_size, config.ffn_hidden_size),
    )
