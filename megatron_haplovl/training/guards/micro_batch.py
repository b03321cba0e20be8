"""A micro-batch of a step by name: whose it is, which samples it holds; and its copy for whoever looks at it later."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_haplovl.data.batch import Batch
from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.parallel.groups import ParallelGroups

_NAMED_SAMPLES = 8
"""Samples that a sentence names; the copy's JSON file names all of them."""
_KEPT = 20
"""Copies that a folder holds at most, because a run that spikes in every step must not fill the disk."""


@dataclass(frozen=True)
class MicroBatchName:
    """One rank's micro-batch."""

    step: int
    """Counted from 1, as in the log."""
    index: int
    """Counted from 0."""
    number: int
    """Micro-batches of a rank in a step."""
    rank: int
    host: str
    data_rank: int
    """Ranks with the same one read the same micro-batches."""
    packs: tuple[int, ...]
    samples: tuple[tuple[str, int], ...]
    """Prefix, and number of the sample in it."""

    @property
    def words(self) -> str:
        """For a sentence."""
        named = groupby(self.samples[:_NAMED_SAMPLES], key=lambda sample: sample[0])
        parts = [f"{prefix} sample {', '.join(str(number) for _, number in found)}" for prefix, found in named]
        rest = len(self.samples) - _NAMED_SAMPLES
        samples = "; ".join(parts) + (f" and {rest} more" if rest > 0 else "")
        return (
            f"rank {self.rank} on {self.host}, micro-batch {self.index + 1} of {self.number} "
            f"({samples or 'without samples'})"
        )


class StepData:
    """A step's micro-batches once more.

    Args:
        loader: the training data.
        groups: every process group.
        reads_data: whether this rank needs batches.
    """

    def __init__(self, loader: BatchLoader, groups: ParallelGroups, *, reads_data: bool) -> None:
        self._loader, self._groups, self._reads_data = loader, groups, reads_data

    def name(self, step: int, index: int, rank: int) -> MicroBatchName:
        """A rank's micro-batch by name. Called by every rank.

        Args:
            step: counted from 0.
            index: of the micro-batch, counted from 0.
            rank: whose it is.
        """
        mine = None
        if self._groups.world.rank == rank:
            numbers = self._loader.numbers(step)
            mine = MicroBatchName(
                step=step + 1,
                index=index,
                number=len(numbers),
                rank=rank,
                host=socket.gethostname(),
                data_rank=self._groups.data.rank,
                packs=tuple(numbers[index]),
                samples=tuple(self._loader.samples(numbers[index])),
            )
        return self._groups.control.gather_objects(mine)[rank]

    def read(self, step: int, index: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches of a step (counted from 0), or one of them; none on a rank that needs none."""
        numbers = self._loader.numbers(step) if self._reads_data else []
        return map(self._packs, numbers if index is None else numbers[index : index + 1])

    def keep(self, name: MicroBatchName, folder: Path, facts: dict[str, Any]) -> str:
        """Write a micro-batch for whoever looks at it later. Called by every rank.

        Args:
            name: which one.
            folder: receives a safetensors file with the batch's tensors and a JSON file with everything else.
            facts: what else is to be in the JSON file.

        Returns:
            For a sentence: where it is, or why it is nowhere.
        """
        place, answer = self._groups, None
        # All ranks of one data rank read the same, those of the first stage in any case.
        if place.data.rank == name.data_rank and not (place.pipeline.rank or place.context.rank or place.tensor.rank):
            batch = self._packs(name.packs)
            answer = _keep(batch, name, folder, facts)
        return next(found for found in place.control.gather_objects(answer) if found is not None)

    def _packs(self, numbers: Sequence[int]) -> Batch:
        # What any rank could not read, no rank has trained on.
        missing = {gap.pack: gap.documents for gap in self._loader.gaps.all()}
        return self._loader.packs(numbers, missing)


def _keep(batch: Batch, name: MicroBatchName, folder: Path, facts: dict[str, Any]) -> str:
    path = folder / f"step{name.step}-rank{name.rank}-micro-batch{name.index + 1}.safetensors"
    tensors = {key: value.contiguous() for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    samples = [{"prefix": prefix, "sample": number} for prefix, number in name.samples]
    record = {**dataclasses.asdict(name), "samples": samples, **facts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and len(list(folder.glob("step*-rank*-micro-batch*.safetensors"))) >= _KEPT:
            return f"the micro-batch is not kept, because {folder} has {_KEPT} of them; delete some"
        save_file(tensors, path)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        return f"the micro-batch could not be kept ({error})"
    return f"the micro-batch is in {path}"
