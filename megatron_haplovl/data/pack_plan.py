"""The pack plan: which samples stand in which packed sequence, for whole epochs, before the first step.

All sample lengths are known from preprocessing, so the plan covers the whole data set. It depends on the data and the
seed only, not on the number of processes: every layout reads the same plan, and a run can resume at any step.

An epoch is made in four steps:

1. Draw as many samples as the main sources hold together. Each source gives its share by weight, or its number of
   passes, from an endless stream of its own permutations, which goes on from epoch to epoch. A single source gives
   every sample once.
2. Join (stage 1, paper Sec. 4.1). Each main sample and the next auxiliary sample become one document, in random order.
   If the two are too long together, the main sample stays alone and the auxiliary one is left out this time.
3. Pack. Best fit, the longest first, within windows of the shuffled documents.
4. Shuffle the packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.data.sources import SampleCounts

IntArray = npt.NDArray[np.int64]

COUNT_NAMES = ("lm_tokens", "text_tokens", "patch_tokens", "tokens", "documents")
"""Columns of `EpochPlan.counts`."""

_WINDOW = 8192
# A number for each use of a random stream, so that no two streams are the same.
_DRAW_MAIN, _DRAW_AUX, _ORDER, _AUX_ORDER, _SIDE, _PACK_ORDER = range(6)


@dataclass(frozen=True)
class BlendedSource:
    """Sizes of one source's samples, and how often they are drawn: by a weight or by a number of passes."""

    name: str
    weight: float | None
    """Share of the draws that the sources with a weight have together; None: `epochs` counts."""
    counts: SampleCounts
    samples: IntArray | None = None
    """Numbers of the samples that may be drawn, each once, in the order of an evaluation; None: all."""
    epochs: float | None = None
    """Passes over these samples in each epoch of the plan; None: `weight` counts."""

    def __post_init__(self) -> None:
        assert (self.weight is None) != (self.epochs is None), f"{self.name} needs either a weight or epochs"


