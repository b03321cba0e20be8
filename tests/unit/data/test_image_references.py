"""Counts of whole data sets against the rule of tiles spelled out, and references that no data set may have.

Planted once to see these tests fail: videos that do not count as one of several, and the tiles of one image for all.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import Frames, Picture, VisualLayout, visual_layouts
from megatron_haplovl.data.image_references import ImageReferences, split_references
from tests.fixtures.visual_rule import Token, blocks_of_sample

SAMPLES = 1000
COUNTED = ("num_tokens", "num_patches", "num_tiles")


def some_vision(random: np.random.Generator) -> VisionConfig:
    """Any way to see images that a run may have, with small tiles."""
    patch, per_side = int(random.integers(2, 5)), int(random.integers(1, 5))
    mode = str(random.choice(["pad", "resize", "anyres", "anyres", "anyres"]))
    max_tiles = int(random.integers(2, 8))
    budget = int(random.integers(per_side**2, 5 * max_tiles * per_side**2))
    return VisionConfig(
        patch_size=patch,
        image_size=patch * per_side,
        image_aspect_ratio=mode,
        max_tiles=max_tiles,
        image_newline=bool(random.integers(2)),
        image_token_budget=budget if mode == "anyres" and random.integers(2) else None,
    )


def some_sample(random: np.random.Generator, num_images: int) -> list[int | list[int]]:
    """Numbers of images, and for a video a list of its frames' numbers."""
    sample: list[int | list[int]] = []
    for _ in range(int(random.choice([0, 1, 1, 2, 3, 5, 9]))):
        if random.integers(3):
            sample.append(int(random.integers(num_images)))
        else:
            sample.append(random.integers(num_images, size=int(random.integers(1, 12))).tolist())
    return sample


def references_of(samples: list[list[int | list[int]]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """All sequences one behind the other, and the length of each, as the files hold them."""
    rows: list[list[int]] = []
    for sample in samples:
        rows.append([])
        for visual in sample:
            rows[-1] += [-len(visual), *visual] if isinstance(visual, list) else [visual]
    flat = np.array([number for row in rows for number in row], dtype=np.int32)
    return flat, np.array([len(row) for row in rows], dtype=np.int32)


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_the_rule_spelled_out(seed: int) -> None:
    random = np.random.default_rng(seed)
    vision = some_vision(random)
    sizes = np.exp(random.uniform(0, 5, size=(200, 2))).astype(np.int32)
    samples = [some_sample(random, len(sizes)) for _ in range(SAMPLES)]
    flat, lengths = references_of(samples)
    references = ImageReferences(flat, lengths, len(sizes))
    rows = np.split(flat, np.cumsum(lengths)[:-1])
    assert [split_references(row.tolist(), len(sizes)) for row in rows] == samples
    assert references.visuals.tolist() == [len(sample) for sample in samples]
    counts = references.count(sizes, vision)
    counted = np.stack([counts.tokens, counts.patches, counts.tiles], axis=1).tolist()
    for sample, numbers, pairs in zip(samples, counted, counts.pairs.tolist(), strict=True):
        shapes = [Frames(len(v)) if isinstance(v, list) else Picture(*map(int, sizes[v])) for v in sample]
        blocks, tiles = blocks_of_sample(shapes, vision)
        patches = sum(token != "newline" for block in blocks for token in block)
        assert numbers == [sum(map(len, blocks)), patches, tiles], (shapes, vision)
        assert pairs == sum(len(block) * (len(block) - 1) // 2 for block in blocks), (shapes, vision)
        layouts = visual_layouts(shapes, vision)
        assert numbers == [sum(getattr(layout, name) for layout in layouts) for name in COUNTED], (shapes, vision)
        assert laid_out_tokens(layouts, vision) == blocks, (shapes, vision)


def laid_out_tokens(layouts: list[VisualLayout], vision: VisionConfig) -> list[list[Token]]:
    """The tokens that layouts describe, in the form of :func:`blocks_of_sample`."""
    blocks: list[list[Token]] = []
    tiles = 0
    for layout in layouts:
        for block in layout.blocks:
            tokens: list[Token] = [""] * block.num_tokens
            for target, source in zip(block.patch_offsets(), block.patch_source(), strict=True):
                tile, cell = divmod(int(source), vision.cells_per_tile)
                tokens[target] = (tiles + tile, *divmod(cell, vision.cells_per_side))
            for target in block.newline_offsets():
                tokens[target] = "newline"
            blocks.append(tokens)
            tiles += block.num_tiles
        if layout.closing_newline:
            blocks.append(["newline"])
    return blocks


def test_tiles_by_hand() -> None:
    """Tiles of 2 x 2 patches, up to four; a square image of two tiles a side."""
    vision = VisionConfig(4, 8, "anyres", max_tiles=4, image_newline=True)
    image, video = Picture(16, 16), Frames(3)
    cases: list[tuple[list[Picture | Frames], int | None, list[int]]] = [
        ([image], None, [20]),
        ([image, image], None, [6, 6]),
        ([image, image], 31, [6, 6]),  # 15 patches each: one tile, because 2 x 1 tiles keep less of a square
        ([image, image], 32, [20, 20]),
        ([image, image], 10**6, [20, 20]),
        ([image, image, image], 32, [6, 6, 6]),
        ([video], None, [13]),
        ([image, video], None, [6, 13]),
        ([image, video], 32, [20, 13]),
    ]
    for visuals, budget, tokens in cases:
        given = dataclasses.replace(vision, image_token_budget=budget)
        assert [layout.num_tokens for layout in visual_layouts(visuals, given)] == tokens, (visuals, budget)


@pytest.mark.parametrize(
    ("flat", "lengths", "message"),
    [
        ([0, 1, 3], [2, 1], "image 3, but there are 3"),
        ([-2, 0, 1, 3], [4], "image 3, but there are 3"),
        ([-3, 0, 1], [3], "a video with more frames than follow"),
        ([-2, 0, 1], [2, 1], "a video with more frames than follow"),
        ([-2, 0, -1, 1], [4], "a video with more frames than follow"),
        ([0, -1], [2], "a video with more frames than follow"),
        ([-(2**31)], [1], "a video with more frames than follow"),
        ([-1, -1, 0], [3], "a video with more frames than follow"),
    ],
)
def test_damaged_references(flat: list[int], lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageReferences(np.array(flat, np.int32), np.array(lengths, np.int32), 3)
    with pytest.raises(ValueError, match=message):
        for row in np.split(np.array(flat, np.int32), np.cumsum(lengths)[:-1]):
            split_references(row.tolist(), 3)


def test_no_sample_has_a_visual() -> None:
    references = ImageReferences(np.zeros(0, np.int32), np.zeros(3, np.int32), 0)
    counts = references.count(np.zeros((0, 2), np.int32), VisionConfig())
    assert [count.tolist() for count in vars(counts).values()] == [[0, 0, 0]] * 4
