"""Tokens and tiles of millions of images at once: `image_geometry.image_layout` in array arithmetic.

Shape letter: I images.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import grid_pinpoints

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# So many images at a time stay in the processor's cache.
_BLOCK = 16384


def count_image_tokens(
    sizes_I2: npt.NDArray[np.int32], vision: VisionConfig
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Visual tokens, patch tokens and tiles of many images.

    Args:
        sizes_I2: (height, width) in pixels.
        vision: tile and patch size and the way to treat the shape; `max_tiles` for each of the images.

    Returns:
        Three arrays `[I]`: visual tokens, patch tokens, and tiles.

    Raises:
        ValueError: an empty image.
    """
    if len(sizes_I2) and int(sizes_I2.min()) < 1:
        first = int(np.flatnonzero((sizes_I2 < 1).any(axis=1))[0])
        height, width = sizes_I2[first].tolist()
        raise ValueError(f"an image of {height} x {width} pixels (height x width) has no pixels")
    found_3I = np.empty((3, len(sizes_I2)), dtype=np.int32)
    for first in range(0, len(sizes_I2), _BLOCK):
        block = slice(first, first + _BLOCK)
        found_3I[:, block] = _count(sizes_I2[block].astype(np.float64), vision)
    return found_3I[0], found_3I[1], found_3I[2]


def _count(sizes_I2: FloatArray, vision: VisionConfig) -> FloatArray:
    side = vision.cells_per_side
    if vision.image_aspect_ratio != "anyres":
        one = np.ones(len(sizes_I2))
        return np.stack([side * (side + vision.image_newline) * one, side * side * one, one])
    height_I, width_I = sizes_I2.T
    tile_rows_I, tile_cols_I = (
        pixels_I // vision.image_size for pixels_I in _best_resolution(height_I, width_I, vision)
    )
    rows_I, cols_I = _kept(height_I, width_I, tile_rows_I * side, tile_cols_I * side)
    return np.stack([rows_I * (cols_I + vision.image_newline), rows_I * cols_I, tile_rows_I * tile_cols_I])


def _best_resolution(height_I: FloatArray, width_I: FloatArray, vision: VisionConfig) -> tuple[FloatArray, FloatArray]:
    """`select_best_resolution`: of the pinpoints in their order, the first that no later one beats."""
    best_height_I, best_width_I = np.zeros_like(height_I), np.zeros_like(width_I)
    best_kept_I, best_left_I = np.full_like(height_I, -1.0), np.zeros_like(height_I)
    for height, width in grid_pinpoints(vision):
        scale_I = np.minimum(width / width_I, height / height_I)
        kept_I = np.minimum(np.floor(width_I * scale_I) * np.floor(height_I * scale_I), width_I * height_I)
        left_I = kept_I - height * width
        better_I = (kept_I > best_kept_I) | ((kept_I == best_kept_I) & (left_I > best_left_I))
        for best, value in (
            (best_height_I, height),
            (best_width_I, width),
            (best_kept_I, kept_I),
            (best_left_I, left_I),
        ):
            np.copyto(best, value, where=better_I)
    return best_height_I, best_width_I


def _kept(
    height_I: FloatArray, width_I: FloatArray, rows_I: FloatArray, cols_I: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Rows and columns of cells that are no padding, of a grid of cells; `image_geometry._unpad`."""
    is_wide_I = width_I / height_I > cols_I / rows_I
    content_I = np.where(is_wide_I, height_I * (cols_I / width_I), width_I * (rows_I / height_I))
    # As int(round(content, 7)). A ratio of sizes in pixels is a whole number up to the arithmetic's error, or further
    # than 1 / size from one, so no decimals have to be counted.
    content_I = np.maximum(1.0, np.floor(content_I + 0.5e-7))
    return (
        np.where(is_wide_I, rows_I - 2 * ((rows_I - content_I) // 2), rows_I),
        np.where(is_wide_I, cols_I, cols_I - 2 * ((cols_I - content_I) // 2)),
    )
