"""The batches that a training or evaluation loop reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import DataLoader

from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.layout import check_batch, check_levels
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.batch import Batch, StepCounts
from megatron_haplovl.data.gaps import Missing
from megatron_haplovl.data.known_gaps import KnownGaps
from megatron_haplovl.data.mock_source import MockSource
from megatron_haplovl.data.pack_dataset import ErrorsAsValues, PackDataset, Received
from megatron_haplovl.data.plan.cache import PlanInputs, SourceShare, cached_plan
from megatron_haplovl.data.plan.dealing import EMPTY, MicroBatchNumbers
from megatron_haplovl.data.plan.epoch import PlanSettings, build_epoch
from megatron_haplovl.data.plan.packs import PackPlan, StepPlan, step_counts
from megatron_haplovl.data.source_counts import IntArray, counts_by_source
from megatron_haplovl.data.source_labels import source_labels
from megatron_haplovl.data.sources import IndexedSource, Source
from megatron_haplovl.data.tile_rule import NarrowedSource
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.data.tokenizer_fingerprint import blind_spot, same_tokenizer, shorten
from megatron_haplovl.data.worker_signals import end_workers_at_exit, ignore_stop_signals

logger = logging.getLogger(__name__)


class BatchLoader:
    """Batches of one rank, from a pack plan that all ranks share. Made by :func:`build_loader`.

    Every step has the same packs for any number of ranks; see `dealing.py` for who gets which.

    Args:
        plan: the packs of each step.
        sources: where the plan's samples are read, as it numbers them: main sources first, then auxiliary ones.
        source_names: what the log calls them.
        config: batch sizes, sequence length, workers, and the model that the batches are for.
        steps_available: steps that the plan holds.
        plan_key: hash of all that the order of the data depends on.
        dp_rank: this process's place among those that read different data.
        dp_size: number of those processes.

    Raises:
        ValueError: a batch is counted in packs, and the size of one is no multiple of the micro-batch size times
            `dp_size`.
    """

    def __init__(
        self,
        plan: StepPlan,
        sources: Sequence[Source],
        config: Config,
        *,
        source_names: tuple[str, ...],
        steps_available: int,
        plan_key: str,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.steps_available = steps_available
        """Steps that the plan holds."""
        self.plan_key = plan_key
        """Hash of all that the order of the data depends on; equal keys give equal batches."""
        self.source_names = source_names
        """What the log calls the sources."""
        self.gaps = KnownGaps()
        """What could not be read so far. Every count below is without it."""
        self.prefixes = tuple(source.name for source in sources)
        """Where the sources are, as the plan numbers them."""
        self._plan = plan
        schedule = config.schedule
        if schedule.batch_unit == "packs":
            sizes = schedule.micro_batch_size, dp_size
            sentence = check_batch(schedule.global_batch_size, *sizes) or check_levels(
                BatchSchedule.of(schedule), *sizes
            )
            if sentence is not None:
                raise ValueError(sentence)
        self._sampler = MicroBatchNumbers(plan, steps_available, schedule.micro_batch_size, dp_rank, dp_size)
        workers, skips_bad = config.data.num_workers, config.data.skip_bad_samples > 0
        empty_length = shortest_length(config)
        self._dataset = PackDataset(
            plan.packs, sources, config.data.seq_length, config.model, empty_length, skips_bad=skips_bad
        )
        # Where samples may be skipped, a step begins when all of it has been read.
        ahead = max(_PREFETCH, -(-self.most_micro_batches // workers) if skips_bad and workers else 0)
        if workers:
            end_workers_at_exit()
        # A generator of its own: otherwise starting to read would advance the global random state.
        self._loader = DataLoader(
            ErrorsAsValues(self._dataset),
            batch_size=None,
            sampler=self._sampler,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=ignore_stop_signals,
            persistent_workers=workers > 0,
            prefetch_factor=ahead if workers else None,
            pin_memory=config.run.device != "cpu" and torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def micro_batches_of(self, step: int) -> int:
        """Micro-batches of this rank in a step, empty ones included. Equal on all ranks."""
        return self._sampler.per_step.size(step)

    @property
    def fewest_micro_batches(self) -> int:
        """Those of the smallest step."""
        return min(self._sampler.per_step.sizes)

    @property
    def most_micro_batches(self) -> int:
        """Those of the largest step."""
        return max(self._sampler.per_step.sizes)

    @property
    def sequences(self) -> int:
        """Sequences of the largest step over all ranks, empty ones included."""
        return self.most_micro_batches * self._sampler.per_pass

    def micro_batches(self, first_step: int = 0) -> Iterator[Batch]:
        """All micro-batches from a step on, to the last step that is available.

        The batches of a step do not depend on where reading began. Only one iterator is alive at a time: a new call
        ends the one before it.
        """
        self._sampler.first_step = first_step
        return Received(iter(self._loader))

    def describe_step(self, step: int) -> tuple[str, ...]:
        """Names of the sources that this rank reads in a step."""
        packs = [pack for pack in self._sampler.packs_of(step) if pack != EMPTY]
        numbers = {source for pack in packs for items in self.plan.documents(pack) for source, _ in items}
        return tuple(self.source_names[number] for number in sorted(numbers))

    def numbers(self, step: int) -> list[list[int]]:
        """The packs of each of this rank's micro-batches in a step, for :meth:`packs`."""
        return self._sampler.of_step(step)

    def packs(self, numbers: Sequence[int], missing: Missing = MappingProxyType({})) -> Batch:
        """Some packs of the plan as one batch, apart from the iteration, without the documents in `missing`."""
        return self._dataset.read(numbers, missing)

    def describe(self, first_step: int, number: int) -> str:
        """What a micro-batch of this rank is of, in words: the step, counted from 1, and the step's sources.

        Args:
            first_step: where reading began.
            number: micro-batches that were read before it.
        """
        per_step = self._sampler.per_step
        step = per_step.step_at(per_step.before(first_step) + number)
        return f"step {step + 1}, source {', '.join(self.describe_step(step)) or 'none'}"

    def samples(self, numbers: Sequence[int]) -> list[tuple[str, int]]:
        """The samples in some packs, in order: name of the source (a prefix), number in it."""
        filled = [number for number in numbers if number != EMPTY]
        return [
            (self.prefixes[source], sample)
            for number in filled
            for document in self.plan.documents(number)
            for source, sample in document
        ]

    @property
    def plan(self) -> PackPlan:
        """Which documents stand in which packed sequence."""
        return self._plan.packs

    def counts(self, step: int) -> StepCounts:
        """Valid tokens in the whole global batch of a step, over all ranks."""
        return self.gaps.taken_off(self._plan.counts(step), self._plan.packs_of(step))

    def counts_before(self, step: int) -> StepCounts:
        """The same over all steps before this one; as quick for a late step as for an early one."""
        packs = range(self._plan.packs_of(step).start)
        return self.gaps.taken_off(self._plan.packs.counts(packs), packs)

    def counts_by_source(self, steps: range) -> IntArray:
        """What some steps hold of each source, over all ranks; see :func:`data.source_counts.counts_by_source`."""
        packs = range(self._plan.packs_of(steps.start).start, self._plan.packs_of(steps.stop).start)
        counts_NC = counts_by_source(self._plan.packs, packs, len(self.source_names))
        return self.gaps.taken_off_sources(counts_NC, packs)


