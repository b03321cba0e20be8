"""Which sequences of a step each data-parallel rank gets, so that all ranks have about the same to compute."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_haplovl.config.batch_schedule import Stairs
from megatron_haplovl.data.plan.packs import COUNT_NAMES, IntArray, StepPlan

EMPTY = -1
"""Number of a pack without documents."""


def deal(pairs: IntArray, tiles: IntArray, ranks: int) -> IntArray:
    """Deal the sequences of a step to ranks, so that all have about as many visible pairs and image tiles.

    The pairs are the work of attention, which is what sequences of one length differ by; the tiles are decoded on the
    host, and seen by stage 1's teacher.

    Args:
        pairs: (query, key) pairs of each sequence; their number is a multiple of `ranks`.
        tiles: image tiles of each sequence.
        ranks: how many there are.

    Returns:
        `[sequences / ranks, ranks]`: the sequences of each rank from top to bottom. The sequences of a row have about
        as many pairs each.
    """
    sizes_R2 = np.stack([pairs / max(1.0, pairs.mean()), tiles / max(1.0, tiles.mean())], axis=1)
    rows = np.argsort(-pairs, kind="stable").reshape(-1, ranks)
    dealt, surplus_R2 = np.empty_like(rows), np.zeros((ranks, 2))
    for row, target in zip(rows, dealt, strict=True):
        off_mean_R2 = sizes_R2[row] - sizes_R2[row].mean(axis=0)
        taken = np.zeros(ranks, dtype=np.bool_)
        # The most unusual sequence first, each to the rank whose sum of squared surpluses grows least.
        for place in np.argsort(-(off_mean_R2**2).sum(axis=1), kind="stable"):
            growth = np.where(taken, np.inf, surplus_R2 @ off_mean_R2[place])
            rank = int(np.argmin(growth))
            taken[rank], target[rank] = True, row[place]
        surplus_R2 += sizes_R2[target] - sizes_R2[row].mean(axis=0)
    return dealt


class MicroBatchNumbers:
    """Sampler: the pack numbers of each micro-batch of one rank, for all steps from `first_step` on.

    A step has the same packs for any number of ranks. A single rank takes them in the plan's order. Every step of a
    level (see :class:`BatchSchedule`) has the same number of sequences, which all ranks share evenly; those that the
    step has no pack for are empty.

    Args:
        plan: the packs of each step.
        steps: number of steps.
        micro_batch_size: sequences of a micro-batch.
        dp_rank: this process's place among those that read different data.
        dp_size: number of those processes.
    """

    def __init__(self, plan: StepPlan, steps: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> None:
        assert 0 <= dp_rank < dp_size
        self.first_step = 0
        self.per_pass = micro_batch_size * dp_size
        """Sequences of one micro-batch of every rank."""
        most = plan.most_packs
        self.per_step = Stairs(most.firsts, [-(-packs // self.per_pass) for packs in most.sizes])
        """Micro-batches of this rank in each step."""
        self._plan, self._steps, self._micro = plan, steps, micro_batch_size
        self._rank, self._size = dp_rank, dp_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self._steps):
            yield from self.of_step(step)

    def __len__(self) -> int:
        return self.per_step.before(self._steps) - self.per_step.before(self.first_step)

    def of_step(self, step: int) -> list[list[int]]:
        """The same for one step."""
        mine = self.packs_of(step)
        return [mine[first : first + self._micro] for first in range(0, len(mine), self._micro)]

    def packs_of(self, step: int) -> list[int]:
        """The packs that this rank reads in a step, in order, with EMPTY where there is none."""
        packs = np.full(self.per_step.size(step) * self.per_pass, EMPTY, dtype=np.int64)
        real = self._plan.packs_of(step)
        packs[: len(real)] = real
        if self._size > 1:
            counts = np.zeros((len(packs), len(COUNT_NAMES)), dtype=np.int64)
            counts[: len(real)] = self._plan.counts_of_packs(step)
            pairs, tiles = counts[:, COUNT_NAMES.index("pairs")], counts[:, COUNT_NAMES.index("tiles")]
            packs = packs[deal(pairs, tiles, self._size)[:, self._rank]]
        return packs.tolist()
