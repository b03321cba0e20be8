"""Rotary position embedding, half-split ("rotate half") convention, as in Llama and in the released checkpoints."""

from __future__ import annotations

import math

import torch

from megatron_haplovl.config.schema import RopeScalingConfig


def rope_table(
    position_ids_BS: torch.Tensor, head_width: int, theta: float, scaling: RopeScalingConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles.

    The angles are computed in fp32 whatever the training dtype: bf16 cannot hold positions above 256.

    Args:
        position_ids_BS: int64 positions.
        head_width: width K of one head, even.
        theta: base of the geometric sequence of frequencies.
        scaling: how the frequencies are stretched for long contexts.
        dtype: dtype of the returned tables.

    Returns:
        (cos, sin), each [B, S, 1, K].
    """
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device=position_ids_BS.device) / head_width
    angle_BSK = position_ids_BS.unsqueeze(-1).float() * scale_frequencies(theta**-exponent, scaling)
    angle_BS1K = torch.cat((angle_BSK, angle_BSK), dim=-1).unsqueeze(2)
    return angle_BS1K.cos().to(dtype), angle_BS1K.sin().to(dtype)


def scale_frequencies(frequency_K: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """The frequencies [K / 2], in radians per position, stretched for long contexts.

    "llama3" is Llama 3.1's: a frequency that makes fewer than `low_freq_factor` turns over the original positions is
    divided by the factor, one that makes more than `high_freq_factor` is kept, and between them the two are blended
    linearly in the number of turns.
    """
    if scaling.type == "none":
        return frequency_K
    divided_K = frequency_K / scaling.factor
    if scaling.type == "linear":
        return divided_K
    turns_K = scaling.original_positions * frequency_K / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_K = ((turns_K - low) / (high - low)).clamp(0, 1)
    return kept_K * frequency_K + (1 - kept_K) * divided_K
