"""Random samples, for a run without any files.

Shape letters beside those of `data/batch.py`: K kinds of mock image.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import Picture, VisualLayout, visual_layouts
from megatron_haplovl.data.sources import EncodedImage, Sample, SampleCounts


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
        self._kinds = (Picture(side, side), Picture(side // 2, side), Picture(side, side // 2))
        smallest = max(self._layouts([kind])[0].num_tokens for kind in range(len(self._kinds))) + self._SHORTEST_TEXT
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

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return self._num_samples

    def counts(self, vision: VisionConfig) -> SampleCounts:
        """Sizes of all samples; `vision` is that of the constructor."""
        assert vision == self._vision
        outlines = [self._outline(i) for i in range(self._num_samples)]
        text = np.array([length for length, _ in outlines], dtype=np.int64)
        layouts = [self._layouts(kinds) for _, kinds in outlines]

        def total(name: str) -> npt.NDArray[np.int64]:
            return np.array([sum(getattr(layout, name) for layout in row) for row in layouts], dtype=np.int64)

        return SampleCounts(
            tokens=text + total("num_tokens"),
            text_tokens=text,
            patch_tokens=total("num_patches"),
            lm_tokens=text // 2,
            tiles=total("num_tiles"),
            visual_pairs=total("num_pairs"),
        )

    def read(self, index: int) -> Sample:
        """Random text whose second half is the answer, behind the images."""
        length, kinds = self._outline(index)
        random = np.random.default_rng([self._seed, index, 1])
        total = length + len(kinds)
        token_ids = random.integers(0, self._vocab_size, size=total, dtype=np.int32)
        is_visual = np.zeros(total, dtype=np.bool_)
        is_visual[1 : 1 + len(kinds)] = True
        loss_mask = (np.arange(total) >= total - length // 2).astype(np.uint8)
        images = tuple(self._image(random, self._kinds[kind]) for kind in kinds)
        return Sample(token_ids, loss_mask, is_visual, images)

    def _outline(self, index: int) -> tuple[int, list[int]]:
        """Text tokens of a sample and the kinds of its images."""
        random = np.random.default_rng([self._seed, index, 0])
        kinds = random.integers(0, len(self._kinds), size=(0, 1, 2, 1)[index % 4]).tolist()
        room = self._seq_length - self._SHORTEST_TEXT
        while (visual := self._num_tokens(kinds)) > room:
            kinds = kinds[:-1]
        longest = min(64, self._seq_length - visual)
        return int(random.integers(self._SHORTEST_TEXT, longest + 1)), kinds

    def _layouts(self, kinds: list[int]) -> list[VisualLayout]:
        return visual_layouts([self._kinds[kind] for kind in kinds], self._vision)

    def _num_tokens(self, kinds: list[int]) -> int:
        return sum(layout.num_tokens for layout in self._layouts(kinds))

    @staticmethod
    def _image(random: np.random.Generator, kind: Picture) -> EncodedImage:
        # A PPM file: the simplest encoding there is.
        pixels = random.integers(0, 256, size=(kind.height, kind.width, 3), dtype=np.uint8)
        return EncodedImage(b"P6 %d %d 255\n" % (kind.width, kind.height) + pixels.tobytes(), kind.height, kind.width)
