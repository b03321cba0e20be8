"""From samples to the files of a prefix. Checksums are computed while the files are written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.hashed_files import write_array
from megatron_haplovl.data.indexed_dataset import IndexedDatasetWriter
from megatron_haplovl.data.manifest import Counts, FileEntry, Manifest, Origin
from megatron_haplovl.data.preprocessing.media import FoundImage, FoundVideo
from megatron_haplovl.data.preprocessing.processor import BadRecord, ProcessedSample, ProcessorSettings, RecordProcessor
from megatron_haplovl.data.records import RawRecord
from megatron_haplovl.data.sample_hash import sample_hash

SUMS = ("samples", "text_only_samples", "tokens", "loss_tokens", "image_references", "image_bytes", "videos")
"""Counts of the manifest that add up over samples."""


class PrefixFiles:
    """The files of a prefix, open for writing, and what its manifest will say. A context manager.

    A subclass has the method that completes them; without it there is no manifest.
    """

    def __init__(self, prefix: str | Path) -> None:
        self._prefix = str(prefix)
        self._stack = ExitStack()
        self._image_ids: dict[bytes, int] = {}
        self._totals: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()
        self._unread_keys: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._longest = 0
        self._largest_id = 0

    def __enter__(self) -> Self:
        def pair(part: str, dtype: npt.DTypeLike, is_hashed: bool = True) -> IndexedDatasetWriter:
            return self._stack.enter_context(IndexedDatasetWriter(self._prefix + part, dtype, is_hashed=is_hashed))

        self._tokens = pair(names.TOKENS, np.int32)
        self._loss_mask = pair(names.LOSS_MASK, np.uint8)
        self._images = pair(names.IMAGES, np.uint8, is_hashed=False)
        self._image_refs = pair(names.IMAGE_REFS, np.int32)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def num_samples(self) -> int:
        """Samples added so far."""
        return self._totals["samples"]

    def _complete(self, arrays: Mapping[str, npt.NDArray], origin: Origin, num_frames: int | None) -> Manifest:
        """Complete all files and write the manifest, last.

        Args:
            arrays: those of the `.npy` files, by suffix.
            origin: what made the samples.
            num_frames: frames of a video; left out of the manifest if there are no videos.
        """
        counts = Counts(
            images=len(self._image_ids),
            longest_sample=self._longest,
            largest_token_id=self._largest_id,
            **{name: self._totals[name] for name in SUMS},
        )
        self._stack.close()
        entries = {suffix: write_array(Path(self._prefix + suffix), array) for suffix, array in arrays.items()}
        pairs = {
            names.TOKENS: self._tokens,
            names.LOSS_MASK: self._loss_mask,
            names.IMAGES: self._images,
            names.IMAGE_REFS: self._image_refs,
        }
        for part, writer in pairs.items():
            entries[f"{part}.bin"], entries[f"{part}.idx"] = writer.entries
        # Over the digests of the images, so that nobody reads them again.
        images = f"{names.IMAGES}.bin"
        digest = hashlib.sha256(arrays[names.IMAGE_DIGESTS].tobytes()).hexdigest()
        entries[images] = FileEntry(entries[images].bytes, digest)
        manifest = Manifest(
            format_version=names.FORMAT_VERSION,
            tokenizer_fingerprint=origin.tokenizer_fingerprint,
            image_token_id=origin.image_token_id,
            video_token_id=origin.video_token_id,
            chat_template=origin.chat_template,
            chat_template_sha256=origin.chat_template_sha256,
            counts=counts,
            skipped=dict(sorted(self._skipped.items())),
            files={suffix: entries[suffix] for suffix in names.DATA_SUFFIXES},
            repairs=dict(sorted(self._repairs.items())),
            unread_keys=dict(sorted(self._unread_keys.items())),
            left_out=dict(sorted(self._left_out.items())),
            num_frames=num_frames if counts.videos else None,
        )
        manifest.write(Path(self._prefix + names.MANIFEST_SUFFIX))
        return manifest


class PrefixWriter(PrefixFiles):
    """Writes samples as they come. Without :meth:`finish` there is no manifest.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(prefix)
        self._sizes: list[tuple[int, int]] = []
        self._lm_tokens: list[int] = []
        self._hashes: list[int] = []

    def add(self, sample: ProcessedSample, placeholder_ids: tuple[int, int]) -> None:
        """Append a sample, and those of its images that are new.

        Raises:
            ValueError: an image file has changed since it was looked at.
        """
        token_ids, loss_mask = sample.conversation.token_ids, sample.conversation.loss_mask
        self._tokens.add(token_ids)
        self._loss_mask.add(loss_mask)
        references: list[int] = []
        for visual in sample.visuals:
            if isinstance(visual, FoundVideo):
                references.append(-len(visual.frames))
            references += map(self._image_id, visual.images)
        self._image_refs.add(references)
        self._lm_tokens.append(int(loss_mask[1:].sum()))
        self._hashes.append(sample_hash(token_ids, [image.digest for image in sample.images]))
        self._totals.update(
            samples=1,
            tokens=len(token_ids),
            loss_tokens=int(loss_mask.sum()),
            image_references=sum(1 for _ in sample.images),
            videos=sum(isinstance(visual, FoundVideo) for visual in sample.visuals),
            text_only_samples=int(not sample.visuals),
        )
        self._repairs.update(sample.repairs)
        self._unread_keys.update(sample.unread_keys)
        self._left_out.update({name for image in sample.images for name in image.left_out})
        # np.isin would cost as much as all the rest of this function.
        text = token_ids[(token_ids != placeholder_ids[0]) & (token_ids != placeholder_ids[1])]
        self._longest = max(self._longest, len(token_ids))
        self._largest_id = max(self._largest_id, int(text.max(initial=0)))

    def _image_id(self, image: FoundImage) -> int:
        known = self._image_ids.get(image.digest)
        if known is not None:
            return known
        data = image.read()
        self._images.add(np.frombuffer(data, dtype=np.uint8))
        self._sizes.append((image.height, image.width))
        self._totals["image_bytes"] += len(data)
        self._image_ids[image.digest] = len(self._image_ids)
        return self._image_ids[image.digest]

    def finish(self, origin: Origin, num_frames: int, skipped: Mapping[str, int]) -> Manifest:
        """Complete the files and write the manifest, last.

        Args:
            origin: what made the samples.
            num_frames: frames that are taken of a video.
            skipped: records left out, by reason.
        """
        self._skipped.update(skipped)
        arrays: dict[str, npt.NDArray] = {
            names.IMAGE_SIZES: np.array(self._sizes, dtype=np.int32).reshape(-1, 2),
            names.IMAGE_DIGESTS: np.frombuffer(b"".join(self._image_ids), dtype=np.uint8).reshape(-1, 32),
            names.SAMPLE_LM_TOKENS: np.array(self._lm_tokens, dtype=np.int32),
            names.SAMPLE_HASHES: np.array(self._hashes, dtype=np.uint64),
        }
        return self._complete(arrays, origin, num_frames)


def write_prefix(prefix: str, records: Iterable[RawRecord], settings: ProcessorSettings) -> Manifest:
    """Preprocess a few records in this process, for tests and examples; `haplovl-preprocess` is for data sets.

    Raises:
        ValueError: a record cannot be used, or the settings cannot.
    """
    processor = RecordProcessor(settings)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with PrefixWriter(prefix) as writer:
        for raw in records:
            result = processor.process(raw)
            if isinstance(result, BadRecord):
                raise ValueError(f"{result.location} cannot be used: {result.reason}: {result.detail}")
            for sample in result:
                writer.add(sample, processor.tokenizer.placeholder_ids)
        return writer.finish(processor.origin, processor.num_frames, {})
