"""NLVR's pictures: three boxes side by side, and the exact objects in each (`structured_rep`)."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = ("circle", "square", "triangle")
COLOURS = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
"""The annotation's name in lower case -> ours."""
SIZES = {10: "small", 20: "medium", 30: "large"}
"""Side in pixels -> name."""
PLACES = ("left", "middle", "right")
BOX_PIXELS = 100
"""Side of a box."""
BOX_STRIDE = 150
"""Pixels from one box's left edge to the next one's; between them is a grey bar."""

PERMUTATIONS = tuple(itertools.permutations(range(3)))
"""Image k of an example shows, from left to right, the annotated boxes `PERMUTATIONS[k]`."""


@dataclass(frozen=True, order=True)
class Item:
    """One object in a box; x and y are the pixels of its upper left corner, y growing downwards."""

    y: int
    x: int
    shape: str
    colour: str
    size: str
    side: int


Box = tuple[Item, ...]


@dataclass(frozen=True)
class Example:
    """One line of an NLVR file."""

    identifier: str
    directory: str
    sentence: str
    label: str
    """"true" or "false"."""
    boxes: tuple[Box, ...]
    """The boxes as annotated, which is their order in image 0."""

    def image(self, split: str, permutation: int) -> str:
        """Path of an image below the clone."""
        return f"{split}/images/{self.directory}/{split}-{self.identifier}-{permutation}.png"

    def permuted(self, permutation: int) -> tuple[Box, ...]:
        """The boxes of one image, from left to right."""
        return tuple(self.boxes[i] for i in PERMUTATIONS[permutation])


def read_examples(clone: Path, split: str) -> list[Example]:
    """Read one split of a clone of NLVR.

    Raises:
        ValueError: the split is not there, or a line is not what the corpus documents.
    """
    path = clone / split / f"{split}.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {clone} must be a clone of the NLVR repository's `nlvr` folder")
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            examples.append(_parse(json.loads(line)))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}, line {number} is not an NLVR example: {error!r}") from error
    return examples


def _parse(line: dict[str, Any]) -> Example:
    boxes = tuple(tuple(sorted(_parse_item(item) for item in box)) for box in line["structured_rep"])
    return Example(
        identifier=line["identifier"],
        directory=line["directory"],
        sentence=line["sentence"].strip(),
        label=line["label"],
        boxes=boxes,
    )


def _parse_item(item: dict[str, Any]) -> Item:
    side = int(item["size"])
    return Item(
        y=int(item["y_loc"]),
        x=int(item["x_loc"]),
        shape=item["type"],
        colour=COLOURS[item["color"].lower()],
        size=SIZES[side],
        side=side,
    )
