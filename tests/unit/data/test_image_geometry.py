"""Layouts against a cell-by-cell reference that follows the rules literally."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_counts import count_image_tokens
from megatron_haplovl.data.image_geometry import fit_within, grid_pinpoints, image_layout
from tests.fixtures.visual_rule import Token, tokens_of_image

SMALL = VisionConfig(patch_size=8, image_size=32, image_aspect_ratio="anyres", max_tiles=4, image_newline=True)


@pytest.mark.parametrize("newline", [True, False])
def test_anyres_against_the_reference(newline: bool) -> None:
    vision = VisionConfig(patch_size=8, image_size=32, image_aspect_ratio="anyres", max_tiles=6, image_newline=newline)
    random = np.random.default_rng(0)
    sizes = [(1, 1), (1, 1000), (1000, 1), (32, 32), (64, 64), (33, 31), (96, 64), (64, 96)]
    sizes += [(int(h), int(w)) for h, w in random.integers(1, 300, size=(150, 2))]
    for height, width in sizes:
        layout = image_layout(height, width, vision)
        expected = tokens_of_image(height, width, vision, vision.max_tiles)
        assert layout.num_tokens == len(expected) > 0
        tokens: list[Token] = [""] * len(expected)
        for target, source in zip(layout.patch_offsets(), layout.patch_source(), strict=True):
            tile, cell = divmod(int(source), vision.cells_per_tile)
            tokens[target] = (tile, *divmod(cell, vision.cells_per_side))
        for target in layout.newline_offsets():
            tokens[target] = "newline"
        assert tokens == expected, (height, width)


def test_by_hand() -> None:
    # 40 x 100 pixels fit best into one row of three tiles (32 x 96): 4 rows of cells by 12; the image fills the width,
    # its height is 40 * 12 / 100 = 4.8 rows: all 4 stay.
    layout = image_layout(40, 100, SMALL)
    assert (layout.tile_rows, layout.tile_cols, layout.rows, layout.cols) == (2, 2, 4, 8) or layout.num_tiles <= 4
    # 64 x 32 in a 2 x 1 grid: nothing is cut.
    layout = image_layout(64, 32, SMALL)
    assert (layout.tile_rows, layout.tile_cols, layout.rows, layout.cols) == (2, 1, 8, 4)
    assert layout.num_tokens == 8 * 5 and layout.num_patches == 32
    # 64 x 60: the 2 x 2 grid keeps it all; 60 * 8 / 64 = 7.5 columns remain 8 (an odd column is not cut).
    layout = image_layout(64, 60, SMALL)
    assert (layout.num_tiles, layout.rows, layout.cols) == (4, 8, 8)
    # 64 x 40: 40 * 8 / 64 = 5 columns; (8 - 5) // 2 = 1 is cut on each side.
    layout = image_layout(64, 40, SMALL)
    assert (layout.rows, layout.first_col, layout.cols) == (8, 1, 6)


@pytest.mark.parametrize("mode", ["pad", "resize"])
@pytest.mark.parametrize("newline", [True, False])
def test_fixed_resolution(mode: str, newline: bool) -> None:
    vision = VisionConfig(patch_size=14, image_size=336, image_aspect_ratio=mode, image_newline=newline)
    layout = image_layout(17, 900, vision)
    assert layout.num_tiles == 1
    assert layout.num_patches == 576
    assert layout.num_tokens == 576 + 24 * newline
    assert layout.patch_source().tolist() == list(range(576))


def test_pinpoints_include_the_single_tile_and_stay_below_the_limit() -> None:
    pinpoints = grid_pinpoints(VisionConfig(image_aspect_ratio="anyres", max_tiles=6))
    tiles = [h * w // 336**2 for h, w in pinpoints]
    assert pinpoints[0] == (336, 336)
    assert len(set(pinpoints)) == len(pinpoints) == 14
    assert max(tiles) == 6 and (672, 1008) in pinpoints


def test_fit_keeps_the_shape_and_rounds_up() -> None:
    assert fit_within(50, 100, 64, 64) == (32, 64)
    assert fit_within(100, 33, 64, 64) == (64, 22)
    assert fit_within(1000, 1, 64, 64) == (64, 1)


@pytest.mark.parametrize(
    "vision",
    [
        SMALL,
        VisionConfig(image_aspect_ratio="anyres", max_tiles=4, image_newline=True),
        VisionConfig(image_aspect_ratio="anyres", max_tiles=9),
        VisionConfig(image_aspect_ratio="pad", image_newline=True),
    ],
    ids=["small", "4 tiles", "9 tiles", "pad"],
)
def test_counts_of_many_images(vision: VisionConfig) -> None:
    random = np.random.default_rng(1)
    # Usual sizes, those whose cells come out as a whole number, and slivers.
    sizes = [random.integers(1, 1500, (2000, 2)), 14 * random.integers(1, 80, (500, 2))]
    sizes_I2 = np.concatenate([*sizes, np.exp(random.uniform(0, 11, (500, 2)))]).astype(np.int32)
    tokens, patches, tiles = count_image_tokens(sizes_I2, vision)
    layouts = [image_layout(int(h), int(w), vision) for h, w in sizes_I2]
    assert tokens.tolist() == [layout.num_tokens for layout in layouts]
    assert patches.tolist() == [layout.num_patches for layout in layouts]
    assert tiles.tolist() == [layout.num_tiles for layout in layouts]
    assert count_image_tokens(np.zeros((0, 2), np.int32), vision)[0].shape == (0,)


def test_no_image() -> None:
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        image_layout(0, 5, SMALL)


def test_images_need_no_torch() -> None:
    code = "import sys, megatron_haplovl.data.image_processing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
