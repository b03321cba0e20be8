"""Where samples come from: preprocessed files, or nowhere (mock data). Both look the same to the pack plan.

Shape letters beside those of `data/batch.py`: K kinds of mock image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.image_geometry import count_image_tokens
from megatron_haplovl.data.indexed_dataset import IndexedDataset
from megatron_haplovl.data.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class EncodedImage:
    """An image as its file holds it."""

    data: bytes
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    """One conversation, as preprocessed."""

    token_ids: npt.NDArray[np.int32]
    """`[n]`, one placeholder per image."""
    loss_mask: npt.NDArray[np.uint8]
    """`[n]`, 1 at tokens that are trained. The first token never is, because nothing predicts it."""
    is_image: npt.NDArray[np.bool_]
    """`[n]`, True at placeholders."""
    images: tuple[EncodedImage, ...]
    """Images in the order of the placeholders."""


@dataclass(frozen=True)
class SampleCounts:
    """Sizes of all samples of a source, each `[num_samples]` int64. Names as in `data.batch.StepCounts`."""

    tokens: npt.NDArray[np.int64]
    """Length in the packed sequence: text, patches and newlines."""
    text_tokens: npt.NDArray[np.int64]
    patch_tokens: npt.NDArray[np.int64]
    """Newlines not counted."""
    lm_tokens: npt.NDArray[np.int64]


class Source(Protocol):
    """Something with numbered samples whose sizes are known beforehand."""

    @property
    def name(self) -> str:
        """The prefix, for messages."""

    @property
    def content_hash(self) -> str:
        """Changes when any sample changes."""

    def counts(self, vision: VisionConfig) -> SampleCounts:
        """Sizes of all samples for a model that sees images in this way."""

    def read(self, index: int) -> Sample:
        """One sample."""


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
        self._tokens = IndexedDataset(prefix + names.TOKENS)
        self._loss_mask = IndexedDataset(prefix + names.LOSS_MASK)
        self._images = IndexedDataset(prefix + names.IMAGES)
        self._image_refs = IndexedDataset(prefix + names.IMAGE_REFS)
        self._image_sizes_I2 = _read_sizes(Path(prefix + names.IMAGE_SIZES))
        if not np.array_equal(self._tokens.lengths, self._loss_mask.lengths):
            raise ValueError(f"{prefix}: tokens and loss mask have different lengths; preprocess again")
        if len(self._image_refs) != len(self._tokens) or len(self._image_sizes_I2) != len(self._images):
            raise ValueError(f"{prefix}: the image files belong to other data than the tokens; preprocess again")

    @property
    def name(self) -> str:
        """The prefix."""
        return self._prefix

    @property
    def content_hash(self) -> str:
        """Changes when any sample changes."""
        return self.manifest.content_hash

    def counts(self, vision: VisionConfig) -> SampleCounts:
        """Sizes of all samples. Reads the loss masks once: seconds for a million samples.

        Raises:
            ValueError: a sample refers to an image that does not exist.
        """
        tokens_per_image, patches_per_image = count_image_tokens(self._image_sizes_I2, vision)
        references = self._image_refs.flat()
        if len(references) and not 0 <= int(references.min()) <= int(references.max()) < len(tokens_per_image):
            raise ValueError(f"{self._prefix}: a sample refers to an image that does not exist; preprocess again")
        starts, lengths = self._image_refs.starts(), self._image_refs.lengths
        text = self._tokens.lengths.astype(np.int64) - lengths
        mask = self._loss_mask.flat()
        mask_starts, mask_lengths = self._loss_mask.starts(), self._loss_mask.lengths
        return SampleCounts(
            tokens=text + _segment_sums(tokens_per_image[references], starts, lengths),
            text_tokens=text,
            patch_tokens=_segment_sums(patches_per_image[references], starts, lengths),
            # The first token of each sample has no predecessor, so it is not counted.
            lm_tokens=_segment_sums(mask, mask_starts + 1, np.maximum(mask_lengths - 1, 0)),
        )

    def read(self, index: int) -> Sample:
        """One sample, its images still encoded.

        Raises:
            ValueError: the sample's image references do not fit its tokens.
        """
        token_ids = self._tokens[index]
        is_image = token_ids == self.manifest.image_token_id
        references = self._image_refs[index]
        if int(is_image.sum()) != len(references):
            raise ValueError(
                f"{self._prefix}: sample {index} has {int(is_image.sum())} image marks and {len(references)} images"
            )
        images = tuple(
            EncodedImage(self._images[i].tobytes(), *(int(side) for side in self._image_sizes_I2[i]))
            for i in references
        )
        return Sample(token_ids, self._loss_mask[index], is_image, images)


def _segment_sums(
    values: npt.NDArray[np.integer], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Sums of `values[start : start + length]`; the segments are in order and do not overlap."""
    sums = np.zeros(len(starts), dtype=np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled) == 0:
        return sums
    # reduceat sums from one boundary to the next: take the segments, leave out the gaps between them.
    boundaries = np.stack([starts[filled], starts[filled] + lengths[filled]], axis=1).reshape(-1)
    if boundaries[-1] == len(values):
        boundaries = boundaries[:-1]
    sums[filled] = np.add.reduceat(values, boundaries, dtype=np.int64)[::2]
    return sums


