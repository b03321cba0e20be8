"""Micro-batches by pack numbers, in the processes that load data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.dataset import Document, collate, lay_out_document
from megatron_haplovl.data.gaps import BadDocument, Gap, Missing
from megatron_haplovl.data.plan.dealing import EMPTY
from megatron_haplovl.data.plan.packs import PackPlan
from megatron_haplovl.data.sources import Source
from megatron_haplovl.data.steady_file import ChangedFileError

Items = list[tuple[int, int]]
"""The samples of a document: source and number of each."""


class PackDataset(Dataset[Batch]):
    """Micro-batches by lists of pack numbers. Reading is deterministic: the same numbers give the same batch.

    Args:
        plan: the documents of each pack.
        sources: where samples are read, as the plan numbers them.
        seq_length: length of a sequence.
        model: what the batches are for.
        empty_length: length of the sequences of a micro-batch without any document.
        skips_bad: leave a document out that cannot be read, and say so in `Batch.gaps`; otherwise it is an error.
    """

    def __init__(
        self,
        plan: PackPlan,
        sources: Sequence[Source],
        seq_length: int,
        model: ModelConfig,
        empty_length: int,
        *,
        skips_bad: bool = False,
    ) -> None:
        self._plan, self._sources = plan, sources
        self._seq_length, self._empty_length = seq_length, empty_length
        self._vision, self._image_attention = model.vision, model.image_attention
        self._skips_bad = skips_bad

    def __getitem__(self, packs: Sequence[int]) -> Batch:
        return self.read(packs, {})

    def read(self, packs: Sequence[int], missing: Missing) -> Batch:
        """Some packs as one batch, without the documents in `missing`.

        Raises:
            ValueError: a document cannot be read, and none may be skipped.
            ChangedFileError: a file is not what it was when the run opened it.
            OSError: a file cannot be read.
        """
        read = [self._pack(pack, missing.get(pack, ())) for pack in packs]
        documents = [documents for documents, _ in read]
        length = self._seq_length if any(documents) else self._empty_length
        batch = collate(documents, length, self._vision, self._image_attention, len(self._sources))
        return dataclasses.replace(batch, packs=tuple(packs), gaps=tuple(gap for _, gap in read if gap is not None))

    def _pack(self, pack: int, missing: tuple[BadDocument, ...]) -> tuple[list[Document], Gap | None]:
        documents: list[Document] = []
        bad = list(missing)
        if pack == EMPTY:
            return documents, None
        left_out = {document.place for document in missing}
        planned = self._plan.documents(pack)
        for place, (items, counts) in enumerate(zip(planned, self._plan.item_counts(pack), strict=True)):
            if place in left_out:
                continue
            try:
                documents.append(self._document(items, tuple(np.sum(counts, axis=0).tolist())))
            except ChangedFileError:
                raise
            except ValueError as error:
                if not self._skips_bad:
                    where = ", ".join(f"{self._sources[source].name} sample {sample}" for source, sample in items)
                    raise ValueError(f"{where}: {error}") from error
                rows = tuple((source, *row) for (source, _), row in zip(items, counts, strict=True))
                bad.append(BadDocument(place, tuple(self._unreadable(items)), str(error), rows))
        for source in {source for items in planned for source, _ in items}:
            self._sources[source].check_files()
        if not bad:
            return documents, None
        tokens = self._plan.counts(range(pack, pack + 1)).tokens - sum(len(document.tokens) for document in documents)
        return documents, Gap(pack, tuple(sorted(bad, key=lambda document: document.place)), tokens)

    def _document(self, items: Items, planned: tuple[int, ...]) -> Document:
        samples = [self._sources[source].read(sample) for source, sample in items]
        document = lay_out_document(samples, self._vision, [source for source, _ in items])
        found = (
            int((document.labels != IGNORE_INDEX).sum()),
            int(document.is_text.sum()),
            len(document.patch_target),
        )
        # The losses are divided by what was planned.
        if found != planned:
            raise ValueError(
                f"it has {found[0]} trained tokens, {found[1]} of text and {found[2]} patches, the pack plan counted "
                f"{planned[0]}, {planned[1]} and {planned[2]}; haplovl-verify finds what is damaged"
            )
        return document

    def _unreadable(self, items: Items) -> Items:
        """Which samples of a document cannot be read; all of them, if each can be by itself."""
        return [item for item in items if not self._is_readable(item)] or items

    def _is_readable(self, item: tuple[int, int]) -> bool:
        source, sample = item
        try:
            lay_out_document([self._sources[source].read(sample)], self._vision)
        except ValueError:
            return False
        return True


class ErrorsAsValues(Dataset["Batch | Exception"]):
    """Micro-batches, and errors in their places.

    torch's loader would make a traceback of an error in another process, and no sentence.

    Args:
        inner: what makes the micro-batches.
    """

    def __init__(self, inner: PackDataset) -> None:
        self._inner = inner

    def __getitem__(self, packs: Sequence[int]) -> Batch | Exception:
        try:
            return self._inner[packs]
        except (ValueError, OSError) as error:
            return error


class Received(Iterator[Batch]):
    """The micro-batches of a loader of :class:`ErrorsAsValues`; an error is raised where it arrives."""

    def __init__(self, received: Iterator[Batch | Exception]) -> None:
        self._received = received

    def __next__(self) -> Batch:
        found = next(self._received)
        if isinstance(found, Exception):
            raise found
        return found
