"""Process groups, built once and passed on explicitly; there is no global registry to ask.

Ranks are ordered pipeline (slowest), data, context, tensor (fastest). The ranks of a tensor-parallel group are
neighbours. They stand on one node if its number of GPUs is a multiple of the tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


@dataclass(frozen=True)
class Group:
    """Some ranks, and this rank's place among them."""

    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    """Global ranks, in order."""
    process_group: dist.ProcessGroup | None = None
    """None in a group of one, except in `ParallelGroups.replicas` of a run of several ranks, because DeepSpeed asks for
    it."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place; the same tensor is returned."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest value over the group for each element, in place; the same tensor is returned."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def gather_objects(self, mine: Any) -> list[Any]:
        """Every rank's (picklable) object, by rank, on every rank."""
        found = [mine]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, mine, group=self.process_group)
        return found

    def together(self, function: Callable[[], Result]) -> Result:
        """Run something that may fail on some ranks only; then all fail, and none waits for the others.

        Raises:
            ValueError: this rank's error, or that of the first rank that had one.
            OSError: this rank's error; the other ranks raise a ValueError with its text.
        """
        result = None
        error: ValueError | OSError | None = None
        try:
            result = function()
        except (ValueError, OSError) as own:
            error = own
        errors = self.gather_objects(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in zip(self.ranks, errors, strict=True):
            if message is not None:
                raise ValueError(f"rank {rank}: {message}")
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for every rank of the group."""
        if self.size > 1:
            dist.barrier(group=self.process_group)


@dataclass(frozen=True)
class ParallelGroups:
    """Every group that this rank belongs to."""

    world: Group = Group()
    control: Group = Group()
    """All ranks, on the host: what they agree on there neither waits for a device nor mixes with its messages."""
    tensor: Group = Group()
    """Ranks that share each layer's weights."""
    context: Group = Group()
    """Ranks that share each sequence's tokens."""
    data: Group = Group()
    """Ranks that hold different sequences."""
    pipeline: Group = Group()
    """Ranks that share the layers."""
    replicas: Group = Group()
    """Ranks that hold the same weights (data times context). They are DeepSpeed's data-parallel group: it sums
    gradients over them, and ZeRO partitions over them."""
    stages_of_replicas: Group = Group()
    """The replicas of all stages. Only the other tensor-parallel ranks are missing; they compute the same losses."""


def build_groups(
    *, tensor: int = 1, context: int = 1, pipeline: int = 1, timeout: timedelta | None = None
) -> ParallelGroups:
    """Make every process group. Called by every rank, after the processes have been joined.

    Args:
        tensor: tensor-parallel size.
        context: context-parallel size.
        pipeline: pipeline-parallel size. What remains of the ranks is data-parallel.
        timeout: time after which a collective gives up; default: the backend's.

    Raises:
        ValueError: the number of ranks is not a multiple of the three sizes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % (tensor * context * pipeline):
        raise ValueError(
            f"{world} ranks cannot be divided into --tensor-model-parallel-size {tensor} x --context-parallel-size "
            f"{context} x --pipeline-model-parallel-size {pipeline} = {tensor * context * pipeline}; start a multiple "
            "of that many"
        )
    this_rank = dist.get_rank() if dist.is_initialized() else 0
    mesh_PDCT = torch.arange(world).view(pipeline, -1, context, tensor)

    def along(*axes: int, even_alone: bool = False) -> Group:
        """This rank's group: all ranks that differ from it only on these axes.

        A rank alone has no process group, unless DeepSpeed will ask for it.
        """
        others = [axis for axis in range(4) if axis not in axes]
        size = int(torch.tensor([mesh_PDCT.shape[axis] for axis in axes]).prod())
        mine = None
        # Every rank must take part in making every group, its own or not.
        for ranks in mesh_PDCT.permute(*others, *axes).reshape(-1, size).tolist():
            process_group = None
            if size == world and world > 1:
                process_group = dist.group.WORLD
            elif size > 1 or (even_alone and world > 1):
                process_group = dist.new_group(ranks, timeout=timeout)
            if this_rank in ranks:
                mine = Group(ranks.index(this_rank), size, tuple(ranks), process_group)
        assert mine is not None
        return mine

    whole = along(0, 1, 2, 3)
    replicas = along(1, 2, even_alone=True)
    return ParallelGroups(
        world=whole,
        control=_on_host(whole, timeout),
        tensor=along(3),
        context=along(2),
        data=along(1),
        pipeline=along(0),
        replicas=replicas,
        stages_of_replicas=along(0, 1, 2) if pipeline > 1 else replicas,
    )


def _on_host(world: Group, timeout: timedelta | None) -> Group:
    """The same ranks, joined by gloo."""
    if world.size == 1 or dist.get_backend() == "gloo":
        return world
    return dataclasses.replace(world, process_group=dist.new_group(backend="gloo", timeout=timeout))
