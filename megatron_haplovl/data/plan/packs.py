"""Planned packs as training reads them: their documents, their counts, and which of them a step takes.

A pack is a packed sequence. It has one number through all epochs of a plan.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.batch_schedule import BatchSchedule, Stairs
from megatron_haplovl.data.batch import StepCounts

IntArray = npt.NDArray[np.int64]

COUNT_NAMES = ("lm_tokens", "text_tokens", "patch_tokens", "tokens", "documents", "tiles", "pairs")
"""Columns of what a plan counts, as in `StepCounts`; and image tiles, and (query, key) pairs of the mixed mask."""

ITEM_COUNT_NAMES = ("lm_tokens", "text_tokens", "patch_tokens")
"""Columns of `EpochPlan.item_counts`: what losses by source are divided by."""

_STEP_COUNTS = [field.name for field in dataclasses.fields(StepCounts)]


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: packs of documents of samples.

    Pack p holds the documents `pack_offsets[p] : pack_offsets[p + 1]`, document d the samples
    `items[doc_offsets[d] : doc_offsets[d + 1]]`.
    """

    items: npt.NDArray[np.int32]
    """`[samples, 2]`: number of the source (main sources first, then auxiliary ones) and of the sample in it."""
    item_counts: npt.NDArray[np.int32]
    """`[samples, 3]`, columns as in ITEM_COUNT_NAMES."""
    doc_offsets: IntArray
    pack_offsets: IntArray
    step_offsets: IntArray
    """`[steps + 1]`: where in the packs each step begins that begins in this epoch, and the number of packs. Where a
    batch is counted in packs there are no steps in a plan."""
    cumulative: IntArray
    """`[packs + 1, 7]`: counts of all packs before each one, columns as in COUNT_NAMES."""
    stats: dict[str, int]
    """`skipped_long`: samples left out as too long; `not_joined`: main samples that stayed alone."""

    @property
    def num_packs(self) -> int:
        """Packed sequences in the epoch."""
        return len(self.pack_offsets) - 1

    @property
    def num_documents(self) -> int:
        """Documents in the epoch."""
        return int(self.pack_offsets[-1])

    @property
    def num_steps(self) -> int:
        """Steps that begin in the epoch, where a batch is counted in samples."""
        return len(self.step_offsets) - 1

    @property
    def counts(self) -> IntArray:
        """`[packs, 7]`, columns as in COUNT_NAMES."""
        return np.diff(self.cumulative, axis=0)

    def documents(self, pack: int) -> list[list[tuple[int, int]]]:
        """The documents of a pack, each a list of (source, sample)."""
        first, last = self.pack_offsets[pack], self.pack_offsets[pack + 1]
        bounds = self.doc_offsets[first : last + 1]
        return [
            [(int(source), int(sample)) for source, sample in self.items[start:end]]
            for start, end in zip(bounds[:-1], bounds[1:], strict=True)
        ]

    def item_counts_of(self, pack: int) -> list[list[tuple[int, ...]]]:
        """For each document of a pack, the counts of each of its samples, as in ITEM_COUNT_NAMES."""
        first, last = self.pack_offsets[pack], self.pack_offsets[pack + 1]
        bounds = self.doc_offsets[first : last + 1].tolist()
        return [
            [tuple(row) for row in self.item_counts[start:end].tolist()] for start, end in itertools.pairwise(bounds)
        ]


