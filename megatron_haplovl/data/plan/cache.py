"""Pack plans on disk: one folder for each plan, named by a hash of all that the plan depends on, with its epochs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.plan.epoch import BlendedSource, IntArray, PlanSettings, build_epoch
from megatron_haplovl.data.plan.packs import EpochPlan, PackPlan
from megatron_haplovl.data.sources import Source

logger = logging.getLogger(__name__)

# Rises when the same inputs would give another plan, or other files.
_ALGORITHM = 3
_MAPPED_FROM = 2**20  # bytes
_ARRAYS = ("items", "item_counts", "doc_offsets", "pack_offsets", "step_offsets", "cumulative")


@dataclasses.dataclass(frozen=True)
class SourceShare:
    """A source, which of its samples a plan draws, and how often. See :class:`BlendedSource`."""

    source: Source
    weight: float | None = 1.0
    epochs: float | None = None
    selection: str | None = None
    """Says which samples `samples` are, for the plan's hash."""
    samples: IntArray | None = None
    label: str | None = None
    """Name in log columns; None: made of the prefix. No part of the plan."""

    def __post_init__(self) -> None:
        assert (self.selection is None) == (self.samples is None)

    @property
    def key(self) -> list[Any]:
        """All that the plan depends on."""
        return [self.source.content_hash, self.weight, self.epochs, self.selection]

    def blended(self, vision: VisionConfig) -> BlendedSource:
        """With the sizes of all samples; reads the data once."""
        return BlendedSource(self.source.name, self.weight, self.source.counts(vision), self.samples, self.epochs)


@dataclasses.dataclass(frozen=True)
class PlanInputs:
    """The sources of a plan with their shares."""

    main: list[SourceShare]
    aux: list[SourceShare]
    vision: VisionConfig
    settings: PlanSettings

    @property
    def key(self) -> str:
        """Hash of everything that the plan depends on."""
        parts = {
            "algorithm": _ALGORITHM,
            "main": [share.key for share in self.main],
            "aux": [share.key for share in self.aux],
            "vision": dataclasses.asdict(self.vision),
            "settings": _settings_key(self.settings),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def blend(self) -> tuple[list[BlendedSource], list[BlendedSource]]:
        """The sizes of all samples; reads the data once."""
        return [share.blended(self.vision) for share in self.main], [share.blended(self.vision) for share in self.aux]


def _settings_key(settings: PlanSettings) -> dict[str, Any]:
    key = dataclasses.asdict(settings)
    if not settings.rampup:
        # Plans without a ramp are those of versions that knew none.
        del key["rampup"]
    return key


@dataclasses.dataclass(frozen=True)
class StoredEpoch(EpochPlan):
    """An epoch from its files; large ones are mapped."""

    folder: Path

    def __reduce__(self) -> tuple[Callable[[Path], StoredEpoch], tuple[Path]]:
        # A process that loads data opens the files itself; pickling a map would copy the whole file.
        return load_epoch, (self.folder,)


def cached_plan(
    inputs: PlanInputs,
    cache: Path,
    *,
    min_packs: int = 1,
    min_documents: int = 0,
    is_builder: bool,
    barrier: Callable[[], None],
) -> PackPlan:
    """Load as many epochs as are needed, building those that are not in the cache.

    Args:
        inputs: what the plan depends on.
        cache: folder that holds the plans.
        min_packs: packs that will be asked for.
        min_documents: documents that will be asked for.
        is_builder: whether this process builds; the others wait in `barrier` until it has. Several builders may share a
            folder.
        barrier: called once by every process.

    Raises:
        ValueError: a sample is too long, or the folder cannot be written.
    """
    folder = cache / inputs.key

    def are_missing(epochs: list[EpochPlan]) -> bool:
        packs, documents = sum(epoch.num_packs for epoch in epochs), sum(epoch.num_documents for epoch in epochs)
        return packs < min_packs or documents < min_documents

    if is_builder:
        _build_missing(inputs, folder, are_missing)
    barrier()
    epochs: list[EpochPlan] = []
    while are_missing(epochs):
        path = _epoch_folder(folder, len(epochs))
        if not path.is_dir():
            raise ValueError(f"{path} was not found after building; --data-cache-path must be shared by all processes")
        epochs.append(load_epoch(path))
    return PackPlan(epochs)


def _build_missing(inputs: PlanInputs, folder: Path, are_missing: Callable[[list[EpochPlan]], bool]) -> None:
    epochs: list[EpochPlan] = []
    sizes: tuple[list[BlendedSource], list[BlendedSource]] | None = None
    while are_missing(epochs):
        number = len(epochs)
        path = _epoch_folder(folder, number)
        if not path.is_dir():
            sizes = sizes or inputs.blend()
            plan = build_epoch(*sizes, inputs.settings, number)
            _save_epoch(plan, path)
            logger.info(f"pack plan: built epoch {number} ({plan.num_packs} packs) in {folder}")
        epochs.append(load_epoch(path))


def _epoch_folder(folder: Path, number: int) -> Path:
    return folder / f"epoch_{number:05d}"


def _save_epoch(plan: EpochPlan, path: Path) -> None:
    """Write aside and rename, so that a folder with the final name is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ValueError(f"the pack plan cannot be written to {path.parent}: {error}; see --data-cache-path") from error
    try:
        for name in _ARRAYS:
            np.save(aside / f"{name}.npy", getattr(plan, name), allow_pickle=False)
        (aside / "stats.json").write_text(json.dumps(plan.stats), encoding="utf-8")
        aside.chmod(0o755)
        try:
            os.rename(aside, path)
        except OSError:
            if not path.is_dir():
                raise
            # Another builder was first; its plan is the same.
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_epoch(path: Path) -> StoredEpoch:
    """An epoch from its folder.

    Raises:
        ValueError: its files are damaged.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        for name in _ARRAYS:
            file = path / f"{name}.npy"
            # Every map keeps a file open, and a long run over little data has thousands of epochs.
            is_large = file.stat().st_size >= _MAPPED_FROM
            arrays[name] = np.load(file, mmap_mode="r" if is_large else None, allow_pickle=False)
        stats = json.loads((path / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the cached pack plan {path} is damaged ({error}); delete the folder to rebuild") from error
    return StoredEpoch(stats=stats, folder=path, **arrays)
