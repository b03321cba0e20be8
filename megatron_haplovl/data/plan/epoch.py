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

Where a batch is counted in samples, a window is the documents of a step, and its packs stay together. An epoch is then
as many whole steps as it comes closest to; because each source's stream goes on, nothing is drawn twice or left out.
Behind a ramp of the batch (--rampup-batch-size) a step may begin in one epoch and end in the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.data.plan.packing import gather_ranges, pack_windows, shuffle_packs
from megatron_haplovl.data.plan.packs import COUNT_NAMES, ITEM_COUNT_NAMES, EpochPlan
from megatron_haplovl.data.sources import SampleCounts

IntArray = npt.NDArray[np.int64]

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
    step_samples: int | None = None
    """Documents of a step, whose packs hold nothing else; None: packs know no steps."""
    rampup: tuple[int, ...] = ()
    """How the first steps come to have that many, see `BatchSchedule.ramp`."""


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
    shares = _shares_of_main(main, sizes_of_main, settings.step_samples) if settings.shuffle else sizes_of_main
    main_items = _draw(main_fitting, shares, settings, epoch, _DRAW_MAIN, _ORDER)
    items, doc_offsets, not_joined = main_items, np.arange(len(main_items) + 1), 0
    if aux:
        shares = apportion(_weights_of_aux(aux), len(main_items))
        aux_items = _draw(aux_fitting, shares, settings, epoch, _DRAW_AUX, _AUX_ORDER)
        aux_items[:, 0] += len(main)
        items, doc_offsets, not_joined = _join(main_items, aux_items, main + aux, settings, epoch)

    lengths = np.add.reduceat(_of_items("tokens", items, main + aux), doc_offsets[:-1])
    order, pack_offsets, step_offsets = _pack(lengths, settings, epoch)
    cumulative = _count_packs(items, doc_offsets, order, pack_offsets, main + aux)
    assert int(np.diff(cumulative[:, COUNT_NAMES.index("tokens")]).max()) <= settings.seq_length
    items, doc_offsets = _take_documents(items, doc_offsets, order)
    item_counts = np.stack([_of_items(name, items, main + aux) for name in ITEM_COUNT_NAMES], axis=1).astype(np.int32)
    kept = sum(map(len, fitting))
    known = sum(len(source.counts.tokens if source.samples is None else source.samples) for source in main + aux)
    stats = {"skipped_long": known - kept, "not_joined": not_joined}
    return EpochPlan(items, item_counts, doc_offsets, pack_offsets, step_offsets, cumulative, stats)


def _pack(lengths: IntArray, settings: PlanSettings, epoch: int) -> tuple[IntArray, IntArray, IntArray]:
    """Order of the documents, the boundaries of the packs in it, and those of the steps in the packs."""
    bounds, goes_on = _windows(len(lengths), settings, epoch)
    if settings.packing:
        order, pack_offsets, window_offsets = pack_windows(lengths, settings.seq_length, bounds)
    else:
        order, pack_offsets, window_offsets = np.arange(len(lengths)), np.arange(len(lengths) + 1), bounds
    if settings.step_samples is not None:
        # The documents are in random order already, and a step's packs stay together.
        return order, pack_offsets, window_offsets[int(goes_on) :]
    if settings.shuffle:
        permutation = _random(settings, _PACK_ORDER, epoch).permutation(len(pack_offsets) - 1)
        order, pack_offsets = shuffle_packs(order, pack_offsets, permutation)
    return order, pack_offsets, np.zeros(1, dtype=np.int64)


def _windows(documents: int, settings: PlanSettings, epoch: int) -> tuple[IntArray, bool]:
    """Where each window begins in an epoch's documents, and their number; whether the first goes on with a step.

    The epochs have as many documents each. Behind a ramp their ends are no ends of steps: such a step takes the last
    documents of one epoch and the first ones of the next.
    """
    if settings.step_samples is None or not settings.rampup:
        return np.append(np.arange(0, documents, settings.step_samples or _WINDOW), documents), False
    batches = BatchSchedule(settings.step_samples, settings.rampup)
    before = epoch * documents
    steps = range(batches.steps_for(before), batches.steps_for(before + documents))
    begins = np.array([batches.before(step) - before for step in steps], dtype=np.int64)
    goes_on = begins[0] > 0
    return np.concatenate([[0] * int(goes_on), begins, [documents]]).astype(np.int64), bool(goes_on)


