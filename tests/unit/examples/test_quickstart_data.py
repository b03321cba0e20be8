"""The demo data: answers follow from the captions, scenes of the splits are disjoint, pixels show the scene."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.common.questions import BalancedChooser, Question
from examples.quickstart.scenes import (
    CELL_PIXELS,
    COLOURS,
    GRID,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    render,
    sample_scenes,
)

REPOSITORY = Path(__file__).parents[3]
PLACES = ["northwest", "northeast", "southwest", "southeast"]
PHRASE = re.compile(r"a (\w+) (\w+) (\w+) at the (\w+)")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small demo data set, made by the command that users run."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "examples.quickstart.make_demo_data", "--output", str(folder)]
    sizes = ["--train-scenes", "120", "--text-scenes", "150", "--heldout-scenes", "60", "--workers", "1"]
    subprocess.run([*command, *sizes], check=True, cwd=REPOSITORY, capture_output=True)
    return folder


def records(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name).read_text())


def parse_caption(text: str) -> dict[int, tuple[str, str, str]]:
    """Caption -> {cell: (size, colour, shape)}, written down without the code that makes captions."""
    found = PHRASE.findall(text)
    assert len(found) == text.count(" at the "), text
    return {PLACES.index(place): (size, colour, shape) for size, colour, shape, place in found}


def scene_of_image(folder: Path, image: str) -> dict[int, tuple[str, str, str]]:
    for name in ("captions.json", "heldout_captions.json"):
        for record in records(folder, name):
            if record["image"] == image:
                return parse_caption(record["conversations"][1]["value"])
    raise AssertionError(f"{image} has no caption")


def brute_force(scene: dict[int, tuple[str, str, str]], question: str) -> str:
    """The answer, found by looking at every thing."""
    if question == "How many shapes?":
        return str(len(scene))
    if match := re.fullmatch(r"How many (\w+) shapes\?", question):
        return str(sum(colour == match[1] for _, colour, _ in scene.values()))
    match = re.fullmatch(r"(?:What (color|size)|Where) is the (\w+)( shape)?\?", question)
    assert match, question
    found = [(cell, thing) for cell, thing in scene.items() if match[2] in (PLACES[cell], *thing[1:])]
    ((cell, (size, colour, _)),) = found  # exactly one, or the question has no single answer
    return {"color": colour, "size": size, None: PLACES[cell]}[match[1]]


@pytest.mark.parametrize("name", ["instructions.json", "heldout_instructions.json"])
def test_answers_about_images_follow_from_the_scene(demo, name):
    asked: Counter[str] = Counter()
    for record in records(demo, name):
        scene = scene_of_image(demo, record["image"])
        turns = record["conversations"]
        assert turns[0]["value"].startswith("<image>\n")
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            question = human["value"].removeprefix("<image>\n")
            assert gpt["value"] == brute_force(scene, question), (record, question)
            asked[question.split()[0]] += 1
    assert set(asked) == {"How", "What", "Where"}


@pytest.mark.parametrize("name", ["texts.json", "heldout_texts.json"])
def test_answers_about_texts_follow_from_the_text(demo, name):
    for record in records(demo, name):
        assert "image" not in record
        turns = record["conversations"]
        description, first = turns[0]["value"].split("\n")
        for human, gpt in zip([first, *(t["value"] for t in turns[2::2])], turns[1::2], strict=True):
            assert gpt["value"] == brute_force(parse_caption(description), human)


def test_held_out_questions(demo):
    questions = [json.loads(line) for line in (demo / "heldout_questions.jsonl").read_text().splitlines()]
    assert {q["type"] for q in questions} == {"colour", "count", "size", "position"}
    assert len({q["question_id"] for q in questions}) == len(questions)
    for q in questions:
        assert q["answer"] == brute_force(scene_of_image(demo, q["image"]), q["text"])
        assert (demo / "images" / q["image"]).is_file()
    for kind, most in (("colour", 0.3), ("count", 0.35), ("size", 0.55), ("position", 0.3)):
        answers = Counter(q["answer"] for q in questions if q["type"] == kind)
        assert max(answers.values()) / answers.total() <= most, answers


def test_no_scene_is_in_two_splits(demo):
    def scenes(*names: str) -> set[frozenset]:
        found = set()
        for name in names:
            for record in records(demo, name):
                turns = record["conversations"]
                text = turns[0]["value"] if "texts" in name else turns[1]["value"]
                found.add(frozenset(parse_caption(text.split("\n")[0]).items()))
        return found

    train_images, train_texts = scenes("captions.json"), scenes("texts.json")
    heldout = scenes("heldout_captions.json")
    assert min(len(train_images), len(train_texts), len(heldout)) > 30
    assert not train_images & heldout
    assert not train_texts & heldout
    assert scenes("heldout_texts.json") == heldout
    for name in ("instructions.json", "captions.json"):
        assert all(record["image"].startswith("train/") for record in records(demo, name))


def test_data_depend_on_the_seed_alone(demo, tmp_path):
    command = [sys.executable, "-m", "examples.quickstart.make_demo_data", "--output", str(tmp_path)]
    sizes = ["--train-scenes", "120", "--text-scenes", "150", "--heldout-scenes", "60", "--workers", "2"]
    subprocess.run([*command, *sizes], check=True, cwd=REPOSITORY, capture_output=True)
    for path in demo.rglob("*.*"):
        assert (tmp_path / path.relative_to(demo)).read_bytes() == path.read_bytes(), path


def test_splits_are_decided_by_the_key():
    heldout, train = (
        {scene.key for scene in sample_scenes(1500, random.Random(0), held_out=held_out)} for held_out in (True, False)
    )
    assert not heldout & train
    assert len(heldout) > 200


def test_keys_ignore_everything_but_the_things():
    a, b = Thing(0, 1, "circle", "red", "small"), Thing(1, 0, "square", "blue", "large")
    assert Scene((a, b)).key != Scene((a,)).key
    first, second = (np.asarray(render(Scene((a, b)), random.Random(seed))) for seed in (1, 2))
    assert (first != second).any()


def test_pixels_show_the_scene():
    for number, scene in enumerate(sample_scenes(50, random.Random(3), held_out=False)):
        pixels = np.asarray(render(scene, random.Random(number))).astype(int)
        shown = {}
        for cell in range(GRID * GRID):
            row, column = divmod(cell, GRID)
            y, x = int((row + 0.5) * CELL_PIXELS), int((column + 0.5) * CELL_PIXELS)
            centre = pixels[y - 1 : y + 1, x - 1 : x + 1].mean(axis=(0, 1))
            distances = {name: np.abs(centre - rgb).sum() for name, rgb in COLOURS.items()}
            nearest = min(distances, key=distances.__getitem__)
            if distances[nearest] < 30:
                shown[cell] = nearest
        assert shown == {t.row * GRID + t.column: t.colour for t in scene.things}


def test_large_shapes_cover_more_pixels_than_small_ones_and_shapes_differ():
    def area(shape: str, size: str) -> int:
        pixels = np.asarray(render(Scene((Thing(1, 1, shape, "red", size),)), random.Random(0))).astype(int)
        return int((np.abs(pixels - COLOURS["red"]).sum(axis=-1) < 30).sum())

    areas = {(shape, size): area(shape, size) for shape in SHAPES for size in SIZES}
    for shape in SHAPES:
        assert areas[shape, "large"] > 2 * areas[shape, "small"]
    assert areas["square", "large"] > areas["circle", "large"] > areas["triangle", "large"]


def test_chooser_balances_answers():
    chooser = BalancedChooser(random.Random(0))
    # Nine of ten candidates have the answer "0".
    candidates = [Question("count", f"q{i}", "0" if i else "1") for i in range(10)]
    chosen = [chooser.choose(candidates, ["count"])[0] for _ in range(100)]
    assert Counter(q.answer for q in chosen) == {"0": 50, "1": 50}
    twice = chooser.choose(candidates[:2], ["count", "count", "count", "size"])
    assert sorted(q.text for q in twice) == ["q0", "q1"]


def test_images_are_rgb_of_the_documented_size(demo):
    image = Image.open(demo / "images/train/000000.png")
    assert (image.size, image.mode) == ((GRID * CELL_PIXELS, GRID * CELL_PIXELS), "RGB")