def _read_sizes(path: Path) -> npt.NDArray[np.int32]:
    try:
        sizes: npt.NDArray[np.int32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if sizes.dtype != np.int32 or sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f"{path} must be int32 [N, 2], not {sizes.dtype} {list(sizes.shape)}")
    return sizes


class MockSource:
    """Random conversations: every fourth without an image, every fourth with two if they fit, the others with one.

    Args:
        vocab_size: token ids are below this.
        vision: how the model sees images.
        seq_length: samples are at most this long.
        seed: two sources with the same arguments are the same.
        num_samples: samples in an epoch.

    Raises:
        ValueError: not even one image and a few words fit into `seq_length`.
    """

    _SHORTEST_TEXT = 4

    def __init__(
        self, vocab_size: int, vision: VisionConfig, seq_length: int, seed: int, num_samples: int = 1024
    ) -> None:
        self._vocab_size, self._vision, self._seq_length = vocab_size, vision, seq_length
        self._seed, self._num_samples = seed, num_samples
        # One tile of the model's own size, a wide and a tall image.
        side = vision.image_size
        self._sizes_K2 = np.array([(side, side), (side // 2, side), (side, side // 2)], dtype=np.int32)
        self._tokens_K, self._patches_K = count_image_tokens(self._sizes_K2, vision)
        smallest = int(self._tokens_K.max()) + self._SHORTEST_TEXT
        if seq_length < smallest:
            raise ValueError(
                f"--mock-data needs --seq-length of at least {smallest} with these images, not {seq_length}"
            )

    @property
    def name(self) -> str:
        """A name for messages."""
        return "mock data"

    @property
    def content_hash(self) -> str:
        """All arguments."""
        return repr(vars(self))

    def counts(self, vision: VisionConfig) -> SampleCounts:
        """Sizes of all samples; `vision` is that of the constructor."""
        assert vision == self._vision
        outlines = [self._outline(i) for i in range(self._num_samples)]
        text = np.array([length for length, _ in outlines], dtype=np.int64)
        return SampleCounts(
            tokens=text + np.array([self._tokens_K[kinds].sum() for _, kinds in outlines], dtype=np.int64),
            text_tokens=text,
            patch_tokens=np.array([self._patches_K[kinds].sum() for _, kinds in outlines], dtype=np.int64),
            lm_tokens=text // 2,
        )

    def read(self, index: int) -> Sample:
        """Random text whose second half is the answer, behind the images."""
        length, kinds = self._outline(index)
        random = np.random.default_rng([self._seed, index, 1])
        total = length + len(kinds)
        token_ids = random.integers(0, self._vocab_size, size=total, dtype=np.int32)
        is_image = np.zeros(total, dtype=np.bool_)
        is_image[1 : 1 + len(kinds)] = True
        loss_mask = (np.arange(total) >= total - length // 2).astype(np.uint8)
        images = tuple(self._image(random, *(int(side) for side in self._sizes_K2[kind])) for kind in kinds)
        return Sample(token_ids, loss_mask, is_image, images)

    def _outline(self, index: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Text tokens of a sample and the kinds of its images."""
        random = np.random.default_rng([self._seed, index, 0])
        kinds = random.integers(0, len(self._sizes_K2), size=(0, 1, 2, 1)[index % 4])
        room = self._seq_length - self._SHORTEST_TEXT
        while self._tokens_K[kinds].sum() > room:
            kinds = kinds[:-1]
        longest = min(64, self._seq_length - int(self._tokens_K[kinds].sum()))
        return int(random.integers(self._SHORTEST_TEXT, longest + 1)), kinds

    @staticmethod
    def _image(random: np.random.Generator, height: int, width: int) -> EncodedImage:
        # A PPM file: the simplest encoding there is.
        pixels = random.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        return EncodedImage(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes(), height, width)
