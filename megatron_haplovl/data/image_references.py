"""Which images and videos belong to which sample: the sequences of `_image_refs`.

The sequence of a sample has its visuals in the order of the placeholders. An image is its number; a video is minus the
number of its frames, and the frames' numbers follow.

Shape letters: R references of all samples, N samples, I images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_counts import count_image_tokens
from megatron_haplovl.data.image_geometry import Frames, tile_limit, vision_of_sample, visual_layouts

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VisualCounts:
    """What the images and videos of each sample add to it, each `[N]`."""

    tokens: IntArray
    """Patches and newlines."""
    patches: IntArray
    tiles: IntArray
    pairs: IntArray
    """Pairs of a token with a later one that see each other under the mixed mask only."""


class ImageReferences:
    """The references of all samples of a prefix.

    Args:
        flat_R: all sequences, one behind the other.
        lengths_N: length of each.
        num_images: images that there are.

    Raises:
        ValueError: a reference to an image that does not exist, or a video that is longer than its sequence.
    """

    def __init__(self, flat_R: npt.NDArray[np.int32], lengths_N: npt.NDArray[np.int32], num_images: int) -> None:
        self._flat_R = flat_R
        ends_N = np.cumsum(lengths_N, dtype=np.int64)
        self._starts_N, self._lengths_N = ends_N - lengths_N, lengths_N
        if len(flat_R) and int(flat_R.max()) >= num_images:
            raise ValueError(f"a sample refers to image {int(flat_R.max())}, but there are {num_images}")
        self._videos = np.flatnonzero(flat_R < 0)  # where a video begins
        sample_of_video = np.searchsorted(ends_N, self._videos, side="right")
        last_frames = self._videos - flat_R[self._videos]
        if (last_frames >= ends_N[sample_of_video]).any() or (self._videos[1:] <= last_frames[:-1]).any():
            raise ValueError("a sample refers to a video with more frames than follow")
        self._frames = -flat_R[self._videos].astype(np.int64)
        self._sample_of_video = sample_of_video
        opened = np.zeros(len(flat_R) + 1, dtype=np.int8)
        opened[self._videos] += 1
        opened[last_frames + 1] -= 1
        self._is_image_R = np.cumsum(opened[:-1], dtype=np.int8) == 0
        images_N = segment_sums(self._is_image_R, self._starts_N, lengths_N)
        self.visuals: IntArray = images_N + np.bincount(sample_of_video, minlength=len(lengths_N))
        """Images and videos of each sample, `[N]`."""

    def count(self, sizes_I2: npt.NDArray[np.int32], vision: VisionConfig) -> VisualCounts:
        """What the images and videos of each sample become.

        Args:
            sizes_I2: (height, width) of all images in pixels.
            vision: how the model sees images.
        """
        limits = np.array([tile_limit(number, vision) for number in range(int(self.visuals.max(initial=0)) + 1)])
        totals = np.zeros((4, len(self.visuals)), dtype=np.int64)
        for limit in np.unique(limits[np.unique(self.visuals)]).tolist():
            seen = vision_of_sample(int(np.flatnonzero(limits == limit)[0]), vision)
            tokens_I, patches_I, tiles_I = count_image_tokens(sizes_I2, seen)
            pairs_I = tokens_I.astype(np.int64) * (tokens_I - 1) // 2
            samples = np.flatnonzero(limits[self.visuals] == limit)
            for total, counts_I in zip(totals, (tokens_I, patches_I, tiles_I, pairs_I), strict=True):
                counts_R = np.where(self._is_image_R, counts_I[np.maximum(self._flat_R, 0)], 0)
                total[samples] = segment_sums(counts_R, self._starts_N[samples], self._lengths_N[samples])
        for number in np.unique(self._frames).tolist():
            (layout,) = visual_layouts([Frames(number)], vision)
            videos = np.bincount(self._sample_of_video[self._frames == number], minlength=len(self.visuals))
            each_of_video = (layout.num_tokens, layout.num_patches, layout.num_tiles, layout.num_pairs)
            for total, each in zip(totals, each_of_video, strict=True):
                total += each * videos
        return VisualCounts(*totals)


def split_references(references: Iterable[int], num_images: int) -> list[int | list[int]]:
    """The visuals of one sample: the number of an image, or the list of the numbers of a video's frames.

    Args:
        references: the sample's sequence.
        num_images: images that there are.

    Raises:
        ValueError: as :class:`ImageReferences`.
    """
    visuals: list[int | list[int]] = []
    remaining = iter(references)
    for reference in remaining:
        numbers = [reference] if reference >= 0 else list(islice(remaining, -reference))
        if reference < 0 and (len(numbers) < -reference or min(numbers) < 0):
            raise ValueError("a sample refers to a video with more frames than follow")
        if max(numbers) >= num_images:
            raise ValueError(f"a sample refers to image {max(numbers)}, but there are {num_images}")
        visuals.append(numbers if reference < 0 else reference)
    return visuals


def segment_sums(values: npt.NDArray, starts: IntArray, lengths: npt.NDArray[np.integer]) -> IntArray:
    """Sums of `values[start : start + length]`; the segments are in order and do not overlap."""
    sums = np.zeros(len(starts), dtype=np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled) == 0:
        return sums
    # reduceat sums from one boundary to the next: take the segments, leave out the gaps between them.
    boundaries = np.stack([starts[filled], starts[filled] + lengths[filled]], axis=1).reshape(-1)
    first, last = int(boundaries[0]), int(boundaries[-1])
    boundaries = boundaries - first
    inside = boundaries[:-1] if last == len(values) else boundaries
    sums[filled] = np.add.reduceat(values[first : last + 1], inside, dtype=np.int64)[::2]
    return sums
