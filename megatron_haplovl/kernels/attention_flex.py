"""Mixed-mask attention by torch's FlexAttention, with a block mask made directly from the intervals.

`create_block_mask` would look at every (query, key) pair. Here a row of blocks needs four numbers: both ends of the
visible interval are non-decreasing, so rows [a, b) see, together, the keys [kv_start[a], kv_end[b - 1]), and each of
them sees all of [kv_start[b - 1], kv_end[a]). Blocks inside the second are full, others that touch the first partial.

Shape letters beside those of `data/batch.py`: T keys of a sequence, R rows of blocks, C columns of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from megatron_haplovl.kernels.mask import MixedMask

BLOCK_SIZE = 128
"""Rows and keys of one block of the mask; FlexAttention's default."""


def flex_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, mask: MixedMask, scale: float
) -> torch.Tensor:
    """Attention by FlexAttention; see `kernels.attention.attention`. Compiled on a GPU, torch's dense form on a CPU.

    Raises:
        ValueError: gradients are wanted on a CPU, where FlexAttention has no backward.
    """
    if q_BSHK.device.type == "cpu" and any(x.requires_grad for x in (q_BSHK, k_BTGK, v_BTGK)):
        raise ValueError("attention backend flex has no backward on a CPU; use cpu_segments or sdpa")
    block_mask = mask.derive(("flex", q_BSHK.device), lambda: build_block_mask(mask, q_BSHK.device))
    out_BHSK = _implementation(q_BSHK.device.type)(
        q_BSHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
    )
    return out_BHSK.transpose(1, 2)


def build_block_mask(mask: MixedMask, device: torch.device) -> flex.BlockMask:
    """The mask's blocks on a device, [B, 1, row blocks, key blocks], without waiting for the device."""
    start_BS, end_BS = mask.vectors(device)
    num_queries, num_keys = start_BS.shape[1], mask.num_keys
    first_R = torch.arange(0, num_queries, BLOCK_SIZE, device=device)
    last_R = (first_R + BLOCK_SIZE - 1).clamp(max=num_queries - 1)
    # In blocks: what any row of the block sees, rounded outwards, and what every row sees, rounded inwards.
    any_start_BR, any_end_BR = start_BS[:, first_R] // BLOCK_SIZE, _blocks(end_BS[:, last_R])
    full_start_BR = _blocks(start_BS[:, last_R])
    full_end_BR = torch.maximum(end_BS[:, first_R] // BLOCK_SIZE, full_start_BR)

    left_BR = full_start_BR - any_start_BR
    column_C = torch.arange(-(-num_keys // BLOCK_SIZE), dtype=torch.int32, device=device)
    partial_BRC = column_C + torch.where(
        column_C < left_BR.unsqueeze(-1), any_start_BR.unsqueeze(-1), (full_end_BR - left_BR).unsqueeze(-1)
    )
    full_BRC = column_C + full_start_BR.unsqueeze(-1)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (kv >= start_BS[b, q]) & (kv < end_BS[b, q])

    # Entries past the count of a row are not looked at, but have to be valid.
    return flex.BlockMask.from_kv_blocks(
        (left_BR + any_end_BR - full_end_BR).unsqueeze(1),
        partial_BRC.clamp(max=len(column_C) - 1).unsqueeze(1),
        (full_end_BR - full_start_BR).unsqueeze(1),
        full_BRC.clamp(max=len(column_C) - 1).unsqueeze(1),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=visible,
        seq_lengths=(num_queries, num_keys),
    )


def _blocks(tokens: torch.Tensor) -> torch.Tensor:
    """The number of blocks that hold so many tokens."""
    return (tokens + (BLOCK_SIZE - 1)) // BLOCK_SIZE


@cache
def _implementation(device_type: str) -> Callable[..., torch.Tensor]:
    """On a GPU the fused kernel, compiled for the first shape and, once another shape comes, for all of them."""
    dense: Any = flex.flex_attention
    return dense if device_type == "cpu" else torch.compile(dense)