@dataclass(frozen=True)
class PlanSettings:
    """What a plan depends on, beside the data."""

    seed: int
    seq_length: int
    packing: bool
    shuffle: bool
    """False: samples in order, every one once, whatever the weights (evaluation)."""
    skip_long_samples: bool


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: packs of documents of samples.

    Pack p holds the documents `pack_offsets[p] : pack_offsets[p + 1]`, document d the samples
    `items[doc_offsets[d] : doc_offsets[d + 1]]`.
    """

    items: npt.NDArray[np.int32]
    """`[samples, 2]`: number of the source (main sources first, then auxiliary ones) and of the sample in it."""
    doc_offsets: IntArray
    pack_offsets: IntArray
    counts: IntArray
    """`[packs, 5]`, columns as in COUNT_NAMES."""
    stats: dict[str, int]
    """`skipped_long`: samples left out as too long; `not_joined`: main samples that stayed alone."""

    @property
    def num_packs(self) -> int:
        """Packed sequences in the epoch."""
        return len(self.counts)

    def documents(self, pack: int) -> list[list[tuple[int, int]]]:
        """The documents of a pack, each a list of (source, sample)."""
        first, last = self.pack_offsets[pack], self.pack_offsets[pack + 1]
        bounds = self.doc_offsets[first : last + 1]
        return [
            [(int(source), int(sample)) for source, sample in self.items[start:end]]
            for start, end in zip(bounds[:-1], bounds[1:], strict=True)
        ]


class PackPlan:
    """Epochs one after the other; a pack has one number through all of them.

    Args:
        epochs: the planned epochs, at least one.
        cycle: start over after the last epoch (otherwise packs behind the end are empty).
    """

    def __init__(self, epochs: list[EpochPlan], *, cycle: bool = False) -> None:
        assert epochs
        self.epochs = epochs
        self._cycle = cycle
        self._ends = np.cumsum([epoch.num_packs for epoch in epochs])

    @property
    def num_packs(self) -> int:
        """Packs in all epochs."""
        return int(self._ends[-1])

    def _find(self, pack: int) -> tuple[EpochPlan, int] | None:
        if self._cycle:
            pack %= self.num_packs
        if pack >= self.num_packs:
            return None
        epoch = int(np.searchsorted(self._ends, pack, side="right"))
        return self.epochs[epoch], pack - (int(self._ends[epoch - 1]) if epoch else 0)

    def documents(self, pack: int) -> list[list[tuple[int, int]]]:
        """Documents of a pack, each a list of (source, sample); none for a pack behind the end."""
        found = self._find(pack)
        return [] if found is None else found[0].documents(found[1])

    def counts(self, packs: range) -> StepCounts:
        """Sums over some packs."""
        total = np.zeros(len(COUNT_NAMES), dtype=np.int64)
        for found in map(self._find, packs):
            if found is not None:
                total += found[0].counts[found[1]]
        return StepCounts(**{name: int(n) for name, n in zip(COUNT_NAMES, total, strict=True)})


def fitting_samples(sources: list[BlendedSource], settings: PlanSettings) -> list[IntArray]:
    """For each source, the numbers of the samples that fit into a sequence.

    Raises:
        ValueError: a sample is too long and `skip_long_samples` is off, or a source has no sample left.
    """
    fitting = []
    for source in sources:
        samples = np.arange(len(source.counts.tokens)) if source.samples is None else source.samples
        lengths = source.counts.tokens[samples]
        too_long = np.flatnonzero(lengths > settings.seq_length)
        if len(too_long) and not settings.skip_long_samples:
            first = int(too_long[0])
            raise ValueError(
                f"{source.name}: sample {int(samples[first])} has {int(lengths[first])} tokens, more than --seq-length "
                f"{settings.seq_length} ({len(too_long)} of {len(lengths)} samples are too long, the longest has "
                f"{int(lengths.max())}); raise --seq-length or leave them out with --skip-long-samples"
            )
        if len(too_long) == len(lengths):
            raise ValueError(f"{source.name}: no sample fits into --seq-length {settings.seq_length}")
        fitting.append(samples[lengths <= settings.seq_length])
    return fitting


def build_epoch(main: list[BlendedSource], aux: list[BlendedSource], settings: PlanSettings, epoch: int) -> EpochPlan:
    """Plan one epoch.

    Args:
        main: the sources, at least one.
        aux: auxiliary sources (stage 1), or none.
        settings: what else the plan depends on.
        epoch: number of the epoch, from 0; any epoch can be planned without those before it.

    Raises:
        ValueError: as :func:`fitting_samples`, or sources that give no sample, or an auxiliary one without a weight.
    """
    fitting = fitting_samples(main + aux, settings)
    main_fitting, aux_fitting = fitting[: len(main)], fitting[len(main) :]
    sizes_of_main = [len(samples) for samples in main_fitting]
    shares = _shares_of_main(main, sizes_of_main) if settings.shuffle else sizes_of_main
    main_items = _draw(main_fitting, shares, settings, epoch, _DRAW_MAIN, _ORDER)
    items, doc_offsets, not_joined = main_items, np.arange(len(main_items) + 1), 0
    if aux:
        shares = apportion(_weights_of_aux(aux), len(main_items))
        aux_items = _draw(aux_fitting, shares, settings, epoch, _DRAW_AUX, _AUX_ORDER)
        aux_items[:, 0] += len(main)
        items, doc_offsets, not_joined = _join(main_items, aux_items, main + aux, settings, epoch)

    sizes = _document_sizes(items, doc_offsets, main + aux)
    lengths = sizes[:, COUNT_NAMES.index("tokens")]
    order, pack_offsets = _pack(lengths, settings, epoch)
    items, doc_offsets = _take_documents(items, doc_offsets, order)
    counts = np.add.reduceat(sizes[order], pack_offsets[:-1], axis=0)
    assert int(counts[:, COUNT_NAMES.index("tokens")].max()) <= settings.seq_length
    kept, known = sum(map(len, fitting)), sum(len(source.counts.tokens) for source in main + aux)
    stats = {"skipped_long": known - kept, "not_joined": not_joined}
    return EpochPlan(items, doc_offsets, pack_offsets, counts, stats)


def _random(settings: PlanSettings, *key: int) -> np.random.RandomState:
    # RandomState's sequences are frozen for ever. Generator's may change with numpy's version, and would change plans.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([settings.seed, *key])))


def _shares_of_main(main: list[BlendedSource], sizes: list[int]) -> list[int]:
    """Draws of each main source in an epoch; `sizes` are the numbers of samples that may be drawn."""
    weights = [0.0 if source.weight is None else source.weight for source in main]
    of_weighted = sum(size for source, size in zip(main, sizes, strict=True) if source.weight is not None)
    if all(source.epochs is None for source in main):
        return apportion(weights, of_weighted)
    wanted = [
        weight / sum(weights) * of_weighted if source.epochs is None else source.epochs * size
        for source, weight, size in zip(main, weights, sizes, strict=True)
    ]
    if round(sum(wanted)) < 1:
        raise ValueError(
            f"no sample would be drawn in an epoch: {', '.join(f'{s.name} {s.epochs} times' for s in main)}; raise a "
            "number of epochs"
        )
    return apportion(wanted, round(sum(wanted)))


def _weights_of_aux(aux: list[BlendedSource]) -> list[float]:
    weights = []
    for source in aux:
        if source.weight is None:
            raise ValueError(
                f"{source.name}: an auxiliary source is drawn as often as the main samples need it; give it a weight, "
                "not a number of epochs"
            )
        weights.append(source.weight)
    return weights


def apportion(weights: list[float], total: int) -> list[int]:
    """Split `total` draws by weight into whole numbers (largest remainders), each off by less than one."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * total
    whole = np.floor(shares).astype(np.int64)
    largest = np.argsort(-(shares - whole), kind="stable")
    whole[largest[: total - int(whole.sum())]] += 1
    return [int(n) for n in whole]