def _random(settings: PlanSettings, *key: int) -> np.random.RandomState:
    # RandomState's sequences are frozen for ever. Generator's may change with numpy's version, and would change plans.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([settings.seed, *key])))


def _shares_of_main(main: list[BlendedSource], sizes: list[int], step_samples: int | None) -> list[int]:
    """Draws of each main source in an epoch; `sizes` are the numbers of samples that may be drawn."""
    weights = [0.0 if source.weight is None else source.weight for source in main]
    total: float = sum(size for source, size in zip(main, sizes, strict=True) if source.weight is not None)
    if any(source.epochs is not None for source in main):
        wanted = [
            weight / sum(weights) * total if source.epochs is None else source.epochs * size
            for source, weight, size in zip(main, weights, sizes, strict=True)
        ]
        weights, total = wanted, sum(wanted)
    unit = step_samples or 1
    draws = unit * round(total / unit)
    if draws == 0 and step_samples is None:
        raise ValueError(
            f"no sample would be drawn in an epoch: {', '.join(f'{s.name} {s.epochs} times' for s in main)}; raise a "
            "number of epochs"
        )
    # An epoch of less than half a step is one step all the same.
    return apportion(weights, max(draws, unit))


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
    joined = _of_items("tokens", main, sources) + _of_items("tokens", aux, sources) <= settings.seq_length
    aux_first = _random(settings, _SIDE, epoch).randint(0, 2, size=len(main)).astype(bool)
    pairs = np.stack([main, aux], axis=1)  # [documents, 2, 2]
    pairs[aux_first & joined] = pairs[aux_first & joined][:, ::-1]
    keep = np.ones((len(main), 2), dtype=bool)
    keep[~joined, 1] = False
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return pairs[keep], offsets, int((~joined).sum())


def _of_items(name: str, items: npt.NDArray[np.int32], sources: list[BlendedSource]) -> IntArray:
    """What the field `name` of SampleCounts says of each item."""
    values: list[IntArray] = [getattr(source.counts, name) for source in sources]
    first = np.cumsum([0, *map(len, values)])
    of_items: IntArray = np.concatenate(values)[first[items[:, 0]] + items[:, 1]]
    return of_items


def _count_packs(
    items: npt.NDArray[np.int32],
    doc_offsets: IntArray,
    order: IntArray,
    pack_offsets: IntArray,
    sources: list[BlendedSource],
) -> IntArray:
    """`EpochPlan.cumulative`: documents as in `items` and `doc_offsets`, which stand in the packs in this order."""

    def of_documents(name: str) -> IntArray:
        of_items = _of_items(name, items, sources)
        summed: IntArray = np.add.reduceat(of_items, doc_offsets[:-1])
        return summed[order]

    cumulative = np.zeros((len(pack_offsets), len(COUNT_NAMES)), dtype=np.int64)
    lengths = of_documents("tokens")
    for column, name in enumerate(COUNT_NAMES):
        if name == "documents":
            cumulative[:, column] = pack_offsets
            continue
        # Every token sees those before it in its document and itself, and a visual token the later ones of its image.
        values = of_documents("visual_pairs") + lengths * (lengths + 1) // 2 if name == "pairs" else of_documents(name)
        np.cumsum(np.add.reduceat(values, pack_offsets[:-1]), out=cumulative[1:, column])
    return cumulative


def _take_documents(
    items: npt.NDArray[np.int32], doc_offsets: IntArray, order: IntArray
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Reorder documents."""
    sizes = np.diff(doc_offsets)[order]
    new_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return items[gather_ranges(doc_offsets[:-1][order], sizes)], new_offsets
