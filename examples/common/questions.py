"""Questions with one-line answers, and how to draw them so that no answer is common."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, its type and its answer."""

    type: str
    text: str
    answer: str
    about: str = ""
    """What it is about, if another question about the same could give its answer away; else empty."""


class BalancedChooser:
    """Chooses questions so that, within a type, every answer comes up about equally often.

    Otherwise most counts would be zero or one, and a model could score without looking.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: Counter[tuple[str, str]] = Counter()

    def choose(self, candidates: Sequence[Question], types: Iterable[str]) -> list[Question]:
        """Draw one question for every wanted type (a type may be wanted several times), none of them twice.

        No two of them are about the same thing: in one conversation, `What is in the corner?` would answer `Where is
        it?`. A type that has no question left is passed over.
        """
        shuffled = self._rng.sample(list(candidates), len(candidates))
        chosen: list[Question] = []
        for wanted in types:
            taken = {question.about for question in chosen} - {""}
            left = [q for q in shuffled if q.type == wanted and q not in chosen and q.about not in taken]
            if left:
                question = min(left, key=lambda q: self._used[q.type, q.answer])
                self._used[question.type, question.answer] += 1
                chosen.append(question)
        return chosen
