"""From samples to a batch: expand image placeholders, lay documents out behind each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.image_geometry import (
    ImageLayout,
    VisualLayout,
    vision_of_frames,
    vision_of_sample,
    visual_layouts,
)
from megatron_haplovl.data.image_processing import cut_tiles, decode_image
from megatron_haplovl.data.sources import EncodedImage, EncodedVideo, Sample
from megatron_haplovl.data.tile_rule import narrowed
from megatron_haplovl.kernels.mask import mixed_mask

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """One document laid out: visual tokens in place, positions counted from its own start.

    Shapes: n tokens, p patches, m newlines, t tiles.
    """

    tokens: IntArray
    """`[n]`, 0 at visual positions."""
    labels: IntArray
    """`[n]`, the next token where that one is trained, else IGNORE_INDEX."""
    is_text: npt.NDArray[np.bool_]
    """`[n]`, True at text tokens."""
    kv_end: IntArray
    """`[n]`, one past the last visible key, counted from the document's start."""
    patch_source: IntArray
    """`[p]`, index into the `t * cells_per_tile` patches of the document's tiles."""
    patch_target: IntArray
    """`[p]`, position of each patch's token in the document."""
    newline_target: IntArray
    """`[m]`, position of each newline's token in the document."""
    tiles: list[npt.NDArray[np.uint8]]
    """One `[tiles of the image, 3, H, W]` array per image or frame."""
    source: npt.NDArray[np.int32]
    """`[n]`, number of the source that each token is from."""


def lay_out_document(
    samples: Sequence[Sample], vision: VisionConfig, source_numbers: Sequence[int] | None = None
) -> Document:
    """Lay out one sample, or two joined ones, as one document.

    Args:
        samples: the samples in order; each starts where the one before it ends.
        vision: how images become tokens.
        source_numbers: number of each sample's source; without it, 0 for all.

    Returns:
        The document, its images decoded.

    Raises:
        ValueError: an image that cannot be decoded or has another size than the one recorded.
    """
    ids = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    is_visual = np.concatenate([sample.is_visual for sample in samples])
    trained = np.concatenate([_trained(sample) for sample in samples])
    seen = [visual for sample in samples for visual in _see(sample, vision)]
    assert int(is_visual.sum()) == len(seen)

    lengths = np.ones(len(ids), dtype=np.int64)
    lengths[is_visual] = [layout.num_tokens for _, layout, _ in seen]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    total = int(ends[-1])
    numbers = np.array(source_numbers or [0] * len(samples), dtype=np.int32)
    source = np.repeat(np.repeat(numbers, [len(sample.token_ids) for sample in samples]), lengths)

    text_positions = starts[~is_visual]
    tokens = np.zeros(total, dtype=np.int64)
    tokens[text_positions] = ids[~is_visual]
    is_text = np.zeros(total, dtype=np.bool_)
    is_text[text_positions] = True
    is_trained = np.zeros(total, dtype=np.bool_)
    is_trained[text_positions] = trained[~is_visual]
    labels = np.full(total, IGNORE_INDEX, dtype=np.int64)
    labels[:-1][is_trained[1:]] = tokens[1:][is_trained[1:]]

    kv_end = np.arange(1, total + 1, dtype=np.int64)
    visual = _VisualTokens(vision.cells_per_tile)
    for start, (images, layout, block_vision) in zip(starts[is_visual].tolist(), seen, strict=True):
        for image, block in zip(images, layout.blocks, strict=True):
            end = start + block.num_tokens
            kv_end[start:end] = end
            tiles = _read_tiles(image, block, block_vision)
            visual.append(start, block.patch_source(), block.patch_offsets(), block.newline_offsets(), [tiles])
            start = end
        if layout.closing_newline:
            visual.append_newline(start)
    return Document(tokens, labels, is_text, kv_end, *visual.indices(), visual.tiles, source)


def _see(sample: Sample, vision: VisionConfig) -> list[tuple[tuple[EncodedImage, ...], VisualLayout, VisionConfig]]:
    """For each image or video of a sample: the images of its blocks, its layout, and how its images become tiles."""
    vision = narrowed(vision, sample.tiles)
    layouts = visual_layouts([visual.shape for visual in sample.visuals], vision)
    of_images, of_frames = vision_of_sample(len(layouts), vision), vision_of_frames(vision)
    return [
        (visual.images, layout, of_frames if isinstance(visual, EncodedVideo) else of_images)
        for visual, layout in zip(sample.visuals, layouts, strict=True)
    ]


def _trained(sample: Sample) -> npt.NDArray[np.bool_]:
    trained = sample.loss_mask.astype(np.bool_)
    trained[:1] = False
    return trained


