"""The examples of docs/data.md, "Several images and videos", are what the rule gives."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.data.image_geometry import Frames, Picture, visual_layouts

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `((?:\d+x\d+|video of \d+)[^`]*)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
VISION = MODELS["haplovl-8b-mi"].vision


def test_the_table_is_found() -> None:
    assert len(ROWS) == 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_tiles_and_tokens_of_a_sample(row: tuple[str, ...]) -> None:
    sample: list[Picture | Frames] = []
    for visual in row[0].split(", "):
        size = visual.split("x")
        sample.append(Picture(*map(int, size)) if len(size) == 2 else Frames(int(visual.removeprefix("video of "))))
    layouts = visual_layouts(sample, VISION)
    shared = visual_layouts(sample, dataclasses.replace(VISION, image_token_budget=4608))
    found = [sum(layout.num_tiles for layout in layouts)]
    found += [sum(layout.num_tokens for layout in these) for these in (layouts, shared)]
    assert [int(number.replace(",", "")) for number in row[1:]] == found
