"""Random samples, for a run without any files.

Text alone, an image, several images and videos are all among them, so that such a run takes every path.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import Frames, Picture, visual_layouts
from megatron_haplovl.data.sources import EncodedImage, EncodedVideo, Sample, SampleCounts

_MOST_FRAMES = 4


class MockSource:
    """Random conversations. Of five, one is text alone; the others have an image, two images, a video, an image and a
    video. What does not fit is left out from the end; a video has up to four frames, as many as fit.

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
        self._shapes = (Picture(side, side), Picture(side // 2, side), Picture(side, side // 2))
        smallest = max(self._num_tokens([shape]) for shape in self._shapes) + self._SHORTEST_TEXT
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
        layouts = [visual_layouts(visuals, vision) for _, visuals in outlines]

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
        """Random text whose second half is the answer, behind the images and videos."""
        length, visuals = self._outline(index)
        random = np.random.default_rng([self._seed, index, 1])
        total = length + len(visuals)
        token_ids = random.integers(0, self._vocab_size, size=total, dtype=np.int32)
        is_visual = np.zeros(total, dtype=np.bool_)
        is_visual[1 : 1 + len(visuals)] = True
        loss_mask = (np.arange(total) >= total - length // 2).astype(np.uint8)
        return Sample(token_ids, loss_mask, is_visual, tuple(self._visual(random, visual) for visual in visuals))

    def check_files(self) -> None:
        """There are none."""

    def _outline(self, index: int) -> tuple[int, list[Picture | Frames]]:
        """Text tokens of a sample, and its images and videos."""
        random = np.random.default_rng([self._seed, index, 0])
        kinds = ("", "image", "image image", "video", "image video")[index % 5].split()
        visuals: list[Picture | Frames] = [
            Frames(_MOST_FRAMES) if kind == "video" else self._shapes[int(random.integers(len(self._shapes)))]
            for kind in kinds
        ]
        room = self._seq_length - self._SHORTEST_TEXT
        while self._num_tokens(visuals) > room:
            last = visuals.pop()
            if isinstance(last, Frames) and last.number > 1:
                visuals.append(Frames(last.number - 1))
        longest = min(64, self._seq_length - self._num_tokens(visuals))
        return int(random.integers(self._SHORTEST_TEXT, longest + 1)), visuals

    def _num_tokens(self, visuals: list[Picture | Frames]) -> int:
        return sum(layout.num_tokens for layout in visual_layouts(visuals, self._vision))

    def _visual(self, random: np.random.Generator, visual: Picture | Frames) -> EncodedImage | EncodedVideo:
        if isinstance(visual, Picture):
            return _image(random, visual)
        shapes = random.integers(len(self._shapes), size=visual.number).tolist()
        return EncodedVideo(tuple(_image(random, self._shapes[shape]) for shape in shapes))


def _image(random: np.random.Generator, shape: Picture) -> EncodedImage:
    # A PPM file: the simplest encoding there is.
    pixels = random.integers(0, 256, size=(shape.height, shape.width, 3), dtype=np.uint8)
    return EncodedImage(b"P6 %d %d 255\n" % (shape.width, shape.height) + pixels.tobytes(), shape.height, shape.width)
