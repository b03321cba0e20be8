from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_haplovl.evaluation.questions import UNTYPED, Question, load_questions
from tests.fixtures.tiny_haplo import noise_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("one.png", "two.png"):
        noise_image(8, 8).save(folder / name)
    return folder


def _write(folder: Path, *records: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_every_form(tmp_path: Path, images: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " a cat "}]
    records = [
        {"question_id": 5, "image": "one.png", "text": "Which?", "answer": "red", "category": "color"},
        {"id": "x", "image": ["one.png", "two.png"], "question": "Same?", "label": "no", "type": "pair"},
        {"image": "two.png", "conversations": turns, "question_type": "name"},
        {"text": "One and one?", "answer": 2},
    ]
    one, two = images / "one.png", images / "two.png"
    expected = [
        Question("5", "<image>\nWhich?", (one,), "red", "color"),
        Question("x", "<image>\n<image>\nSame?", (one, two), "no", "pair"),
        Question("line 3", "<image>\nWhat?", (two,), "a cat", "name"),
        Question("line 4", "One and one?", (), "2", UNTYPED),
    ]
    assert load_questions(_write(tmp_path, *records), images) == expected
    as_list = tmp_path / "questions.json"
    as_list.write_text(json.dumps(records[:2]))
    assert load_questions(as_list, images) == expected[:2]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "Which?"}, "line 2: the question has no answer"),
        ({"text": "Which?", "answer": " "}, "no answer"),
        ({"answer": "red"}, "no text"),
        ({"text": "Which?", "answer": "red", "image": "three.png"}, r"line 2: .*three\.png"),
        ({"text": "Which?", "answer": "red", "image": "../secret.png"}, r"secret\.png"),
        ({"text": "<image> <image>?", "answer": "red", "image": "one.png"}, "2 <image> marks in the text, 1 images"),
        ({"text": "<image>?", "answer": "red"}, "1 <image> marks in the text, 0 images"),
        ({"text": "Which?", "answer": "red", "image": 3}, "`image` must be a path"),
        ({"conversations": [{"from": "human", "value": "Which?"}]}, "no answer"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "one turn from human and one from gpt"),
        ({"conversations": []}, "not a list of turns"),
        ([1], "must be an object"),
    ],
)
def test_bad_questions(tmp_path: Path, images: Path, record: object, message: str) -> None:
    good = {"text": "Which?", "answer": "red", "image": "one.png"}
    with pytest.raises(ValueError, match=message):
        load_questions(_write(tmp_path, good, record), images)


def test_bad_files(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_questions(tmp_path / "missing.jsonl", images)
    with pytest.raises(ValueError, match="holds no questions"):
        load_questions(_write(tmp_path), images)
    with pytest.raises(ValueError, match="no such image folder"):
        load_questions(_write(tmp_path), tmp_path / "missing")
    with pytest.raises(ValueError, match="no --image-folder"):
        load_questions(_write(tmp_path, {"text": "?", "answer": "a", "image": "one.png"}), None)
    (tmp_path / "questions.jsonl").write_text('{"text": ')
    with pytest.raises(ValueError, match="line 1"):
        load_questions(tmp_path / "questions.jsonl", images)


def test_answers_may_be_left_out_where_nobody_compares(tmp_path: Path, images: Path) -> None:
    path = _write(tmp_path, {"text": "Which?", "image": "one.png"}, {"text": "How many?", "answer": 2})
    assert [question.answer for question in load_questions(path, images, needs_answers=False)] == ["", "2"]
    with pytest.raises(ValueError, match="but no --sample-image-folder is given"):
        load_questions(path, None, needs_answers=False, folder_flag="--sample-image-folder")
