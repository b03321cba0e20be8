"""NLVR's derived questions against a brute-force reading of the annotations, by hand and on a clone (NLVR_PATH)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.nlvr.pictures import PERMUTATIONS, read_examples
from examples.nlvr.questions import all_questions, caption, is_tower, statement

REPOSITORY = Path(__file__).parents[3]
PLACES = ["left", "middle", "right"]
NAMES = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}
RGB = {"Yellow": (255, 255, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}
SIZES = {10: "small", 20: "medium", 30: "large"}


def item(x: int, y: int, kind: str, color: str, size: int) -> dict:
    return {"x_loc": x, "y_loc": y, "type": kind, "color": color, "size": size}


HAND_MADE = {
    "sentence": "There is a tower with two blocks.",
    "label": "true",
    "identifier": "7-1",
    "directory": "3",
    "evals": {},
    "structured_rep": [
        [item(40, 80, "square", "Black", 20), item(40, 59, "square", "#0099ff", 20)],
        [],
        [
            item(5, 5, "circle", "Yellow", 30),
            item(60, 60, "circle", "Yellow", 10),
            item(20, 80, "triangle", "Black", 20),
        ],
    ],
}


def brute_force(boxes: list[list[dict]], question: str) -> str:
    """The answer, found in the raw annotation without the code that asks."""
    if question == "Which box has the most objects?":
        ranked = sorted(((len(box), place) for box, place in zip(boxes, PLACES, strict=True)), reverse=True)
        assert ranked[0][0] > ranked[1][0]
        return ranked[0][1]
    match = re.search(r" in the (\w+) box\?$", question)
    box = boxes[PLACES.index(match[1])] if match else []
    stem = question[: match.start()] if match else question.rstrip("?")

    def named(words: str, among: list[dict]) -> list[dict]:
        wanted = [word.removesuffix("s") if word not in NAMES.values() else word for word in words.split()]
        return [i for i in among if set(wanted) <= {i["type"], NAMES[i["color"]], SIZES[i["size"]], "object"}]

    if found := re.fullmatch(r"How many boxes have a (.+)", stem):
        return str(sum(bool(named(found[1], box)) for box in boxes))
    if found := re.fullmatch(r"How many (.+) are", stem):
        return str(len(named(found[1], box)))
    if found := re.fullmatch(r"Which box has a (.+)", stem):
        (place,) = [place for box, place in zip(boxes, PLACES, strict=True) if named(found[1], box)]
        return place
    if found := re.fullmatch(r"What color is the (highest|lowest) object", stem):
        edges = [i["y_loc"] if found[1] == "highest" else -(i["y_loc"] + i["size"]) for i in box]
        assert edges.count(min(edges)) == 1
        return NAMES[box[edges.index(min(edges))]["color"]]
    if found := re.fullmatch(r"What (color|size) is the (.+)", stem):
        (only,) = named(found[2], box)
        return NAMES[only["color"]] if found[1] == "color" else SIZES[only["size"]]
    found = re.fullmatch(r"Is the (.+) above or below the (.+)", stem)
    assert found, question
    ((a,), (b,)) = named(found[1], box), named(found[2], box)
    assert a["y_loc"] + a["size"] <= b["y_loc"] or b["y_loc"] + b["size"] <= a["y_loc"]
    return "above" if a["y_loc"] < b["y_loc"] else "below"


@pytest.fixture
def hand_made_clone(tmp_path):
    """A clone with one example per split and real (if blank) images."""
    for split in ("dev", "test"):
        folder = tmp_path / split / "images" / HAND_MADE["directory"]
        folder.mkdir(parents=True)
        (tmp_path / split / f"{split}.json").write_text(json.dumps(HAND_MADE) + "\n")
        for k in range(6):
            Image.new("RGB", (400, 100)).save(folder / f"{split}-{HAND_MADE['identifier']}-{k}.png")
    return tmp_path


def test_questions_of_a_hand_made_example(hand_made_clone):
    (example,) = read_examples(hand_made_clone, "dev")
    assert statement(example).text == "There is a tower with two blocks.\nTrue or false?"
    answers = {q.text: q.answer for q in all_questions(example.permuted(0))}
    assert answers["How many objects are in the left box?"] == "2"
    assert answers["How many objects are in the middle box?"] == "0"
    assert answers["How many yellow objects are in the right box?"] == "2"
    assert answers["What color is the highest object in the left box?"] == "blue"
    assert answers["What color is the lowest object in the right box?"] == "black"
    assert answers["What color is the large circle in the right box?"] == "yellow"
    assert answers["Is the blue square above or below the black square in the left box?"] == "above"
    assert answers["Which box has a black triangle?"] == "right"
    assert answers["How many boxes have a yellow circle?"] == "1"
    # There are two yellow circles, so the question would not say which is meant.
    assert "What size is the yellow circle in the right box?" not in answers
    assert caption(example.permuted(0)) == (
        "The left box has a tower of blue, black. The middle box has nothing. "
        "The right box has 1 large yellow circle, 1 small yellow circle, 1 medium black triangle."
    )
    # Image 4 shows the annotated boxes 2, 0, 1.
    assert {q.text: q.answer for q in all_questions(example.permuted(4))}["Which box has a black triangle?"] == "left"
    assert [is_tower(box) for box in example.boxes] == [True, False, False]


def test_prepared_files_of_a_hand_made_clone(hand_made_clone, tmp_path):
    output = prepare(hand_made_clone, tmp_path / "out")
    assert len(json.loads((output / "instructions.json").read_text())) == 6
    assert len(json.loads((output / "heldout_instructions.json").read_text())) == 1
    check_files(hand_made_clone, output)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1 is not an NLVR example"), ('{"sentence": "x"}', "structured_rep"), (None, "does not exist")],
)
def test_bad_clones(tmp_path, text, message):
    if text is not None:
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / "dev.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path, "dev")


def prepare(clone: Path, output: Path) -> Path:
    command = [sys.executable, "-m", "examples.nlvr.prepare_nlvr", "--nlvr", str(clone), "--output", str(output)]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)
    return output


def raw_boxes(clone: Path) -> dict[str, tuple[dict, list[list[dict]]]]:
    """Image path -> (raw example, its boxes from left to right)."""
    found = {}
    for split in ("dev", "test"):
        for line in (clone / split / f"{split}.json").read_text().splitlines():
            example = json.loads(line)
            for k, order in enumerate(PERMUTATIONS):
                path = f"{split}/images/{example['directory']}/{split}-{example['identifier']}-{k}.png"
                found[path] = (example, [example["structured_rep"][i] for i in order])
    return found


def check_files(clone: Path, output: Path) -> Counter:
    """Check every answer in the files; returns how many there are of each type."""
    images = raw_boxes(clone)

    def check(image: str, question: str, answer: str) -> None:
        example, boxes = images[image]
        if question.endswith("\nTrue or false?"):
            assert question.removesuffix("\nTrue or false?") == example["sentence"].strip()
            assert answer == example["label"]
        else:
            assert answer == brute_force(boxes, question), (image, question)

    for name, split in (("instructions.json", "dev"), ("heldout_instructions.json", "test")):
        for record in json.loads((output / name).read_text()):
            assert record["image"].startswith(f"{split}/")
            turns = record["conversations"]
            for human, gpt in zip(turns[::2], turns[1::2], strict=True):
                check(record["image"], human["value"].removeprefix("<image>\n"), gpt["value"])
    kinds: Counter = Counter()
    for line in (output / "heldout_questions.jsonl").read_text().splitlines():
        q = json.loads(line)
        assert q["image"].startswith("test/")
        assert (clone / q["image"]).is_file()
        check(q["image"], q["text"], q["answer"])
        kinds[q["type"]] += 1
    return kinds


@pytest.fixture(scope="module")
def clone() -> Path:
    if "NLVR_PATH" not in os.environ:
        pytest.skip("NLVR_PATH does not name a clone of NLVR")
    return Path(os.environ["NLVR_PATH"])


def test_prepared_files_of_a_real_clone(clone, tmp_path):
    kinds = check_files(clone, prepare(clone, tmp_path))
    assert set(kinds) == {"statement", "count", "colour", "size", "position"}
    assert kinds["statement"] == len(read_examples(clone, "test"))


def test_images_show_the_permuted_boxes(clone):
    """At the centre of every object that no later one covers, image k has that object's colour."""
    checked = 0
    for path, (_, boxes) in list(raw_boxes(clone).items())[:600]:
        pixels = np.asarray(Image.open(clone / path).convert("RGB")).astype(int)
        for slot, box in enumerate(boxes):
            for i in box:
                x, y = 150 * slot + i["x_loc"] + i["size"] // 2, i["y_loc"] + int(0.6 * i["size"])
                if y < 100 and x < 150 * slot + 100:
                    assert np.abs(pixels[y, x] - RGB[i["color"]]).sum() < 60, (path, i)
                    checked += 1
    assert checked > 1000