def _draw(
    fitting: list[IntArray],
    shares: list[int],
    settings: PlanSettings,
    epoch: int,
    draw_purpose: int,
    order_purpose: int,
) -> npt.NDArray[np.int32]:
    """Draw each source's share of an epoch's samples, `[draws, 2]` of (source, sample).

    The two purposes are the numbers of the random streams for the draws and for their order.
    """
    parts = []
    for number, (samples, share) in enumerate(zip(fitting, shares, strict=True)):
        first = epoch * share
        rounds = range(first // len(samples), (first + share - 1) // len(samples) + 1)
        stream = [
            _random(settings, draw_purpose, number, r).permutation(samples) if settings.shuffle else samples
            for r in rounds
        ]
        drawn = np.concatenate([*stream, np.zeros(0, np.int64)])[first % len(samples) :][:share]
        parts.append(np.stack([np.full(share, number), drawn], axis=1).astype(np.int32))
    items = np.concatenate(parts)
    if settings.shuffle:
        items = items[_random(settings, order_purpose, epoch).permutation(len(items))]
    return items


def _join(
    main: npt.NDArray[np.int32],
    aux: npt.NDArray[np.int32],
    sources: list[BlendedSource],
    settings: PlanSettings,
    epoch: int,
) -> tuple[npt.NDArray[np.int32], IntArray, int]:
    """Join main and auxiliary samples pairwise; returns items, document offsets, and how many stayed alone."""
    joined = _lengths(main, sources) + _lengths(aux, sources) <= settings.seq_length
    aux_first = _random(settings, _SIDE, epoch).randint(0, 2, size=len(main)).astype(bool)
    pairs = np.stack([main, aux], axis=1)  # [documents, 2, 2]
    pairs[aux_first & joined] = pairs[aux_first & joined][:, ::-1]
    keep = np.ones((len(main), 2), dtype=bool)
    keep[~joined, 1] = False
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return pairs[keep], offsets, int((~joined).sum())


def _lengths(items: npt.NDArray[np.int32], sources: list[BlendedSource]) -> IntArray:
    lengths = np.zeros(len(items), dtype=np.int64)
    for number, source in enumerate(sources):
        mine = items[:, 0] == number
        lengths[mine] = source.counts.tokens[items[mine, 1]]
    return lengths


def _document_sizes(items: npt.NDArray[np.int32], doc_offsets: IntArray, sources: list[BlendedSource]) -> IntArray:
    """Counts of every document, `[documents, 5]`, columns as in COUNT_NAMES."""
    sizes = np.zeros((len(items), len(COUNT_NAMES)), dtype=np.int64)
    for number, source in enumerate(sources):
        mine = items[:, 0] == number
        for column, name in enumerate(COUNT_NAMES[:-1]):
            sizes[mine, column] = getattr(source.counts, name)[items[mine, 1]]
    summed: IntArray = np.add.reduceat(sizes, doc_offsets[:-1], axis=0)
    summed[:, -1] = 1
    return summed


def _pack(lengths: IntArray, settings: PlanSettings, epoch: int) -> tuple[IntArray, IntArray]:
    """Order of the documents and the boundaries of the packs in it."""
    if settings.packing:
        packs: list[list[int]] = []
        for start in range(0, len(lengths), _WINDOW):
            for pack in best_fit_decreasing(lengths[start : start + _WINDOW], settings.seq_length):
                packs.append([start + document for document in pack])
    else:
        packs = [[document] for document in range(len(lengths))]
    if settings.shuffle:
        packs = [packs[i] for i in _random(settings, _PACK_ORDER, epoch).permutation(len(packs))]
    offsets = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])]).astype(np.int64)
    return np.array([document for pack in packs for document in pack], dtype=np.int64), offsets


def best_fit_decreasing(lengths: IntArray, capacity: int) -> list[list[int]]:
    """Put things into bins: the longest first, each into the fullest bin that still has room for it.

    Returns:
        The bins, each a sorted list of indices into `lengths`.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free room, number of the bin), sorted
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            bins.append([i])
            room, number = capacity, len(bins) - 1
        else:
            room, number = rooms.pop(place)
            bins[number].append(i)
        insort(rooms, (room - length, number))
    return [sorted(content) for content in bins]


def _take_documents(
    items: npt.NDArray[np.int32], doc_offsets: IntArray, order: IntArray
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Reorder documents."""
    sizes = np.diff(doc_offsets)[order]
    new_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    first = np.repeat(doc_offsets[:-1][order] - new_offsets[:-1], sizes)
    return items[first + np.arange(len(items))], new_offsets
