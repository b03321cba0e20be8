"""From the size of an image to its tokens: tiles, kept patches, newlines. Pure integer arithmetic, no pixels, no torch.

The rules for any resolution are those of the released checkpoints, which follow LLaVA-NeXT:

1. Choose the grid of tiles (`grid_pinpoints`) that keeps most of the image and, among those, wastes least.
2. Scale the image to fit into the grid, keeping its shape, and pad it evenly with black.
3. Embed each tile, put the tiles' patches together into one grid of cells, and drop the rows or columns of cells that
   hold only padding.
4. Append a newline token to every row (if the model has one), and read the rows one after the other.

With `pad` and `resize` there is one tile, and all of its cells are kept.

How many tiles an image may have is a rule for each sample (`tile_limit`), because several images of several tiles each
would fill a sequence. A frame of a video is stretched to one tile, and one newline ends the video.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig


@dataclass(frozen=True)
class ImageLayout:
    """How one image stands in the token sequence.

    All sizes are in cells (one cell is one patch), except `tile_rows` and `tile_cols`, which are in tiles.
    """

    tile_rows: int
    tile_cols: int
    cells_per_side: int
    """Cells along one side of a tile."""
    first_row: int
    """First kept row of cells."""
    rows: int
    """Kept rows."""
    first_col: int
    """First kept column of cells."""
    cols: int
    """Kept columns."""
    newline: bool
    """Whether every row ends with a newline token."""

    @property
    def num_tiles(self) -> int:
        """Tiles that go through the patch embedding."""
        return self.tile_rows * self.tile_cols

    @property
    def num_patches(self) -> int:
        """Patch tokens, newlines not counted."""
        return self.rows * self.cols

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the image: patches and newlines."""
        return self.rows * (self.cols + self.newline)

    @property
    def num_pairs(self) -> int:
        """Pairs of a token with a later one, which see each other under the mixed mask only."""
        return self.num_tokens * (self.num_tokens - 1) // 2

    def patch_source(self) -> npt.NDArray[np.int64]:
        """Where each patch token comes from: `[num_patches]` indices into the image's `num_tiles * cells_per_side**2`
        patches, which are numbered tile by tile (row-major) and row-major within a tile."""
        side = self.cells_per_side
        row = np.arange(self.first_row, self.first_row + self.rows)[:, None]
        col = np.arange(self.first_col, self.first_col + self.cols)[None, :]
        tile = (row // side) * self.tile_cols + col // side
        return (tile * side**2 + (row % side) * side + col % side).reshape(-1).astype(np.int64)

    def patch_offsets(self) -> npt.NDArray[np.int64]:
        """Position of each patch token, `[num_patches]`, counted from the image's first token."""
        row = np.arange(self.rows)[:, None]
        col = np.arange(self.cols)[None, :]
        return (row * (self.cols + self.newline) + col).reshape(-1).astype(np.int64)

    def newline_offsets(self) -> npt.NDArray[np.int64]:
        """Position of each newline token, `[rows]` or `[0]`, counted from the image's first token."""
        if not self.newline:
            return np.zeros(0, dtype=np.int64)
        return np.arange(self.rows, dtype=np.int64) * (self.cols + 1) + self.cols


@lru_cache
def grid_pinpoints(vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    """The resolutions (height, width) in pixels that `anyres` chooses from.

    Every grid of at least one and at most `max_tiles` tiles is included, the single tile too, so that a small image
    is not blown up to several tiles. They are sorted by height and then width; of equally good ones the first is taken.
    """
    side = vision.image_size
    return tuple(
        (rows * side, cols * side)
        for rows in range(1, vision.max_tiles + 1)
        for cols in range(1, vision.max_tiles // rows + 1)
    )


def select_best_resolution(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The pinpoint that keeps most pixels of a `height` x `width` image and, among equals, wastes fewest of its own."""

    def quality(pinpoint: tuple[int, int]) -> tuple[int, int]:
        target_height, target_width = pinpoint
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - target_height * target_width

    return max(pinpoints, key=quality)


def fit_within(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Size (height, width) of an image scaled to fit into a target, its shape kept.

    One side fills the target, the other is rounded up.
    """
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), target_height), target_width
    return target_height, min(math.ceil(width * scale_h), target_width)


def image_layout(height: int, width: int, vision: VisionConfig) -> ImageLayout:
    """Lay out an image of `height` x `width` pixels.

    Args:
        height: pixels, of the upright image.
        width: pixels.
        vision: tile and patch size and the way to treat the shape.

    Raises:
        ValueError: an empty image.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels (height x width) has no pixels")
    side = vision.cells_per_side
    if vision.image_aspect_ratio != "anyres":
        return ImageLayout(1, 1, side, 0, side, 0, side, vision.image_newline)
    best_height, best_width = select_best_resolution(height, width, grid_pinpoints(vision))
    tile_rows, tile_cols = best_height // vision.image_size, best_width // vision.image_size
    first_row, rows, first_col, cols = _unpad(height, width, tile_rows * side, tile_cols * side)
    return ImageLayout(tile_rows, tile_cols, side, first_row, rows, first_col, cols, vision.image_newline)


def _unpad(height: int, width: int, grid_rows: int, grid_cols: int) -> tuple[int, int, int, int]:
    """First kept row, kept rows, first kept column, kept columns of a padded grid of cells.

    The 7 digits keep 13.999999999 from becoming 13 rows, as in LLaVA-NeXT. There, an image so narrow that less than one
    row of cells remains would leave no token at all; here the middle row (or pair of rows) is kept.
    """
    if width / height > grid_cols / grid_rows:
        content = max(1, int(round(height * (grid_cols / width), 7)))
        padding = (grid_rows - content) // 2
        return padding, grid_rows - 2 * padding, 0, grid_cols
    content = max(1, int(round(width * (grid_rows / height), 7)))
    padding = (grid_cols - content) // 2
    return 0, grid_rows, padding, grid_cols - 2 * padding


@dataclass(frozen=True)
class Picture:
    """An image of a sample, by its size in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Frames:
    """A video of a sample, by the number of its frames."""

    number: int


@dataclass(frozen=True)
class VisualLayout:
    """How an image or a video stands in the token sequence.

    The tokens of a block see each other. An image is one block; in a video every frame is one, and the newline behind
    the last frame, if there is one, is no part of any.
    """

    blocks: tuple[ImageLayout, ...]
    closing_newline: bool
    """Whether one newline follows behind the blocks."""

    @property
    def num_tokens(self) -> int:
        """Visual tokens: patches and newlines."""
        return sum(block.num_tokens for block in self.blocks) + self.closing_newline

    @property
    def num_patches(self) -> int:
        """Patch tokens, newlines not counted."""
        return sum(block.num_patches for block in self.blocks)

    @property
    def num_tiles(self) -> int:
        """Tiles that go through the patch embedding."""
        return sum(block.num_tiles for block in self.blocks)

    @property
    def num_pairs(self) -> int:
        """Pairs of a token with a later one of its block, which see each other under the mixed mask only."""
        return sum(block.num_pairs for block in self.blocks)


def tile_limit(num_visuals: int, vision: VisionConfig) -> int:
    """Tiles that each image of a sample with `num_visuals` images and videos may have at most.

    An image alone may have `max_tiles`. One of several has one tile, or its even share of `image_token_budget` patches,
    but at least one tile and at most `max_tiles`.
    """
    if num_visuals <= 1:
        return vision.max_tiles
    if vision.image_token_budget is None:
        return 1
    return max(1, min(vision.max_tiles, vision.image_token_budget // (num_visuals * vision.cells_per_tile)))


def vision_of_sample(num_visuals: int, vision: VisionConfig) -> VisionConfig:
    """How the images of a sample with `num_visuals` images and videos are seen."""
    limit = tile_limit(num_visuals, vision)
    return vision if limit == vision.max_tiles else dataclasses.replace(vision, max_tiles=limit)


def vision_of_frames(vision: VisionConfig) -> VisionConfig:
    """How the frames of a video are seen: stretched to one tile, without newlines of their own."""
    return dataclasses.replace(vision, image_aspect_ratio="resize", image_newline=False)


def visual_layouts(visuals: Sequence[Picture | Frames], vision: VisionConfig) -> list[VisualLayout]:
    """Lay out the images and videos of one sample.

    Args:
        visuals: all of the sample's, in order.
        vision: tile and patch size, how many tiles, and the way to treat the shape.

    Raises:
        ValueError: an image without pixels or a video without frames.
    """
    of_images = vision_of_sample(len(visuals), vision)
    layouts = []
    for visual in visuals:
        if isinstance(visual, Picture):
            layouts.append(VisualLayout((image_layout(visual.height, visual.width, of_images),), False))
        else:
            if visual.number < 1:
                raise ValueError("a video has no frames")
            frame = image_layout(vision.image_size, vision.image_size, vision_of_frames(vision))
            layouts.append(VisualLayout((frame,) * visual.number, vision.image_newline))
    return layouts