_PREFETCH = 4
"""Micro-batches that each worker keeps ready: enough to hide one that takes a few times as long as the others."""


def _unchanged(batch: Any) -> Any:
    return batch


def shortest_length(config: Config) -> int:
    """Length of the sequences of a micro-batch without any document: the shortest that all ranks can share.

    A pipeline's messages have one shape, so it takes whole sequences.
    """
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size > 1:
        return config.data.seq_length
    return parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def build_loader(
    paths: tuple[str, ...],
    config: Config,
    *,
    num_steps: int,
    dp_rank: int,
    dp_size: int,
    aux_paths: tuple[str, ...] = (),
    shares: tuple[list[SourceShare], list[SourceShare]] | None = None,
    shuffle: bool = True,
    barrier: Callable[[], None] | None = None,
    is_builder: bool | None = None,
) -> BatchLoader:
    """Open the data, check it against the configuration, and plan it.

    Args:
        paths: one prefix, or weight-prefix pairs. Not read with `config.data.mock_data`.
        config: model, data, schedule and seed.
        num_steps: steps that will be asked for.
        dp_rank: this process's place among those that read different data.
        dp_size: number of those processes.
        aux_paths: auxiliary samples to join (stage 1), in the same form. Not read with mock data either.
        shares: main and auxiliary sources that are open already (`data.mixture_sources`), in place of paths.
        shuffle: True for training: as many shuffled epochs as the steps need. False for evaluation: the samples of one
            epoch in order, each once whatever the weights, in batches of --global-batch-size. Then `steps_available` is
            at most what the epoch holds; the last global batch is filled up with empty packs, which are counted
            nowhere, so that no sample counts twice.
        barrier: waits for all processes; without it, each process builds what it does not find.
        is_builder: whether this process builds the plan; default: data-parallel rank 0, or every process if there is
            no barrier.

    Returns:
        The loader of this process.

    Raises:
        ValueError: a file is missing or truncated, data made with another tokenizer, token ids outside the vocabulary,
            a sample longer than the sequence, or batch sizes that do not divide.
    """
    in_samples = config.schedule.batch_unit == "samples"
    batches = BatchSchedule(config.schedule.global_batch_size, config.schedule.rampup_batch_size if shuffle else ())
    settings = PlanSettings(
        seed=config.run.seed,
        seq_length=config.data.seq_length,
        packing=config.data.packing,
        shuffle=shuffle,
        skip_long_samples=config.data.skip_long_samples,
        step_samples=batches.full if in_samples else None,
        rampup=batches.ramp if in_samples else (),
    )
    # An evaluation reads the first epoch only.
    needed = batches.before(max(1, num_steps)) if shuffle else 1
    started = time.monotonic()
    if config.data.mock_data:
        mock_seed = settings.seed if shuffle else settings.seed + 1
        mock = MockSource(config.model.vocab_size, config.model.vision, settings.seq_length, mock_seed)
        inputs = PlanInputs([SourceShare(mock)], [], config.model.vision, settings)
        plan = _mock_plan(inputs, needed)
    else:
        main, aux = shares or (open_sources(paths, config), open_sources(aux_paths, config))
        inputs = PlanInputs(main, aux, config.model.vision, settings)
        _check_one_tokenizer([share.source for share in inputs.main + inputs.aux])
        first_prefix = Path(inputs.main[0].source.name)
        cache = Path(config.data.data_cache_path) if config.data.data_cache_path else first_prefix.parent / _CACHE
        plan = cached_plan(
            inputs,
            cache,
            min_packs=1 if in_samples else needed,
            min_documents=needed if in_samples else 0,
            is_builder=(dp_rank == 0 or barrier is None) if is_builder is None else is_builder,
            barrier=barrier or (lambda: None),
        )
    steps = StepPlan(plan, batches, in_samples=in_samples)
    _report(steps, inputs, time.monotonic() - started)
    return BatchLoader(
        steps,
        [share.source for share in inputs.main + inputs.aux],
        config,
        source_names=source_labels(inputs.main, inputs.aux),
        plan_key=inputs.key,
        steps_available=num_steps if shuffle else min(num_steps, steps.num_steps),
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


_CACHE = "pack_plan_cache"


def _mock_plan(inputs: PlanInputs, documents: int) -> PackPlan:
    """One epoch over and over; behind a ramp every epoch has its own steps, so as many as hold the documents."""
    sizes, settings = inputs.blend(), inputs.settings
    epochs = [build_epoch(*sizes, settings, 0)]
    while settings.rampup and sum(epoch.num_documents for epoch in epochs) < documents:
        epochs.append(build_epoch(*sizes, settings, len(epochs)))
    return PackPlan(epochs, cycle=settings.shuffle and not settings.rampup)


def parse_blend(paths: tuple[str, ...]) -> list[tuple[float, str]]:
    """Read `PREFIX` or `WEIGHT PREFIX WEIGHT PREFIX ...`.

    Raises:
        ValueError: anything else, or a weight that is not positive.
    """
    if len(paths) == 1:
        return [(1.0, paths[0])]
    if len(paths) % 2:
        raise ValueError(f"data paths must be one prefix or pairs of weight and prefix, got {' '.join(paths)!r}")
    pairs = []
    for weight, prefix in zip(paths[::2], paths[1::2], strict=True):
        try:
            value = float(weight)
        except ValueError as error:
            raise ValueError(f"{weight!r} before {prefix!r} is not a weight; give WEIGHT PREFIX pairs") from error
        if not 0 < value < float("inf"):
            raise ValueError(f"the weight {weight} of {prefix!r} must be positive")
        pairs.append((value, prefix))
    return pairs


def open_sources(paths: tuple[str, ...], config: Config) -> list[SourceShare]:
    """Open preprocessed data and check it against the model and its tokenizer.

    Raises:
        ValueError: see :func:`build_loader`.
    """
    if not paths:
        return []
    return [SourceShare(open_source(prefix, config), weight) for weight, prefix in parse_blend(paths)]


def open_source(prefix: str, config: Config) -> IndexedSource:
    """Open one prefix and check it against the model and its tokenizer.

    Raises:
        ValueError: see :func:`build_loader`.
    """
    source = IndexedSource(prefix)
    recorded, model = source.manifest.tokenizer_fingerprint, config.data.tokenizer_model
    if model is not None and not same_tokenizer(recorded, _fingerprint(model)):
        raise ValueError(
            f"{prefix} was preprocessed with another tokenizer (fingerprint {shorten(recorded)}) than "
            f"--tokenizer-model {model} ({shorten(_fingerprint(model))}); preprocess it again with this one"
        )
    if (blind := blind_spot(recorded)) is not None:
        logger.info(f"{prefix}: {blind}")
    largest = source.manifest.counts.largest_token_id
    if largest >= config.model.vocab_size:
        raise ValueError(f"{prefix} contains the token id {largest}, outside of --vocab-size {config.model.vocab_size}")
    return source


# Read once for all the prefixes of a run.
@lru_cache(maxsize=1)
def _fingerprint(tokenizer_model: str) -> str:
    return load_tokenizer(tokenizer_model).fingerprint


def _check_one_tokenizer(sources: list[Source]) -> None:
    """Refuse data of two tokenizers, because a run would silently train on nonsense."""
    opened = [source.inner if isinstance(source, NarrowedSource) else source for source in sources]
    indexed = [source for source in opened if isinstance(source, IndexedSource)]
    # All pairs: two of today's fingerprints may differ where both agree with an old one.
    for one, other in combinations(indexed, 2):
        if not same_tokenizer(one.manifest.tokenizer_fingerprint, other.manifest.tokenizer_fingerprint):
            raise ValueError(
                f"{one.name} and {other.name} were preprocessed with different tokenizers; preprocess one of them again"
            )


def _report(plan: StepPlan, inputs: PlanInputs, seconds: float) -> None:
    epochs = plan.packs.epochs
    first, totals = epochs[0], step_counts(epochs[0].cumulative[-1])
    fill = totals.tokens / (first.num_packs * inputs.settings.seq_length)
    logger.info(
        f"pack plan: {totals.documents} documents in {first.num_packs} packs per epoch ({100 * fill:.1f} % filled), "
        f"{len(epochs)} epochs planned, {seconds:.1f} s"
    )
    if inputs.settings.step_samples is not None:
        mean = sum(epoch.num_packs for epoch in epochs) / plan.num_steps
        ramp = f"{inputs.settings.rampup[0]} to " if inputs.settings.rampup else ""
        logger.info(
            f"pack plan: {ramp}{inputs.settings.step_samples} documents per step in {mean:.1f} packs on average, "
            f"{max(plan.most_packs.sizes)} at most"
        )
    if first.stats["skipped_long"]:
        limit = inputs.settings.seq_length
        logger.info(f"pack plan: {first.stats['skipped_long']} samples left out, longer than {limit} tokens")
    if inputs.aux:
        logger.info(
            f"pack plan: {first.stats['not_joined']} main samples not joined: too long with an auxiliary sample"
        )
