"""Samples that cannot be read (--skip-bad-samples): all ranks leave out the same ones, each is named and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.batch import Batch
from megatron_haplovl.data.gaps import BadDocument, Gap, gaps_from_json, gaps_to_json
from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.operation.endings import ExitCode, RunEnd
from megatron_haplovl.parallel.groups import Group

logger = logging.getLogger(__name__)

_NAMED = 20
"""Samples that a sentence names; all of them are in the file."""


class BadSamples:
    """The samples that the run could not read so far. Equal on every rank.

    Args:
        config: of the run.
        control: all ranks, on the host.
    """

    def __init__(self, config: Config, control: Group) -> None:
        self._limit, self._control = config.data.skip_bad_samples, control
        save = config.checkpoint.save
        self._file = None if save is None else Path(save) / "debug" / "bad_samples.jsonl"
        self._reasons: dict[tuple[str, int], str] = {}

    def columns(self) -> dict[str, int]:
        """For the log line: samples that were skipped so far, each counted once; nothing where none may be."""
        return {"number of skipped samples": len(self._reasons)} if self._limit else {}

    def settle(self, data: BatchLoader, batches: Iterator[Batch], number: int, step: int) -> Iterator[Batch]:
        """Read the next micro-batches and agree with all ranks on what is missing in them. Called by every rank.

        `data` knows the gaps afterwards, so that its counts are those of what was read. Nothing is read beforehand and
        nothing is said to other ranks where no sample may be skipped.

        Args:
            data: where the batches are from.
            batches: this rank's; none on a rank that reads no data.
            number: how many are taken.
            step: optimizer steps done.

        Returns:
            These micro-batches.

        Raises:
            RunEnd: more samples than --skip-bad-samples allows cannot be read.
        """
        if self._limit == 0:
            return batches
        agreed, gaps = self._agree(data, list(islice(batches, number)))
        if gaps:
            data.gaps.add(gaps)
            self._add(data, gaps, step)
        return iter(agreed)

    def _agree(self, data: BatchLoader, batches: list[Batch]) -> tuple[list[Batch], list[Gap]]:
        """Batches without what any rank could not read, and the gaps of all ranks.

        Ranks that share a pack (tensor, context and pipeline parallelism) must have the same batch, and a network file
        system may have failed one of them only.
        """
        missing: dict[int, tuple[BadDocument, ...]] = {}

        def fits(batch: Batch) -> bool:
            places = {gap.pack: gap.places for gap in batch.gaps}
            return all(
                places.get(pack, frozenset()) == {document.place for document in missing.get(pack, ())}
                for pack in batch.packs
            )

        while self._is_any(not all(map(fits, batches))):
            for found in self._control.gather_objects([gap for batch in batches for gap in batch.gaps]):
                for gap in found:
                    known = {document.place: document for document in gap.documents}
                    known |= {document.place: document for document in missing.get(gap.pack, ())}
                    missing[gap.pack] = tuple(known[place] for place in sorted(known))
            batches = [batch if fits(batch) else data.packs(batch.packs, missing) for batch in batches]
        if not missing:
            return batches, []
        gathered = self._control.gather_objects([gap for batch in batches for gap in batch.gaps])
        by_pack = {gap.pack: gap for found in reversed(gathered) for gap in found}
        return batches, [by_pack[pack] for pack in sorted(by_pack)]

    def _is_any(self, here: bool) -> bool:
        return bool(self._control.sum(torch.tensor(int(here))).item())

    def _add(self, data: BatchLoader, gaps: list[Gap], step: int) -> None:
        new = []
        for document in (document for gap in gaps for document in gap.documents):
            for source, sample in document.samples:
                name = data.prefixes[source], sample
                if name not in self._reasons:
                    self._reasons[name] = document.reason
                    new.append({"step": step, "prefix": name[0], "sample": sample, "reason": document.reason})
        if self._control.rank == 0:
            self._report(new)
        if len(self._reasons) > self._limit:
            raise RunEnd(ExitCode.NEEDS_PERSON, self._too_many(), cause="bad samples", step=step)

    def _report(self, new: list[dict[str, Any]]) -> None:
        for found in new:
            logger.warning(
                f"skipped {found['prefix']} sample {found['sample']} after step {found['step']}: {found['reason']} "
                f"({len(self._reasons)} of at most {self._limit})"
            )
        if self._file is None or not new:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(found) + "\n" for found in new)
        except OSError as error:  # The log has the same, and a report ends no run.
            logger.warning(f"{self._file} cannot be written: {error}")

    def _too_many(self) -> str:
        named = [f"{prefix} sample {sample} ({reason})" for (prefix, sample), reason in self._reasons.items()]
        more = f"; and {len(named) - _NAMED} more, all in {self._file}" if len(named) > _NAMED else ""
        return (
            f"{len(named)} samples cannot be read, more than --skip-bad-samples {self._limit}: "
            f"{'; '.join(named[:_NAMED])}{more}. Preprocess the data again, or raise --skip-bad-samples"
        )

    def state(self, data: BatchLoader) -> dict[str, Any]:
        """What a resumed run must know, for a checkpoint.

        Args:
            data: the training data.
        """
        samples = [[prefix, sample, reason] for (prefix, sample), reason in self._reasons.items()]
        return {"bad_samples": samples, "gaps": gaps_to_json(data.gaps.all())}

    def resume(self, state: dict[str, Any], data: BatchLoader, where: Path) -> None:
        """Take over what :meth:`state` has said; a checkpoint of an older version says nothing.

        Args:
            state: what the checkpoint says.
            data: the training data, planned as in the run that saved it.
            where: the checkpoint, for messages.

        Raises:
            ValueError: it cannot be understood, or there are more samples than --skip-bad-samples allows.
        """
        try:
            self._reasons = {
                (str(prefix), int(sample)): str(reason) for prefix, sample, reason in state.get("bad_samples", ())
            }
            data.gaps.add(gaps_from_json(state.get("gaps", ())))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is damaged: what it says of skipped samples cannot be read: {error}") from error
        if self._limit and len(self._reasons) > self._limit:
            raise ValueError(self._too_many())
