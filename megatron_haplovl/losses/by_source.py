"""Losses by the source of each token: for reports only, nothing is trained on them.

Beside the sums that are trained, a loss function returns one sum for each source under the name of :func:`by_source`.
Shapes, beyond the legend in `data/batch.py`: N sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def by_source(term: str) -> str:
    """Key of a term's sums for each source, beside the key of the term itself."""
    return f"{term} by source"


@dataclass(frozen=True)
class TokenSources:
    """Which source each of some tokens is from."""

    source_M: torch.Tensor
    """Number of each token's source."""
    number: int
    """Sources that there are."""

    def empty(self) -> torch.Tensor:
        """fp32 `[M]`, for the losses of the tokens."""
        return torch.empty(len(self.source_M), dtype=torch.float32, device=self.source_M.device)

    def sums(self, losses_M: torch.Tensor) -> torch.Tensor:
        """fp32 `[N]`, the sum of the losses over each source's tokens.

        Always the same additions in the same order, which atomic ones would not be on a GPU.
        """
        numbers_N = torch.arange(self.number, dtype=self.source_M.dtype, device=self.source_M.device)
        is_of_MN = self.source_M.unsqueeze(1) == numbers_N
        return torch.where(is_of_MN, losses_M.detach().float().unsqueeze(1), 0.0).sum(dim=0)