def _read_tiles(image: EncodedImage, layout: ImageLayout, vision: VisionConfig) -> npt.NDArray[np.uint8]:
    # Preprocessing has decoded the image already and recorded its size, which is the limit here.
    decoded = decode_image(image.data, max_pixels=image.height * image.width, upright=image.upright)
    if (decoded.height, decoded.width) != (image.height, image.width):
        raise ValueError(
            f"a stored image has {decoded.height} x {decoded.width} pixels where {image.height} x {image.width} were "
            "recorded; preprocess again"
        )
    tiles = cut_tiles(decoded, vision)
    assert len(tiles) == layout.num_tiles
    return tiles


class _VisualTokens:
    """Tiles and the places of their tokens, put together part by part: images of a document, documents of a batch."""

    def __init__(self, cells_per_tile: int) -> None:
        self.tiles: list[npt.NDArray[np.uint8]] = []
        self._cells_per_tile, self._patches = cells_per_tile, 0
        empty = np.zeros(0, dtype=np.int64)
        self._sources, self._targets, self._newlines = [empty], [empty], [empty]

    def append(
        self,
        start: int,
        source: IntArray,
        target: IntArray,
        newline: IntArray,
        tiles: Sequence[npt.NDArray[np.uint8]],
    ) -> None:
        """Add a part, whose tokens are counted from `start` and whose patches from its own first tile."""
        self._sources.append(self._patches + source)
        self._targets.append(start + target)
        self._newlines.append(start + newline)
        self.tiles.extend(tiles)
        self._patches += sum(map(len, tiles)) * self._cells_per_tile

    def append_newline(self, position: int) -> None:
        """Add a newline that belongs to no image."""
        self._newlines.append(np.array([position], dtype=np.int64))

    def indices(self) -> tuple[IntArray, IntArray, IntArray]:
        """`patch_source`, `patch_target` and `newline_target` of the whole."""
        return np.concatenate(self._sources), np.concatenate(self._targets), np.concatenate(self._newlines)


def collate(
    packs: Sequence[Sequence[Document]],
    seq_length: int,
    vision: VisionConfig,
    image_attention: str = "bidirectional",
    num_sources: int = 1,
) -> Batch:
    """Put documents behind each other and sequences on top of each other.

    Args:
        packs: the documents of each sequence; a sequence without documents is all padding.
        seq_length: length of every sequence, filled with padding.
        vision: how images become tokens.
        image_attention: what the model lets the tokens of an image see, which decides the number of visible pairs.
        num_sources: sources that the documents are from.
    """
    shape = (len(packs), seq_length)
    tokens_BS = np.zeros(shape, dtype=np.int64)
    labels_BS = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    text_mask_BS = np.zeros(shape, dtype=np.bool_)
    position_ids_BS = np.zeros(shape, dtype=np.int64)
    # Padding sees itself only.
    kv_start_BS = np.tile(np.arange(seq_length, dtype=np.int32), (len(packs), 1))
    kv_end_BS = kv_start_BS + np.int32(1)
    source_BS = np.full(shape, -1, dtype=np.int32)
    visual = _VisualTokens(vision.cells_per_tile)
    for row, documents in enumerate(packs):
        start = 0
        for document in documents:
            end = start + len(document.tokens)
            assert end <= seq_length
            here = (row, slice(start, end))
            tokens_BS[here] = document.tokens
            labels_BS[here] = document.labels
            text_mask_BS[here] = document.is_text
            position_ids_BS[here] = np.arange(end - start)
            kv_start_BS[here] = start
            kv_end_BS[here] = document.kv_end + start
            source_BS[here] = document.source
            visual.append(
                row * seq_length + start,
                document.patch_source,
                document.patch_target,
                document.newline_target,
                document.tiles,
            )
            start = end
    patch_source_P, patch_target_P, newline_target_N = map(torch.from_numpy, visual.indices())
    no_tile = np.zeros((0, 3, vision.image_size, vision.image_size), dtype=np.uint8)
    kv_vectors = torch.from_numpy(kv_start_BS), torch.from_numpy(kv_end_BS)
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS),
        labels_BS=torch.from_numpy(labels_BS),
        text_mask_BS=torch.from_numpy(text_mask_BS),
        position_ids_BS=torch.from_numpy(position_ids_BS),
        kv_start_BS=kv_vectors[0],
        kv_end_BS=kv_vectors[1],
        tiles_TCHW=torch.from_numpy(np.concatenate([no_tile, *visual.tiles])),
        patch_source_P=patch_source_P,
        patch_target_P=patch_target_P,
        newline_target_N=newline_target_N,
        visible_pairs=mixed_mask(*kv_vectors, image_attention).visible_pairs,
        source_BS=torch.from_numpy(source_BS) if num_sources > 1 else None,
        num_sources=num_sources,
    )
