"""Captions and questions about a scene, with answers that follow from it."""

from __future__ import annotations

from collections import Counter

from examples.common.questions import Question
from examples.quickstart.scenes import COLOURS, Scene

TYPES = ("colour", "count", "size", "position")
DESCRIBE = "Describe the image."
PLACES = {(0, 0): "northwest", (0, 1): "northeast", (1, 0): "southwest", (1, 1): "southeast"}
"""(row, column) -> name of the place."""


def caption(scene: Scene) -> str:
    """Describe every thing in reading order, so that the caption follows from the scene to the last word."""
    phrases = [f"a {t.size} {t.colour} {t.shape} at the {PLACES[t.row, t.column]}" for t in scene.things]
    return ", ".join(phrases) + "."


def all_questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one answer in this scene."""
    questions = [Question("count", "How many shapes?", str(len(scene.things)))]
    for colour in COLOURS:
        number = sum(t.colour == colour for t in scene.things)
        questions.append(Question("count", f"How many {colour} shapes?", str(number)))
    colours = Counter(t.colour for t in scene.things)
    shapes = Counter(t.shape for t in scene.things)
    for thing in scene.things:
        place = PLACES[thing.row, thing.column]
        questions.append(Question("colour", f"What color is the {place} shape?", thing.colour, place))
        questions.append(Question("size", f"What size is the {place} shape?", thing.size, place))
        if colours[thing.colour] == 1:
            questions.append(Question("size", f"What size is the {thing.colour} shape?", thing.size, place))
            questions.append(Question("position", f"Where is the {thing.colour} shape?", place, place))
        if shapes[thing.shape] == 1:
            questions.append(Question("colour", f"What color is the {thing.shape}?", thing.colour, place))
            questions.append(Question("position", f"Where is the {thing.shape}?", place, place))
    return questions
