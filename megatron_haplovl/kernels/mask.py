"""The mixed mask: text causal, the tokens of one image bidirectional, nothing across documents.

Paper Sec. 3.1, "Masking strategy". The keys that a query sees are one interval, so two int32 vectors carry the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class MixedMask:
    """Query i of a sequence sees exactly the keys `kv_start[i] <= j < kv_end[i]` of the same sequence.

    Built once per micro-batch and shared by all layers, so that what a backend derives from it is derived once.
    """

    kv_start_BS: torch.Tensor
    """int32, first visible key of each query."""
    kv_end_BS: torch.Tensor
    """int32, one past the last visible key of each query."""

    @cached_property
    def dense_BSS(self) -> torch.Tensor:
        """The same mask as a bool matrix (query, key), for backends that know no other form."""
        key_S = torch.arange(self.kv_start_BS.shape[1], device=self.kv_start_BS.device, dtype=torch.int32)
        return (key_S >= self.kv_start_BS.unsqueeze(-1)) & (key_S < self.kv_end_BS.unsqueeze(-1))

    @cached_property
    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that attend, over all sequences: the unit of attention FLOPs."""
        return int((self.kv_end_BS - self.kv_start_BS).sum(dtype=torch.int64))
