"""The sources of a run, opened: those of `--data-path` and its neighbours, or those of a mixture (`--data-config`)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_haplovl.config.mixture import Mixture, MixtureSource, Sampling, Split, TileRule, parse_split
from megatron_haplovl.config.mixture_file import read_mixture
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.loader import open_source, parse_blend
from megatron_haplovl.data.plan.cache import SourceShare
from megatron_haplovl.data.selection import IntArray, needs_hashes, on_side, sampled
from megatron_haplovl.data.sources import IndexedSource, Source
from megatron_haplovl.data.tile_rule import NarrowedSource, narrowed


@dataclass(frozen=True)
class RunSources:
    """All sources of a run."""

    train: list[SourceShare]
    aux: list[SourceShare]
    """Stage 1: their samples are joined with those of `train`."""
    valid: list[SourceShare]
    """Empty if the run has nothing to evaluate on."""


def mixture_of(config: Config) -> Mixture | None:
    """The mixture that a run's settings name, if they do.

    Raises:
        ValueError: see :func:`config.mixture_file.read_mixture`.
    """
    if config.data.data_config is None:
        return None
    return read_mixture(config.data.data_config, config.data.data_var, os.environ)


def training_prefixes(config: Config) -> list[str]:
    """Prefixes of the preprocessed data that a run trains on, auxiliary samples left out."""
    mixture = mixture_of(config)
    if mixture is None:
        return [prefix for _, prefix in parse_blend(config.data.data_path)]
    return [mixture.prefix(source) for source in mixture.train]


def open_run_sources(config: Config) -> RunSources:
    """Open everything that a run reads, and select its samples.

    Raises:
        ValueError: data that is missing, damaged or does not fit the run (see `data.loader.build_loader`); a mixture
            that cannot be read, or that has sections which the stage does not; a side of the split without a sample.
    """
    data, mixture = config.data, mixture_of(config)
    if mixture is None:
        split = None
        train, aux, valid = (
            _of_flags(paths, config) for paths in (data.data_path, data.aux_data_path, data.valid_data_path)
        )
    else:
        if mixture.aux and not config.stage.has_teachers:
            raise ValueError(
                f"{mixture.file}: aux is joined with train in stage 1 (pretrain_haplovl.py) only; leave it out"
            )
        train, aux, valid = (
            _of_mixture(section, mixture, config) for section in (mixture.train, mixture.aux, mixture.valid)
        )
        split = mixture.split
    split = split if data.split is None else parse_split(data.split)
    if split is not None and valid:
        raise ValueError(f"--split and the section valid of {data.data_config} both say what is held out; keep one")
    held_out = [] if split is None else _side(train, split, "valid")
    return RunSources(
        train=_as_shares(train if split is None else _side(train, split, "train")),
        aux=_as_shares(aux if split is None else _side(aux, split, "train"), by_weight=True),
        valid=_as_shares(held_out or valid),
    )


@dataclass(frozen=True)
class _Opened:
    """A source and the numbers of its samples that take part."""

    source: IndexedSource
    label: str | None
    weight: float | None
    epochs: float | None
    tiles: TileRule
    samples: IntArray | None
    """None: all."""


def _of_flags(paths: tuple[str, ...], config: Config) -> list[_Opened]:
    blend = parse_blend(paths) if paths else []
    return [_Opened(open_source(prefix, config), None, weight, None, TileRule(), None) for weight, prefix in blend]


def _of_mixture(section: Sequence[MixtureSource], mixture: Mixture, config: Config) -> list[_Opened]:
    return [_open(entry, mixture, config) for entry in section]


def _open(entry: MixtureSource, mixture: Mixture, config: Config) -> _Opened:
    source = open_source(mixture.prefix(entry), config)
    try:
        narrowed(config.model.vision, entry.tiles)
    except ValueError as error:
        raise ValueError(f"{entry.where}: {entry.name}: {error}") from error
    samples = _sampled(source, entry.sampling, entry.cap)
    return _Opened(source, entry.name, entry.weight, entry.epochs, entry.tiles, samples)


def _sampled(source: IndexedSource, sampling: Sampling, cap: int | None) -> IntArray | None:
    total = source.num_samples
    hashes = source.hashes() if needs_hashes(total, sampling, cap) else None
    return sampled(total, sampling, cap, hashes)


def _side(opened: list[_Opened], split: Split, side: str) -> list[_Opened]:
    """The same sources with their samples on one side only, without those that have none there."""
    found = []
    for one in opened:
        is_here = on_side(one.source.hashes(), split, side)
        here = np.flatnonzero(is_here) if one.samples is None else one.samples[is_here[one.samples]]
        if len(here):
            found.append(dataclasses.replace(one, samples=here))
        elif side == "train":
            raise ValueError(f"{one.source.name}: the split leaves none of its samples to train on")
    if opened and not found:
        names = ", ".join(one.source.name for one in opened)
        raise ValueError(f"the split holds no sample of {names} out; hold out a larger share")
    return found


def _as_shares(opened: list[_Opened], *, by_weight: bool = False) -> list[SourceShare]:
    """What a plan takes. Without weights every sample is read once in an epoch, or as often as `epochs` says.

    Auxiliary samples are drawn as the main ones need them, so there `epochs` can only be a ratio between sources.
    """
    shares = []
    for one in opened:
        number = one.source.num_samples if one.samples is None else len(one.samples)
        weight, epochs = one.weight, one.epochs
        if weight is None and by_weight:
            weight, epochs = number * (1.0 if epochs is None else epochs), None
        elif weight is None and epochs is None:
            epochs = 1.0
        source: Source = one.source if one.tiles == TileRule() else NarrowedSource(one.source, one.tiles)
        selection = None if one.samples is None else hashlib.sha256(one.samples.astype("<i8").tobytes()).hexdigest()
        shares.append(SourceShare(source, weight, epochs, selection, one.samples, one.label))
    return shares
