"""Exact match after normalisation, by question type, beside the best constant answer."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# A number with its sign and decimals, or a word; everything else is punctuation.
_TOKEN = re.compile(r"(?:(?<!\S)-)?\d+(?:\.\d+)?(?!\w)|[^\W_]+")
_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}\b)")
_APOSTROPHE = re.compile("['\u2019`]")


def normalize_answer(text: str) -> str:
    """Reduce an answer to what it says.

    Lower case, without punctuation, articles and superfluous spaces, and with the numbers zero to twenty as digits.
    Decimal points and signs of numbers stay. An answer that is nothing but an article stays ("A" is a choice).
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = _APOSTROPHE.sub("", _THOUSANDS_SEPARATOR.sub("", text))
    words = [_DIGITS.get(word, word) for word in _TOKEN.findall(text)]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


@dataclass(frozen=True)
class Score:
    """Accuracy on one kind of question."""

    count: int
    correct: int
    majority_correct: int
    """Questions that are right if the most frequent answer of their type is always given."""
    majority_answer: str | None
    """The most frequent answer, normalised; None for several types together."""

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count

    @property
    def majority_accuracy(self) -> float:
        """Share that the majority answer gets right, 0 to 1."""
        return self.majority_correct / self.count

    def to_dict(self) -> dict[str, Any]:
        """Values for a JSON summary."""
        summary: dict[str, Any] = {
            "accuracy": self.accuracy,
            "majority_accuracy": self.majority_accuracy,
            "count": self.count,
        }
        return summary if self.majority_answer is None else {**summary, "majority_answer": self.majority_answer}


@dataclass(frozen=True)
class Report:
    """Scores of one evaluation."""

    total: Score
    """All questions; its baseline gives each question its own type's majority answer."""
    per_type: dict[str, Score]

    def to_dict(self) -> dict[str, Any]:
        """Values for a JSON summary."""
        return {
            **self.total.to_dict(),
            "per_type": {name: score.to_dict() for name, score in self.per_type.items()},
        }

    def table(self) -> str:
        """Text table: one line per type, then all."""
        width = max(len("all questions"), *(len(name) for name in self.per_type))
        lines = [f"{'type':<{width}}  {'count':>6}  {'accuracy':>8}  {'majority':>8}  majority answer"]
        rows = [*self.per_type.items(), ("all questions", self.total)]
        for name, score in rows:
            lines.append(
                f"{name:<{width}}  {score.count:>6}  {score.accuracy:>8.1%}  {score.majority_accuracy:>8.1%}  "
                f"{score.majority_answer or ''}".rstrip()
            )
        return "\n".join(lines)


def score_answers(predictions: Sequence[str], answers: Sequence[str], types: Sequence[str]) -> Report:
    """Compare predictions with true answers.

    Args:
        predictions: what the model said.
        answers: the true answers, in the same order.
        types: kind of each question.

    Raises:
        ValueError: nothing to score, or sequences of different lengths.
    """
    if not predictions or not len(predictions) == len(answers) == len(types):
        raise ValueError(f"{len(predictions)} predictions, {len(answers)} answers and {len(types)} types")
    outcomes: dict[str, list[tuple[str, bool]]] = {}
    for prediction, answer, kind in zip(predictions, answers, types, strict=True):
        truth = normalize_answer(answer)
        outcomes.setdefault(kind, []).append((truth, normalize_answer(prediction) == truth))
    per_type = {kind: _score(outcomes[kind]) for kind in sorted(outcomes)}
    total = Score(
        count=sum(score.count for score in per_type.values()),
        correct=sum(score.correct for score in per_type.values()),
        majority_correct=sum(score.majority_correct for score in per_type.values()),
        majority_answer=None,
    )
    return Report(total, per_type)


def _score(outcomes: list[tuple[str, bool]]) -> Score:
    counts = Counter(truth for truth, _ in outcomes)
    # The alphabetically first of equally frequent answers, so that a report does not depend on the order of the file.
    answer, frequency = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return Score(len(outcomes), sum(right for _, right in outcomes), frequency, answer)
