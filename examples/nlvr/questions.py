"""Captions and fine-grained questions that follow from NLVR's structured annotations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from examples.common.questions import Question
from examples.nlvr.pictures import COLOURS, PLACES, SHAPES, Box, Example, Item

STATEMENT = "statement"
TYPES = ("colour", "count", "size", "position")
"""Types of the derived questions. Human sentences have the type STATEMENT."""
DESCRIBE = "Describe the image."

_MIN_HEIGHT_DIFFERENCE = 10
"""Pixels by which one object must be higher than another before we ask which one is."""
_TOWER_X, _TOWER_SIDE = 40, 20
"""NLVR's towers are medium squares piled up in the middle of a box."""


def statement(example: Example) -> Question:
    """A human's sentence as a question; its answer holds for all six orders of the boxes."""
    return Question(STATEMENT, f"{example.sentence}\nTrue or false?", example.label)


def caption(boxes: Sequence[Box]) -> str:
    """Say what each box holds: a tower from top to bottom, scattered objects by kind."""
    return " ".join(f"The {place} box has {contents(box)}." for place, box in zip(PLACES, boxes, strict=True))


def contents(box: Box) -> str:
    """Say what one box holds."""
    if is_tower(box):
        return "a tower of " + ", ".join(item.colour for item in box)
    kinds = Counter((item.size, item.colour, item.shape) for item in sorted(box, key=_kind_order))
    return ", ".join(f"{number} {' '.join(kind)}{'s' * (number > 1)}" for kind, number in kinds.items()) or "nothing"


def is_tower(box: Box) -> bool:
    """True for a pile of medium squares."""
    return bool(box) and all(item.shape == "square" and item.x == _TOWER_X and item.side == _TOWER_SIDE for item in box)


def all_questions(boxes: Sequence[Box]) -> list[Question]:
    """Every derived question with exactly one answer about the boxes in this order."""
    inside = [q for place, box in zip(PLACES, boxes, strict=True) for q in _about_one_box(place, box)]
    return inside + list(_across_boxes(boxes))


def _about_one_box(place: str, box: Box) -> Iterator[Question]:
    where = f"in the {place} box"
    yield Question("count", f"How many objects are {where}?", str(len(box)))
    for colour in COLOURS.values():
        yield Question("count", f"How many {colour} objects are {where}?", str(sum(i.colour == colour for i in box)))
    for shape in SHAPES:
        yield Question("count", f"How many {shape}s are {where}?", str(sum(i.shape == shape for i in box)))

    for item in box:
        if sum((i.size, i.shape) == (item.size, item.shape) for i in box) == 1:
            yield Question("colour", f"What color is the {item.size} {item.shape} {where}?", item.colour)
        # Every block of a tower is medium: nothing to see.
        if not is_tower(box) and sum((i.colour, i.shape) == (item.colour, item.shape) for i in box) == 1:
            yield Question("size", f"What size is the {item.colour} {item.shape} {where}?", item.size)
    highest = _extreme(box, [item.y for item in box])
    if highest is not None:
        yield Question("colour", f"What color is the highest object {where}?", highest.colour)
    lowest = _extreme(box, [-(item.y + item.side) for item in box])
    if lowest is not None:
        yield Question("colour", f"What color is the lowest object {where}?", lowest.colour)

    for a, b in itertools.permutations(_unique_items(box), 2):
        if a.y + a.side <= b.y:
            answer = "above"
        elif b.y + b.side <= a.y:
            answer = "below"
        else:
            continue
        text = f"Is the {a.colour} {a.shape} above or below the {b.colour} {b.shape} {where}?"
        yield Question("position", text, answer)


def _across_boxes(boxes: Sequence[Box]) -> Iterator[Question]:
    for colour, shape in itertools.product(COLOURS.values(), SHAPES):
        holders = [
            place
            for place, box in zip(PLACES, boxes, strict=True)
            if any((i.colour, i.shape) == (colour, shape) for i in box)
        ]
        yield Question("count", f"How many boxes have a {colour} {shape}?", str(len(holders)))
        if len(holders) == 1:
            yield Question("position", f"Which box has a {colour} {shape}?", holders[0])
    sizes = [len(box) for box in boxes]
    if sizes.count(max(sizes)) == 1:
        yield Question("position", "Which box has the most objects?", PLACES[sizes.index(max(sizes))])


def _unique_items(box: Box) -> list[Item]:
    """Items that colour and shape name without doubt."""
    kinds = Counter((item.colour, item.shape) for item in box)
    return [item for item in box if kinds[item.colour, item.shape] == 1]


def _extreme(box: Box, keys: Sequence[int]) -> Item | None:
    """The item with the smallest key, if it is smaller than every other by a visible difference."""
    if not box:
        return None
    order = sorted(range(len(box)), key=keys.__getitem__)
    if len(box) > 1 and keys[order[1]] - keys[order[0]] < _MIN_HEIGHT_DIFFERENCE:
        return None
    return box[order[0]]


def _kind_order(item: Item) -> tuple[str, str, str]:
    return item.shape, item.colour, item.size
