"""What every block needs to know about the sequence besides the hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_haplovl.config.schema import RopeScalingConfig
from megatron_haplovl.kernels.attention import attention
from megatron_haplovl.kernels.mask import MixedMask
from megatron_haplovl.model.rope import rope_table

Attend = Callable[..., torch.Tensor]
"""(q_BSHK, k_BSGK, v_BSGK, mask, backend=...) -> [B, S, H, K]; see `kernels.attention.attention`."""


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Mask and positions of one micro-batch; rotary tables are built once per decoder and shared by its blocks."""

    mask: MixedMask
    position_ids_BS: torch.Tensor
    attention_backend: str = "auto"
    attend: Attend = attention
    """What computes attention; context parallelism puts its exchange around it."""
    _rope: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    # The tables are kept from block to block; a compiled block could neither keep them nor see that they are kept.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rope(
        self, head_width: int, theta: float, scaling: RopeScalingConfig, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [B, S, 1, K], for heads of this width."""
        key = (head_width, theta, scaling, dtype)
        if key not in self._rope:
            self._rope[key] = rope_table(self.position_ids_BS, head_width, theta, scaling, dtype)
        return self._rope[key]
