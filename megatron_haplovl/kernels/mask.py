"""The mixed mask: text causal, the tokens of one image bidirectional, nothing across documents.

Paper Sec. 3.1, "Masking strategy". The keys that a query sees are one interval, so two int32 vectors carry the mask;
the queries that see a key are one interval, too, because both vectors are non-decreasing.

Shape letters beside those of `data/batch.py`: T keys of a sequence, C queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

_T = TypeVar("_T")


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one sequence whose keys follow one rule (see `kind`)."""

    sequence: int
    start: int
    """First row."""
    end: int
    """One past the last row."""
    key_start: int
    """First key that the first row sees."""
    key_end: int
    """One past the last key that the last row sees."""
    kind: str
    """image: every row sees all keys; text: bottom-right causal, so the last row sees all keys, the one before it one
    key less, and so on; alone: every row sees only itself, and nobody else sees it (padding)."""


@dataclass(frozen=True, eq=False)
class MixedMask:
    """Query i of a sequence sees exactly the keys `kv_start[i] <= j < kv_end[i]` of the same sequence.

    Built once per micro-batch from vectors on the host and shared by all layers. What a backend derives from it is
    derived once, at its first use, and kept.

    Args:
        kv_start_BS: int32, first visible key of each query; non-decreasing in a sequence.
        kv_end_BS: int32, one past the last visible key; non-decreasing in a sequence and above `kv_start_BS`.
        num_keys: keys of each sequence; default as many as queries. More than queries when a chunk of queries meets a
            cache of keys: the queries are then the last positions, and the vectors count positions of keys.
    """

    kv_start_BS: torch.Tensor
    kv_end_BS: torch.Tensor
    num_keys: int = -1
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.num_keys == -1:
            object.__setattr__(self, "num_keys", self.kv_start_BS.shape[1])

    def derive(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """What `build` returns, built at the first call with this key."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    @cached_property
    def host(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(kv_start, kv_end) as arrays [B, S] on the host. Waits for the device if the vectors lie there."""
        return self.kv_start_BS.cpu().numpy().astype(np.int64), self.kv_end_BS.cpu().numpy().astype(np.int64)

    @cached_property
    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that attend, over all sequences: the unit of attention FLOPs."""
        start_BS, end_BS = self.host
        return int((end_BS - start_BS).sum())

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All rows of all sequences, cut into segments, in order."""
        start_BS, end_BS = self.host
        return tuple(s for b in range(len(start_BS)) for s in _segments(start_BS[b], end_BS[b], b, self.num_keys))

    def vectors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(kv_start, kv_end), int32 [B, S], on a device."""

        def build() -> tuple[torch.Tensor, torch.Tensor]:
            return self.kv_start_BS.to(device, non_blocking=True), self.kv_end_BS.to(device, non_blocking=True)

        return self.derive(("vectors", device), build)

    def inverse(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(q_start, q_end), int32 [B, keys]: key j is seen by exactly the queries `q_start[j] <= i < q_end[j]`."""

        def build() -> tuple[torch.Tensor, torch.Tensor]:
            start_BS, end_BS = self.vectors(device)
            key_BT = (
                torch.arange(self.num_keys, dtype=torch.int32, device=device).expand(len(start_BS), -1).contiguous()
            )
            q_start_BT = torch.searchsorted(end_BS.contiguous(), key_BT, right=True, out_int32=True)
            return q_start_BT, torch.searchsorted(start_BS.contiguous(), key_BT, right=True, out_int32=True)

        return self.derive(("inverse", device), build)

    def dense(self, device: torch.device) -> torch.Tensor:
        """The same mask as a bool matrix [B, queries, keys], for backends that know no other form."""

        def build() -> torch.Tensor:
            start_BS, end_BS = self.vectors(device)
            key_T = torch.arange(self.num_keys, device=device, dtype=torch.int32)
            return (key_T >= start_BS.unsqueeze(-1)) & (key_T < end_BS.unsqueeze(-1))

        return self.derive(("dense", device), build)

    def rows(self, start: int, end: int) -> MixedMask:
        """The mask of queries `[start, end)` over the keys `[0, end)`: one chunk of a prefill, or one decoding step.

        Raises:
            ValueError: no such rows, or the chunk ends inside an image, whose earlier tokens would miss the later ones.
        """
        length = self.kv_start_BS.shape[1]
        assert self.num_keys == length, "a chunk of a chunk"
        if not 0 <= start < end <= length:
            raise ValueError(f"rows {start} to {end} are not a chunk of {length} queries")
        chunk_start_BC, chunk_end_BC = self.kv_start_BS[:, start:end], self.kv_end_BS[:, start:end]
        farthest = int(chunk_end_BC.max())
        if farthest > end:
            raise ValueError(f"a chunk of queries ends at {end}, inside an image that ends at {farthest}")
        return MixedMask(chunk_start_BC, chunk_end_BC, num_keys=end)


def mixed_mask(kv_start_BS: torch.Tensor, kv_end_BS: torch.Tensor, image_attention: str) -> MixedMask:
    """The mask of a batch (its fields of these names); `image_attention` is `bidirectional` (the paper) or `causal`."""
    mask = MixedMask(kv_start_BS, kv_end_BS)
    return causal(mask) if image_attention == "causal" else mask


def causal(mask: MixedMask) -> MixedMask:
    """The mask in which images are as causal as text (the released package's fallback, for parity work)."""
    first = mask.num_keys - mask.kv_end_BS.shape[1]
    end_S = torch.arange(first + 1, mask.num_keys + 1, dtype=torch.int32, device=mask.kv_end_BS.device)
    return MixedMask(mask.kv_start_BS, end_S.expand_as(mask.kv_end_BS), mask.num_keys)


def _segments(
    start_S: npt.NDArray[np.int64], end_S: npt.NDArray[np.int64], sequence: int, num_keys: int
) -> list[Segment]:
    """The segments of one sequence."""
    rows = len(start_S)
    # Rows that are the last of `num_keys` positions: row r stands at position first + r.
    position_S = np.arange(num_keys - rows, num_keys)
    next_start_S = np.append(start_S[1:], num_keys)
    alone_S = (start_S == position_S) & (end_S == position_S + 1) & (next_start_S == position_S + 1)
    same_end_S = np.append(False, (np.diff(end_S) == 0) & (np.diff(start_S) == 0))
    image_S = same_end_S | np.append(same_end_S[1:], False)
    kind_S = np.where(alone_S, 0, np.where(image_S, 1, 2))
    new_document_S = np.append(True, np.diff(start_S) != 0)
    new_kind_S = np.append(True, np.diff(kind_S) != 0)
    new_image_S = image_S & ~same_end_S
    jump_S = (kind_S == 2) & np.append(True, np.diff(end_S) != 1)
    first_S = new_kind_S | new_image_S | jump_S | (new_document_S & (kind_S != 0))
    bounds = [*np.flatnonzero(first_S).tolist(), rows]
    names = ("alone", "image", "text")
    return [
        Segment(sequence, a, b, int(start_S[a]), int(end_S[b - 1]), names[kind_S[a]])
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
