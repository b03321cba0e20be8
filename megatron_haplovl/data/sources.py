"""Where samples come from: preprocessed files, or nowhere (`mock_source.py`). Both look the same to the pack plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.mixture import TileRule
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.array_file import ArrayFile, read_array
from megatron_haplovl.data.image_geometry import Frames, Picture
from megatron_haplovl.data.image_references import ImageReferences, segment_sums, split_references
from megatron_haplovl.data.indexed_dataset import IndexedDataset
from megatron_haplovl.data.manifest import Manifest, read_manifest
from megatron_haplovl.data.sample_hash import sample_hash
from megatron_haplovl.data.steady_file import ChangedFileError


@dataclass(frozen=True)
class EncodedImage:
    """An image as its file holds it."""

    data: bytes
    height: int
    width: int
    upright: bool = True
    """False where the size is that of the picture as stored, before its EXIF orientation; it is trained as it lies."""

    @property
    def shape(self) -> Picture:
        """What its layout depends on."""
        return Picture(self.height, self.width)

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """The images of its blocks."""
        return (self,)


@dataclass(frozen=True)
class EncodedVideo:
    """The frames that stand for a video."""

    frames: tuple[EncodedImage, ...]

    @property
    def shape(self) -> Frames:
        """What its layout depends on."""
        return Frames(len(self.frames))

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """The images of its blocks."""
        return self.frames


@dataclass(frozen=True)
class Sample:
    """One conversation, as preprocessed."""

    token_ids: npt.NDArray[np.int32]
    """`[n]`, one placeholder per image or video."""
    loss_mask: npt.NDArray[np.uint8]
    """`[n]`, 1 at tokens that are trained. The first token never is, because nothing predicts it."""
    is_visual: npt.NDArray[np.bool_]
    """`[n]`, True at placeholders."""
    visuals: tuple[EncodedImage | EncodedVideo, ...]
    """Images and videos in the order of the placeholders."""
    tiles: TileRule = TileRule()
    """Fewer tiles than the model's rule allows, if the sample's source says so."""


@dataclass(frozen=True)
class SampleCounts:
    """Sizes of all samples of a source, each `[num_samples]` int64. Names as in `data.batch.StepCounts`."""

    tokens: npt.NDArray[np.int64]
    """Length in the packed sequence: text, patches and newlines."""
    text_tokens: npt.NDArray[np.int64]
    patch_tokens: npt.NDArray[np.int64]
    """Newlines not counted."""
    lm_tokens: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int64]
    """Image tiles that are embedded."""
    visual_pairs: npt.NDArray[np.int64]
    """(query, key) pairs of the mixed mask that a causal mask would not have: those of an image with its later ones."""


class Source(Protocol):
    """Something with numbered samples whose sizes are known beforehand."""

    @property
    def name(self) -> str:
        """The prefix, for messages."""

    @property
    def content_hash(self) -> str:
        """Changes when any sample changes."""

    @property
    def num_samples(self) -> int:
        """Samples, whether they take part or not."""

    def counts(self, vision: VisionConfig) -> SampleCounts:
        """Sizes of all samples for a model that sees images in this way."""

    def read(self, index: int) -> Sample:
        """One sample."""

    def check_files(self) -> None:
        """Look whether a file has another size than when it was opened, which is no sample's fault."""


