"""A sample as people look at it: runs of text, trained or not, and images and videos with their places in it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.dataset import lay_out_document
from megatron_haplovl.data.image_geometry import ImageLayout, VisualLayout, visual_layouts
from megatron_haplovl.data.sources import EncodedImage, EncodedVideo, Sample, Source
from megatron_haplovl.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class TextRun:
    """Tokens that stand together and are all trained, or all not."""

    text: str
    tokens: int
    is_trained: bool


@dataclass(frozen=True)
class VisualRun:
    """An image or a video."""

    images: tuple[EncodedImage, ...]
    """The image, or the frames."""
    layout: VisualLayout
    is_video: bool

    @property
    def blocks(self) -> tuple[tuple[EncodedImage, ImageLayout], ...]:
        """Each image with its place in the sequence."""
        return tuple(zip(self.images, self.layout.blocks, strict=True))

    @property
    def description(self) -> str:
        """Sizes in pixels, tiles, patches, newlines and tokens."""
        layout, first = self.layout, self.images[0]
        newlines = layout.num_tokens - layout.num_patches
        frames = f"{len(self.images)} frames of " if self.is_video else ""
        size = f"{first.width}x{first.height}"
        block = layout.blocks[0]
        grid = f"{block.tile_rows}x{block.tile_cols} tiles of which {block.rows}x{block.cols} patches are kept"
        return (
            f"{'video' if self.is_video else 'image'}: {frames}{size} pixels, {grid}, {newlines} newlines, "
            f"{layout.num_tokens} tokens"
        )


@dataclass(frozen=True)
class SampleView:
    """A sample of a source."""

    title: str
    runs: tuple[TextRun | VisualRun, ...]
    kv_end: npt.NDArray[np.int64]
    """One past the last visible key of each of the sample's tokens."""

    @property
    def summary(self) -> str:
        """Counts of the sample, in one line."""
        texts = [run for run in self.runs if isinstance(run, TextRun)]
        visuals = [run for run in self.runs if isinstance(run, VisualRun)]
        trained = sum(run.tokens for run in texts if run.is_trained)
        visual = sum(run.layout.num_tokens for run in visuals)
        tiles = sum(run.layout.num_tiles for run in visuals)
        return (
            f"{len(self.kv_end)} tokens: {sum(run.tokens for run in texts)} of text ({trained} trained), {visual} of "
            f"{len(visuals)} images and videos ({tiles} tiles)"
        )


def view_sample(source: Source, number: int, tokenizer: TextTokenizer, model: ModelConfig) -> SampleView:
    """Read a sample and say what stands where.

    Raises:
        ValueError: there is no such sample, it is damaged, or one of its images cannot be decoded.
    """
    sample = source.read(number)
    layouts = visual_layouts([visual.shape for visual in sample.visuals], model.vision)
    visuals = iter(zip(sample.visuals, layouts, strict=True))
    runs: list[TextRun | VisualRun] = []
    for is_visual, start, end in _runs(sample):
        if not is_visual:
            trained = bool(sample.loss_mask[start]) and start > 0
            runs.append(TextRun(_text(sample, start, end, tokenizer), end - start, trained))
            continue
        for _ in range(start, end):
            visual, layout = next(visuals)
            runs.append(VisualRun(visual.images, layout, isinstance(visual, EncodedVideo)))
    kv_end = lay_out_document([sample], model.vision).kv_end
    if model.image_attention == "causal":
        kv_end = np.arange(1, len(kv_end) + 1)
    return SampleView(f"{source.name}, sample {number}", tuple(runs), kv_end)


def _runs(sample: Sample) -> list[tuple[bool, int, int]]:
    """Runs of tokens of one kind: whether they are visual, and `[start, end)`."""
    # The first token is never trained, whatever the mask says.
    kinds = np.where(sample.is_visual, 2, sample.loss_mask)
    kinds[:1] = np.where(sample.is_visual[:1], 2, 0)
    runs, start = [], 0
    for kind, group in groupby(kinds.tolist()):
        end = start + len(list(group))
        runs.append((kind == 2, start, end))
        start = end
    return runs


def _text(sample: Sample, start: int, end: int, tokenizer: TextTokenizer) -> str:
    """The text of some tokens, as it stands in the whole: alone, a decoder would drop a space at its beginning."""
    before, through = (
        str(tokenizer.hf.decode(sample.token_ids[:stop].tolist(), clean_up_tokenization_spaces=False))
        for stop in (start, end)
    )
    return through[len(before) :]
