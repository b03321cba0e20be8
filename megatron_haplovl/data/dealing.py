"""Which sequences of a step each data-parallel rank gets, so that all ranks have about the same to compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.packs import COUNT_NAMES, IntArray, StepPlan

EMPTY = -1
"""Number of a pack without documents."""


@dataclass(frozen=True)
class SequenceCost:
    """What makes one sequence more costly than another of the same length, in operations of the forward pass."""

    per_pair: float
    """For each (query, key) pair that attends."""
    per_tile: float
    """For each image tile."""

    @classmethod
    def of(cls, config: Config) -> SequenceCost:
        """The model's own widths. Two products of the heads' width for a pair, in every block; for a tile its patches'
        embedding and, where a vision teacher looks on, the teacher's blocks."""
        model, vision = config.model, config.model.vision
        decoders = (model.pre,) if config.stage.has_teachers else (model.pre, model.post)
        per_pair = sum(4.0 * decoder.num_layers * decoder.hidden_size for decoder in decoders)
        width, ffn = model.pre.hidden_size, model.pre.ffn_hidden_size
        per_patch = 6.0 * vision.patch_size**2 * width
        if config.stage.has_teachers:
            # It has the pre-decoder's shape, and no backward pass, which is twice the forward pass.
            per_patch += model.pre.num_layers * (8.0 * width**2 + 4.0 * width * ffn) / 3
        return cls(per_pair, per_patch * vision.cells_per_tile)

    def of_packs(self, counts: IntArray) -> npt.NDArray[np.float64]:
        """Costs of packs, from their rows of counts (columns as in COUNT_NAMES)."""
        pairs, tiles = counts[:, COUNT_NAMES.index("pairs")], counts[:, COUNT_NAMES.index("tiles")]
        costs: npt.NDArray[np.float64] = self.per_pair * pairs + self.per_tile * tiles
        return costs


def deal(costs: npt.NDArray[np.float64], ranks: int) -> npt.NDArray[np.int64]:
    """Deal sequences to ranks, the most costly first; all ranks get one of about the same cost at the same time.

    Args:
        costs: of each sequence; their number is a multiple of `ranks`.
        ranks: how many there are.

    Returns:
        `[sequences / ranks, ranks]`: the sequences of each rank from top to bottom. Of the sequences of a row, the
        rank that has least so far gets the most costly one.
    """
    rows = np.argsort(-costs, kind="stable").reshape(-1, ranks)
    so_far = np.zeros(ranks)
    dealt = np.empty_like(rows)
    for row, target in zip(rows, dealt, strict=True):
        receivers = np.argsort(so_far, kind="stable")
        target[receivers] = row
        so_far[receivers] += costs[row]
    return dealt


class MicroBatchNumbers:
    """Sampler: the pack numbers of each micro-batch of one rank, for all steps from `first_step` on.

    A step has the same packs for any number of ranks. A single rank takes them in the plan's order. Every step has the
    same number of sequences, which all ranks share evenly; those that the step has no pack for are empty.

    Args:
        plan: the packs of each step.
        steps: number of steps.
        micro_batch_size: sequences of a micro-batch.
        cost: what sequences are dealt by.
        dp_rank: this process's place among those that read different data.
        dp_size: number of those processes.
    """

    def __init__(
        self, plan: StepPlan, steps: int, micro_batch_size: int, cost: SequenceCost, dp_rank: int, dp_size: int
    ) -> None:
        assert 0 <= dp_rank < dp_size
        self.first_step = 0
        self.per_step = -(-plan.sequences // (micro_batch_size * dp_size))
        """Micro-batches of this rank in a step."""
        self.sequences = self.per_step * micro_batch_size * dp_size
        """Sequences of a step over all ranks, empty ones included."""
        self._plan, self._steps, self._micro, self._cost = plan, steps, micro_batch_size, cost
        self._rank, self._size = dp_rank, dp_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self._steps):
            mine = self._sequences(step)
            for first in range(0, len(mine), self._micro):
                yield mine[first : first + self._micro]

    def __len__(self) -> int:
        return (self._steps - self.first_step) * self.per_step

    def _sequences(self, step: int) -> list[int]:
        packs = np.full(self.sequences, EMPTY, dtype=np.int64)
        real = self._plan.packs_of(step)
        packs[: len(real)] = real
        if self._size > 1:
            costs = np.zeros(len(packs))
            # Padding sees itself, so even a small pack comes before an empty one.
            costs[: len(real)] = self._cost.of_packs(self._plan.counts_of_packs(step))
            packs = packs[deal(costs, self._size)[:, self._rank]]
        return packs.tolist()
