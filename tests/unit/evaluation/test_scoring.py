from __future__ import annotations

import pytest

from megatron_haplovl.evaluation.scoring import normalize_answer, score_answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red.", "red"),
        ("  The  RED   circle! ", "red circle"),
        ("A cat and an owl", "cat and owl"),
        ("three", "3"),
        ("There are Twelve.", "there are 12"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("3.50", "3.50"),
        ("It is 3.5.", "it is 3.5"),
        ("(3.5)", "3.5"),
        ("-4", "-4"),
        ("3-4", "3 4"),
        ("top-left", "top left"),
        ("top_left", "top left"),
        ("don’t", "dont"),
        ("don't", "dont"),
        ("10cm", "10cm"),
        ("A", "a"),
        ("A.", "a"),
        ("the", "the"),
        ("Ｒｅｄ", "red"),
        ("ÉCOLE", "école"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_scores_by_hand() -> None:
    types = ["color"] * 4 + ["count"] * 3
    answers = ["red", "Red", "blue", "green", "2", "three", "4"]
    predictions = ["Red.", "blue", "blue", "a green", "two", "3", "five"]
    report = score_answers(predictions, answers, types)
    color, count = report.per_type["color"], report.per_type["count"]
    assert (color.count, color.correct, color.majority_correct, color.majority_answer) == (4, 3, 2, "red")
    # The first in the alphabet of three equally frequent answers.
    assert (count.count, count.correct, count.majority_correct, count.majority_answer) == (3, 2, 1, "2")
    assert report.total.accuracy == 5 / 7
    assert report.total.majority_accuracy == 3 / 7
    summary = report.to_dict()
    assert summary["accuracy"] == 5 / 7
    assert summary["per_type"]["color"] == {
        "accuracy": 0.75,
        "majority_accuracy": 0.5,
        "count": 4,
        "majority_answer": "red",
    }
    table = report.table().splitlines()
    assert table[1].split() == ["color", "4", "75.0%", "50.0%", "red"]
    assert table[-1].split() == ["all", "questions", "7", "71.4%", "42.9%"]


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="0 predictions"):
        score_answers([], [], [])
    with pytest.raises(ValueError, match="1 predictions, 2 answers"):
        score_answers(["a"], ["a", "b"], ["x", "x"])
