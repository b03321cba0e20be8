"""Scenes of simple shapes, one in each corner at most: what they are, and how they are drawn and rendered."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 215, 50),
}
SIZES = {"small": 14.0, "large": 26.0}
"""Name of a size -> diameter in pixels."""

GRID = 2
CELL_PIXELS = 32
IMAGE_PIXELS = GRID * CELL_PIXELS
MAX_OBJECTS = 3
_JITTER_PIXELS = 2.0
_SUPERSAMPLING = 4


@dataclass(frozen=True, order=True)
class Thing:
    """One shape in the grid. Things sort in reading order: by row, then by column."""

    row: int
    column: int
    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Things in reading order, at most one in a cell."""

    things: tuple[Thing, ...]

    @property
    def key(self) -> tuple[Thing, ...]:
        """Equal exactly for scenes that show the same: background and jitter do not count."""
        return self.things


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene of 1 to MAX_OBJECTS things.

    In half of the scenes every thing repeats one attribute of the first with probability one half; without that, a
    count above two would be rare.
    """
    count = rng.randint(1, MAX_OBJECTS)
    cells = rng.sample(range(GRID * GRID), count)
    repeated = rng.choice(("shape", "colour", "nothing", "nothing"))
    things: list[Thing] = []
    for cell in cells:
        shape, colour, size = rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))
        if things and rng.random() < 0.5:
            shape = things[0].shape if repeated == "shape" else shape
            colour = things[0].colour if repeated == "colour" else colour
        things.append(Thing(cell // GRID, cell % GRID, shape, colour, size))
    return Scene(tuple(sorted(things)))


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept from training: one in ten is, chosen by what it shows."""
    return zlib.crc32(repr(scene.key).encode()) % 10 == 0


def sample_scenes(count: int, rng: random.Random, *, held_out: bool) -> list[Scene]:
    """Draw `count` scenes that are held out, or that are not. A scene may come up again, in another rendering."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if is_held_out(scene) == held_out:
            scenes.append(scene)
    return scenes


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw the scene as an RGB image of IMAGE_PIXELS squared; grey level and jitter come from `rng`."""
    scale = _SUPERSAMPLING
    grey = rng.randint(60, 140)
    image = Image.new("RGB", (IMAGE_PIXELS * scale, IMAGE_PIXELS * scale), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        x = (thing.column + 0.5) * CELL_PIXELS + rng.uniform(-_JITTER_PIXELS, _JITTER_PIXELS)
        y = (thing.row + 0.5) * CELL_PIXELS + rng.uniform(-_JITTER_PIXELS, _JITTER_PIXELS)
        _draw_shape(draw, thing.shape, COLOURS[thing.colour], x * scale, y * scale, SIZES[thing.size] * scale / 2)
    return image.resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.BOX)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, radius: float
) -> None:
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon(((x, top), (right, bottom), (left, bottom)), fill=colour)
    else:
        raise ValueError(f"unknown shape {shape!r}: expected one of {SHAPES}")