class IndexedSource:
    """The samples of one prefix written by haplovl-preprocess.

    Args:
        prefix: path without suffix.

    Raises:
        ValueError: a file is missing, truncated, or does not belong to the others.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.manifest: Manifest = read_manifest(prefix)
        self._tokens = IndexedDataset(prefix + names.TOKENS, np.int32)
        self._loss_mask = IndexedDataset(prefix + names.LOSS_MASK, np.uint8)
        self._images = IndexedDataset(prefix + names.IMAGES, np.uint8)
        self._image_refs = IndexedDataset(prefix + names.IMAGE_REFS, np.int32)
        self._image_sizes_I2 = ArrayFile(Path(prefix + names.IMAGE_SIZES), np.int32, (len(self._images), 2))
        if len(self._tokens) != self.manifest.counts.samples:
            raise ValueError(
                f"{prefix}: the manifest says {self.manifest.counts.samples} samples, its files have "
                f"{len(self._tokens)}; {_AGAIN}"
            )
        if len(self._tokens) != len(self._loss_mask):
            raise ValueError(f"{prefix}: {len(self._tokens)} samples have {len(self._loss_mask)} loss masks; {_AGAIN}")
        if len(self._image_refs) != len(self._tokens):
            raise ValueError(f"{prefix}: the image files belong to other data than the tokens; {_AGAIN}")

    @property
    def name(self) -> str:
        """The prefix."""
        return self._prefix

    @property
    def content_hash(self) -> str:
        """Changes when any sample changes."""
        return self.manifest.content_hash

    @property
    def num_samples(self) -> int:
        """Samples, whether they take part or not."""
        return self.manifest.counts.samples

    def counts(self, vision: VisionConfig) -> SampleCounts:
        """Sizes of all samples.

        Raises:
            ValueError: a sample refers to an image that does not exist, or its loss mask has another length.
        """
        if not np.array_equal(self._tokens.lengths, self._loss_mask.lengths):
            raise ValueError(f"{self._prefix}: tokens and loss mask have different lengths; {_AGAIN}")
        references = self._references()
        visuals = references.visuals
        visual = references.count(self._image_sizes_I2.all(), vision)
        text = self._tokens.lengths.astype(np.int64) - visuals
        return SampleCounts(
            tokens=text + visual.tokens,
            text_tokens=text,
            patch_tokens=visual.patches,
            lm_tokens=self._lm_tokens(),
            tiles=visual.tiles,
            visual_pairs=visual.pairs,
        )

    def _references(self) -> ImageReferences:
        try:
            return ImageReferences(self._image_refs.read_all(), self._image_refs.lengths, len(self._image_sizes_I2))
        except ChangedFileError:
            raise
        except ValueError as error:
            raise ValueError(f"{self._prefix}: {error}; {_AGAIN}") from error

    def _lm_tokens(self) -> npt.NDArray[np.int64]:
        if self.manifest.format_version >= 2:
            path = Path(self._prefix + names.SAMPLE_LM_TOKENS)
            return read_array(path, np.int32, (len(self._tokens),)).astype(np.int64)
        self._loss_mask.check_order()
        starts, lengths = self._loss_mask.starts(), self._loss_mask.lengths
        counts = np.empty(len(lengths), dtype=np.int64)
        # Some thousand samples at a time: the masks of a large data set would not fit into memory.
        for first in range(0, len(lengths), _BLOCK):
            block = slice(first, min(first + _BLOCK, len(lengths)))
            mask = self._loss_mask.read_range(block.start, block.stop)
            # The first token of each sample has no predecessor, so it is not counted.
            behind_first = starts[block] - starts[first] + 1
            counts[block] = segment_sums(mask, behind_first, np.maximum(lengths[block] - 1, 0))
        return counts

    def hashes(self) -> npt.NDArray[np.uint64]:
        """`[samples]`, hash of what each sample holds (`data.sample_hash`)."""
        if self.manifest.format_version >= 2:
            return read_array(Path(self._prefix + names.SAMPLE_HASHES), np.uint64, (len(self._tokens),))
        digests = [hashlib.sha256(self._images[number].tobytes()).digest() for number in range(len(self._images))]
        references = (self._image_refs[index].tolist() for index in range(len(self._tokens)))
        return np.array(
            [
                sample_hash(self._tokens[index], (digests[number] for number in numbers))
                for index, numbers in enumerate(references)
            ],
            dtype=np.uint64,
        )

    def read(self, index: int) -> Sample:
        """One sample, its images still encoded.

        Raises:
            ValueError: the sample's files are damaged, or its loss mask or image references do not fit its tokens.
            ChangedFileError: a file is not what it was when it was opened.
            OSError: a file cannot be read.
        """
        try:
            return self._read(index)
        except ValueError:
            self.check_files()
            raise

    def check_files(self) -> None:
        """Look at the sizes of the files that samples are read from.

        Raises:
            ChangedFileError: one is not what it was when it was opened.
        """
        for dataset in (self._tokens, self._loss_mask, self._images, self._image_refs):
            dataset.check()
        self._image_sizes_I2.check()

    def _read(self, index: int) -> Sample:
        try:
            token_ids, loss_mask = self._tokens.in_order(index), self._loss_mask.in_order(index)
            references = split_references(self._image_refs.in_order(index).tolist(), len(self._images))
        except ChangedFileError:
            raise
        except ValueError as error:
            raise ValueError(f"{self._prefix}: sample {index}: {error}") from error
        if len(loss_mask) != len(token_ids):
            raise ValueError(
                f"{self._prefix}: sample {index} has {len(token_ids)} tokens and a loss mask of {len(loss_mask)}; "
                f"{_AGAIN}"
            )
        is_visual = (token_ids == self.manifest.image_token_id) | (token_ids == self.manifest.video_token_id)
        self._check_values(index, token_ids[~is_visual], loss_mask)
        is_video = (token_ids[is_visual] == self.manifest.video_token_id).tolist()
        if is_video != [isinstance(reference, list) for reference in references]:
            raise ValueError(
                f"{self._prefix}: sample {index} has {len(is_video)} image and video marks that do not fit its "
                f"{len(references)} images and videos"
            )
        visuals = tuple(
            EncodedVideo(tuple(map(self._image, reference))) if isinstance(reference, list) else self._image(reference)
            for reference in references
        )
        return Sample(token_ids, loss_mask, is_visual, visuals)

    def _check_values(self, index: int, text_ids: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]) -> None:
        smallest, largest = int(text_ids.min(initial=0)), int(text_ids.max(initial=0))
        limit = self.manifest.counts.largest_token_id
        if smallest < 0 or largest > limit:
            raise ValueError(
                f"{self._prefix}{names.TOKENS}.bin is damaged: sample {index} has the token id "
                f"{smallest if smallest < 0 else largest}, the manifest's ids are 0 to {limit}; haplovl-verify finds "
                "all that is damaged"
            )
        if int(loss_mask.max(initial=0)) > 1:
            raise ValueError(
                f"{self._prefix}{names.LOSS_MASK}.bin is damaged: sample {index} has the value {int(loss_mask.max())} "
                "where only 0 and 1 may be; haplovl-verify finds all that is damaged"
            )

    def _image(self, number: int) -> EncodedImage:
        height, width = self._image_sizes_I2[number].tolist()
        return EncodedImage(
            self._images.in_order(number).tobytes(), height, width, upright=self.manifest.format_version >= 2
        )


_BLOCK = 65536
_AGAIN = "preprocess again"
