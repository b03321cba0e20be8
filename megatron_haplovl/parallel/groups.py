"""Process groups, built once and passed on explicitly; there is no global registry to ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class DataParallelGroup:
    """The ranks that hold different sequences of the same step."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    """None in a process that was started without a launcher."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place; the same tensor is returned."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank of the group."""
        if self.size > 1:
            dist.barrier(group=self.group)


def world_group() -> DataParallelGroup:
    """Every rank is a data-parallel rank."""
    if not dist.is_initialized():
        return DataParallelGroup(0, 1)
    return DataParallelGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
