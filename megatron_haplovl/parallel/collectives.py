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

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.parallel.groups import Group

Operation = Callable[[torch.Tensor], torch.Tensor]


def copy_to_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Enter a computation that is split over the group: every rank needs the whole input."""
    return conjugate(x, group, _identity, partial(_all_reduce, group=group))


def reduce_from_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Leave a split computation where every rank has one term of a sum."""
    return conjugate(x, group, partial(_all_reduce, group=group), _identity)


def gather_replicated(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Leave a split computation where every rank has one part along `dim`; what follows is the same on all ranks."""
    return conjugate(x, group, partial(all_gather, group=group, dim=dim), partial(_own_part, group=group, dim=dim))


def scatter(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """This rank's part along `dim` of what all ranks hold."""
    return conjugate(x, group, partial(_own_part, group=group, dim=dim), partial(all_gather, group=group, dim=dim))


def gather_to_region(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Enter a split computation with an input that is sharded along `dim` (sequence parallelism)."""
    return conjugate(
        x, group, partial(all_gather, group=group, dim=dim), partial(_reduce_scatter, group=group, dim=dim)
    )


def reduce_scatter_from_region(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Leave a split computation with this rank's part of the sum along `dim` (sequence parallelism)."""
    return conjugate(
        x, group, partial(_reduce_scatter, group=group, dim=dim), partial(all_gather, group=group, dim=dim)
    )


def conjugate(x: torch.Tensor, group: Group, forward: Operation, backward: Operation) -> torch.Tensor:
    """Apply one operation to a tensor and the other to its gradient; in a group of one, do nothing."""
    return x if group.size == 1 else _Conjugate.apply(x, forward, backward)


def part(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """View of this rank's equal share along `dim`.

    Raises:
        ValueError: the dimension cannot be divided by the size of the group.
    """
    if x.shape[dim] % group.size:
        raise ValueError(f"{x.shape[dim]} entries along dimension {dim} of {tuple(x.shape)} over {group.size} ranks")
    return x.chunk(group.size, dim)[group.rank]


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def _own_part(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    return part(x, group, dim).contiguous()


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


class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Operation, backward: Operation) -> torch.Tensor:
        ctx.operation = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.operation(grads[0]), None, None
