"""Rotary position embedding, half-split ("rotate half") convention, as in Llama and in the released checkpoints."""

from __future__ import annotations

import torch


def rope_table(
    position_ids_BS: torch.Tensor, head_width: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotation angles.

    The angles are computed in fp32 whatever the training dtype: bf16 cannot hold positions above 256.

    Args:
        position_ids_BS: int64 positions.
        head_width: width K of one head, even.
        theta: base of the geometric sequence of frequencies.
        dtype: dtype of the returned tables.

    Returns:
        (cos, sin), each [B, S, 1, K].
    """
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device=position_ids_BS.device) / head_width
    angle_BSK = position_ids_BS.unsqueeze(-1).float() * theta**-exponent
    angle_BS1K = torch.cat((angle_BSK, angle_BSK), dim=-1).unsqueeze(2)
    return angle_BS1K.cos().to(dtype), angle_BS1K.sin().to(dtype)
