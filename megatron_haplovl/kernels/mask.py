"""The mixed mask: text causal, the tokens of one image bidirectional, nothing across documents.

Paper Sec. 3.1, "Masking strategy". The keys that a query sees are one interval, so two int32 vectors carry the mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from megatron_haplovl.kernels.attention_plan import Call, plan_calls


@dataclass(frozen=True, eq=False)
class MixedMask:
    """Query i of a sequence sees exactly the keys `kv_start[i] <= j < kv_end[i]` of the same sequence.

    Both vectors are non-decreasing. Built once per micro-batch and shared by all layers, so that what a backend derives
    from it is derived once.
    """

    kv_start_BS: torch.Tensor
    """int32, first visible key of each query."""
    kv_end_BS: torch.Tensor
    """int32, one past the last visible key of each query."""
    _calls: dict[float, tuple[Call, ...]] = field(default_factory=dict, repr=False)
    _additive: dict[tuple[Call, torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def dense_BSS(self) -> torch.Tensor:
        """The same mask as a bool matrix (query, key), for backends that know no other form."""
        key_S = torch.arange(self.kv_start_BS.shape[1], device=self.kv_start_BS.device, dtype=torch.int32)
        return (key_S >= self.kv_start_BS.unsqueeze(-1)) & (key_S < self.kv_end_BS.unsqueeze(-1))

    @cached_property
    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that attend, over all sequences: the unit of attention FLOPs."""
        return int((self.kv_end_BS - self.kv_start_BS).sum(dtype=torch.int64))

    def calls(self, pairs_per_call: float) -> tuple[Call, ...]:
        """Rectangles that cover every row of every sequence once; see `kernels.attention_plan`."""
        if pairs_per_call not in self._calls:
            start_BS = self.kv_start_BS.cpu().numpy().astype("int64")
            end_BS = self.kv_end_BS.cpu().numpy().astype("int64")
            self._calls[pairs_per_call] = tuple(
                call for b in range(len(start_BS)) for call in plan_calls(start_BS[b], end_BS[b], b, pairs_per_call)
            )
        return self._calls[pairs_per_call]

    def additive(self, call: Call, dtype: torch.dtype) -> torch.Tensor | None:
        """Mask `[1, 1, rows, keys]` of a call of kind "masked": 0 where visible, -inf elsewhere; else None."""
        if call.kind != "masked":
            return None
        if (call, dtype) not in self._additive:
            rows = slice(call.row_start, call.row_end)
            key = torch.arange(call.key_start, call.key_end, dtype=torch.int32)
            start, end = self.kv_start_BS[call.sequence, rows], self.kv_end_BS[call.sequence, rows]
            hidden = (key < start.unsqueeze(1)) | (key >= end.unsqueeze(1))
            additive = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._additive[call, dtype] = additive[None, None]
        return self._additive[call, dtype]