class PackPlan:
    """Epochs one after the other.

    Args:
        epochs: the planned epochs, at least one.
        cycle: start over after the last epoch (otherwise packs behind the end are empty).
    """

    def __init__(self, epochs: list[EpochPlan], *, cycle: bool = False) -> None:
        assert epochs
        self.epochs = epochs
        self.cycle = cycle
        self._starts = np.cumsum([0, *(epoch.num_packs for epoch in epochs)])
        self._counts_before = np.cumsum([0 * epochs[0].cumulative[-1], *(e.cumulative[-1] for e in epochs)], axis=0)

    @property
    def num_packs(self) -> int:
        """Packs in all epochs."""
        return int(self._starts[-1])

    def start(self, epoch: int) -> int:
        """The first pack of an epoch."""
        return int(self._starts[epoch])

    def documents(self, pack: int) -> list[list[tuple[int, int]]]:
        """Documents of a pack, each a list of (source, sample); none for a pack behind the end."""
        if self.cycle:
            pack %= self.num_packs
        if pack >= self.num_packs:
            return []
        epoch = self._epoch(pack)
        return self.epochs[epoch].documents(pack - self.start(epoch))

    def item_counts(self, pack: int) -> list[list[tuple[int, ...]]]:
        """For each of these documents, the counts of each of its samples, columns as in ITEM_COUNT_NAMES."""
        if self.cycle:
            pack %= self.num_packs
        if pack >= self.num_packs:
            return []
        epoch = self._epoch(pack)
        return self.epochs[epoch].item_counts_of(pack - self.start(epoch))

    def spans(self, packs: range) -> Iterator[tuple[EpochPlan, int, int]]:
        """The epochs that packs which follow each other lie in, with the first pack and the end in each."""
        pack = packs.start
        while pack < packs.stop and (self.cycle or pack < self.num_packs):
            inside = pack % self.num_packs
            epoch = self._epoch(inside)
            first = inside - self.start(epoch)
            end = min(self.epochs[epoch].num_packs, first + packs.stop - pack)
            yield self.epochs[epoch], first, end
            pack += end - first

    def cumulative(self, packs: IntArray) -> IntArray:
        """Counts of all packs before each of some, `[len(packs), 7]`, columns as in COUNT_NAMES."""
        rounds, packs = (
            np.divmod(packs, self.num_packs) if self.cycle else (0 * packs, np.minimum(packs, self.num_packs))
        )
        found = np.stack([self._cumulative(int(pack)) for pack in packs])
        return found + rounds[:, None] * self._counts_before[-1]

    def counts(self, packs: range) -> StepCounts:
        """Sums over packs that follow each other."""
        before, after = self.cumulative(np.array([packs.start, packs.stop]))
        return step_counts(after - before)

    def _epoch(self, pack: int) -> int:
        return int(np.searchsorted(self._starts, pack, side="right")) - 1

    def _cumulative(self, pack: int) -> IntArray:
        epoch = min(self._epoch(pack), len(self.epochs) - 1)
        counts: IntArray = self._counts_before[epoch] + self.epochs[epoch].cumulative[pack - self.start(epoch)]
        return counts


def step_counts(total: IntArray) -> StepCounts:
    """One row of counts, columns as in COUNT_NAMES, by name."""
    by_name = dict(zip(COUNT_NAMES, total.tolist(), strict=True))
    return StepCounts(**{name: by_name[name] for name in _STEP_COUNTS})


class StepPlan:
    """Which packs a step takes: as many as its batch is large, or those that hold its samples.

    Args:
        packs: the plan.
        batches: packs or samples of each step.
        in_samples: whether these are samples; then the steps are the plan's own.
    """

    def __init__(self, packs: PackPlan, batches: BatchSchedule, *, in_samples: bool = False) -> None:
        assert not (in_samples and packs.cycle and batches.ramp), "the second round would begin the ramp anew"
        self.packs = packs
        self._batches, self._in_samples = batches, in_samples
        self._starts = np.cumsum([0, *(epoch.num_steps for epoch in packs.epochs)])
        self.most_packs = self._most_packs() if in_samples else batches.levels
        """The largest number of packs that a step has, for each level of the ramp."""

    def _most_packs(self) -> Stairs:
        epochs = enumerate(self.packs.epochs)
        begins = [self.packs.start(number) + epoch.step_offsets[:-1] for number, epoch in epochs]
        sizes = np.diff(np.concatenate([*begins, [self.packs.num_packs]]))
        firsts = [first for first in self._batches.levels.firsts if first < len(sizes)]
        return Stairs(firsts, np.maximum.reduceat(sizes, firsts).tolist())

    @property
    def num_steps(self) -> int:
        """Steps in all epochs; the last one may be smaller than the others."""
        if not self._in_samples:
            return self._batches.steps_for(self.packs.num_packs)
        return int(self._starts[-1])

    def packs_of(self, step: int) -> range:
        """The packs of a step."""
        if not self._in_samples:
            end = self._batches.before(step + 1)
            last = end if self.packs.cycle else min(end, self.packs.num_packs)
            return range(min(self._batches.before(step), last), last)
        return range(self._first_pack(step), self._first_pack(step + 1))

    def _first_pack(self, step: int) -> int:
        rounds, step = divmod(step, self.num_steps) if self.packs.cycle else (0, min(step, self.num_steps))
        epoch = min(int(np.searchsorted(self._starts, step, side="right")), len(self.packs.epochs)) - 1
        first = self.packs.start(epoch) + int(self.packs.epochs[epoch].step_offsets[step - int(self._starts[epoch])])
        return rounds * self.packs.num_packs + first

    def counts(self, step: int) -> StepCounts:
        """Sums over the packs of a step."""
        return self.packs.counts(self.packs_of(step))

    def counts_before(self, step: int) -> StepCounts:
        """Sums over all steps before this one."""
        return self.packs.counts(range(self.packs_of(step).start))

    def counts_of_packs(self, step: int) -> IntArray:
        """`[packs, 7]`: counts of each pack of a step, columns as in COUNT_NAMES."""
        packs = self.packs_of(step)
        return np.diff(self.packs.cumulative(np.arange(packs.start, packs.stop + 1)), axis=0)
