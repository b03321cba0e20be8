"""The layers of the released model. Depends on torch and transformers only.

Every block is gated and biased in both decoders.

Shape legend: B batch, S new tokens, K keys (cached and new tokens), D width of a decoder, H heads, E width of a head,
T tiles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from .configuration_haplo import HaploDecoderConfig, rope_type


def mixed_mask(
    attention_start_ids_BK: torch.Tensor, attention_mask_BK: torch.Tensor, query_length: int
) -> torch.Tensor:
    """Which keys the last `query_length` tokens see.

    Key j is visible to query i iff `attention_start_ids[j] <= i`, so text is causal and the tokens of one image see
    each other both ways. Padding is invisible; a padding query sees itself, so that its softmax is defined.

    Args:
        attention_start_ids_BK: [B, K] int64.
        attention_mask_BK: [B, K] bool, False at padding.
        query_length: S.

    Returns:
        [B, 1, S, K] bool, True where visible.
    """
    keys = attention_start_ids_BK.shape[1]
    index_K = torch.arange(keys, device=attention_start_ids_BK.device)
    index_S1 = index_K[keys - query_length :, None]
    visible_BSK = (attention_start_ids_BK[:, None, :] <= index_S1) & attention_mask_BK[:, None, :]
    return (visible_BSK | (index_K == index_S1))[:, None]


def rotary_table(
    position_ids_BS: torch.Tensor, config: HaploDecoderConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, 1, S, E] of a decoder, from angles in fp32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids_BS.device) / config.head_dim
    frequency = scale_frequencies(config.rope_theta**-exponent, config.rope_scaling)
    angle_BSE = (position_ids_BS[..., None].float() * frequency).repeat(1, 1, 2)[:, None]
    return angle_BSE.cos().to(dtype), angle_BSE.sin().to(dtype)


def scale_frequencies(frequency: torch.Tensor, scaling: dict[str, Any] | None) -> torch.Tensor:
    """Rotary frequencies, stretched for long contexts. "linear" divides all of them by the factor. "llama3" divides
    those that turn seldom over the original context, keeps those that turn often, and blends those between."""
    if rope_type(scaling) == "default":
        return frequency
    assert scaling is not None
    divided = frequency / scaling["factor"]
    if rope_type(scaling) == "linear":
        return divided
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * divided


def _rotate(x_BHSE: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * rotary[0] + torch.cat((-second, first), dim=-1) * rotary[1]


def _norm(config: HaploDecoderConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm_mode == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class HaploAttention(nn.Module):
    """Grouped-query attention with biases and rotary embedding."""

    def __init__(self, config: HaploDecoderConfig, layer_idx: int, implementation: str) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.implementation = implementation
        self.head_dim = config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_width)
        self.v_proj = nn.Linear(config.hidden_size, kv_width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x_BSD: torch.Tensor,
        mask_B1SK: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
    ) -> torch.Tensor:
        q, k, v = (
            projection(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if self.implementation == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SK)
        else:
            scores = (q @ k.transpose(-1, -2)) * self.head_dim**-0.5
            scores = scores.masked_fill(~mask_B1SK, torch.finfo(scores.dtype).min)
            out = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2))


class HaploMLP(nn.Module):
    """down(act(gate(x)) * up(x)), with biases."""

    def __init__(self, config: HaploDecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class HaploDecoderLayer(nn.Module):
    """Pre-norm residual block of either decoder."""

    def __init__(self, config: HaploDecoderConfig, layer_idx: int, implementation: str) -> None:
        super().__init__()
        self.self_attn = HaploAttention(config, layer_idx, implementation)
        self.mlp = HaploMLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(
        self,
        x_BSD: torch.Tensor,
        mask_B1SK: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
    ) -> torch.Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), mask_B1SK, rotary, cache)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class HaploPatchEmbed(nn.Module):
    """One vector per window of pixels."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[T, 3, size, size] -> [T, cells, D]."""
        return self.proj(pixel_values).flatten(2).transpose(1, 2)
