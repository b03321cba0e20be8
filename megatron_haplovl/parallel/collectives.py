"""Collectives inside the computation, as conjugate pairs: what one does forward, the other does backward.

Every function takes its group, and does nothing in a group of one. A tensor is *replicated* where all ranks hold the
same values and all compute the same with them, so that its gradient is the same everywhere; *partial* where the true
tensor is the sum over ranks; *sharded* where each rank holds a part.

| function | forward | backward |
|---|---|---|
| `copy_to_region` | replicated: identity | partial gradients: all-reduce |
| `reduce_from_region` | partial: all-reduce | replicated gradient: identity |
| `gather_replicated` | sharded: all-gather | replicated gradient: own part |
| `scatter` | replicated: own part | sharded gradient: all-gather |
| `gather_to_region` | sharded: all-gather | partial gradients: reduce-scatter |
| `reduce_scatter_from_region` | partial: reduce-scatter | sharded gradient: all-gather |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.parallel.groups import Group


def copy_to_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Enter a computation that is split over the group: every rank needs the whole input."""
    return x if group.size == 1 else _CopyToRegion.apply(x, group)


def reduce_from_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Leave it where every rank has one term of a sum."""
    return x if group.size == 1 else _ReduceFromRegion.apply(x, group)


def gather_replicated(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Leave it where every rank has one part along `dim`; what follows is the same on all ranks."""
    return x if group.size == 1 else _GatherReplicated.apply(x, group, dim)


def scatter(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """This rank's part along `dim` of what all ranks hold."""
    return x if group.size == 1 else _Scatter.apply(x, group, dim)


def gather_to_region(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Enter with an input of which every rank has one part along `dim` (sequence parallelism)."""
    return x if group.size == 1 else _GatherToRegion.apply(x, group, dim)


def reduce_scatter_from_region(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Leave with one part along `dim` of the sum (sequence parallelism)."""
    return x if group.size == 1 else _ReduceScatterFromRegion.apply(x, group, dim)


def part(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """View of this rank's equal share along `dim`.

    Raises:
        ValueError: the dimension cannot be divided by the size of the group.
    """
    if x.shape[dim] % group.size:
        raise ValueError(f"{x.shape[dim]} entries along dimension {dim} of {tuple(x.shape)} over {group.size} ranks")
    return x.chunk(group.size, dim)[group.rank]


def _all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.process_group)
    return total


def all_gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """All ranks' parts along `dim`, on every rank; without autograd."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size)]
    dist.all_gather(parts, x.contiguous(), group=group.process_group)
    return torch.cat(parts, dim)


def _reduce_scatter(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    parts = [piece.contiguous() for piece in x.chunk(group.size, dim)]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, group=group.process_group)
    return mine


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _all_reduce(grads[0], ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return part(grads[0], ctx.group, ctx.dim).contiguous(), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return part(x, group, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return all_gather(grads[0], ctx.group, ctx.dim), None, None


class _GatherToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _reduce_scatter(grads[0], ctx.group, ctx.dim), None, None


class _ReduceScatterFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return all_gather(grads[0], ctx.group, ctx.dim), None, None
