"""Records that are too long become pieces that fit, lose nothing in the middle, and keep their images."""

from __future__ import annotations

import random

import pytest

from megatron_haplovl.data.preprocessing.long_samples import CUT, SPLIT, Fitted, fit_record
from megatron_haplovl.data.records import Image, Message, Part, Record, Video

_A, _B, _C = Image(path="a"), Image(path="b"), Video(path="c")


def turn(question: tuple[Part, ...], answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", (answer,))


def length(record: Record) -> int:
    """Characters, and ten for an image: four if there are several, as with tiles."""
    media = record.media
    return sum(len(message.text) for message in record.messages) + len(media) * (10 if len(media) < 2 else 4)


def fit(record: Record, limit: int, choice: str) -> Fitted:
    return fit_record(record, lambda piece: length(piece) <= limit, choice)


def conversation(*turns: tuple[Message, Message], system: str = "") -> Record:
    opening = (Message("system", (system,)),) if system else ()
    return Record((*opening, *(message for pair in turns for message in pair)))


def document(*parts: Part) -> Record:
    return Record((Message("user", parts),), is_document=True)


FIRST, SECOND, THIRD = turn((_A, "\n1?"), "one"), turn(("2?",), "two"), turn((_B, "\n3?"), "three")


@pytest.mark.parametrize("system", ["", "sys"])
def test_cut_keeps_the_longest_beginning(system: str) -> None:
    record = conversation(FIRST, SECOND, THIRD, system=system)
    fitted = fit(record, 21 + len(system), "cut")
    assert fitted == Fitted((conversation(FIRST, SECOND, system=system),), (CUT,))
    assert fit(record, 20 + len(system), "cut").pieces == (conversation(FIRST, system=system),)
    assert fit(record, 15 + len(system), "cut") == Fitted((), (CUT,))


def test_split_repeats_the_media_that_came_before() -> None:
    fitted = fit(conversation(FIRST, SECOND, THIRD, system="sys"), 20, "split")
    second = turn((_A, "\n", "2?"), "two")
    third = turn((_A, "\n", _B, "\n3?"), "three")
    expected = [conversation(one, system="sys") for one in (FIRST, second, third)]
    assert fitted == Fitted(tuple(expected), (SPLIT,))


def test_split_of_text_repeats_nothing() -> None:
    turns = [turn((f"{i}?",), "yes") for i in range(6)]
    fitted = fit(conversation(*turns), 10, "split")
    assert fitted.pieces == tuple(conversation(*turns[i : i + 2]) for i in (0, 2, 4))


def test_a_turn_that_fits_nowhere_ends_the_split() -> None:
    long = turn(("?" * 30,), "no")
    fitted = fit(conversation(FIRST, long, SECOND), 21, "split")
    assert fitted == Fitted((conversation(FIRST),), (CUT,))
    assert fit(conversation(FIRST, SECOND, long, SECOND), 16, "split").repairs == (CUT, SPLIT)


def test_more_turns_may_be_shorter() -> None:
    """A second image makes tiles of the first disappear."""
    turns = FIRST, turn((_B, "\n2?"), "two"), turn(("?" * 50,), "no")

    def fits(piece: Record) -> bool:
        return length(piece) + (20 if len(piece.media) == 1 else 0) <= 30

    assert not fits(conversation(FIRST))
    assert fit_record(conversation(*turns), fits, "cut") == Fitted((conversation(*turns[:2]),), (CUT,))


def test_document_is_cut_between_words() -> None:
    fitted = fit(document("one two  three\nfour"), 9, "split")
    assert [piece.messages[0].parts for piece in fitted.pieces] == [("one two",), ("three",), ("four",)]
    assert fitted.repairs == (SPLIT,)
    assert fit(document("one two  three\nfour"), 9, "cut") == Fitted((document("one two"),), (CUT,))
    assert fit(document("x" * 10), 9, "split") == Fitted((), (CUT,))
    assert fit(document("one two   \n "), 7, "cut") == Fitted((document("one two"),), ())


def test_image_of_a_document_goes_with_the_text_behind_it() -> None:
    fitted = fit(document(_A, "one", _B, "two", _C), 13, "split")
    assert [piece.messages[0].parts for piece in fitted.pieces] == [(_A, "one"), (_B, "two", _C)]
    assert fitted.repairs == (SPLIT,)
    assert fit(document(_A, "one", _B, "twenty-two"), 13, "split") == Fitted((document(_A, "one"),), (CUT,))


@pytest.mark.parametrize("choice", ["cut", "split"])
def test_random_documents(choice: str) -> None:
    """Every piece fits, no word is lost or repeated, and every piece but the last is as long as it can be."""
    choose = random.Random(0)
    for _ in range(300):
        parts: list[Part] = []
        for _ in range(choose.randint(1, 6)):
            text = " ".join("w" * choose.randint(1, 6) for _ in range(12))
            parts.append((_A, _C, text)[choose.randrange(3)])
        limit = choose.randint(8, 60)
        fitted = fit(document(*parts), limit, choice)
        assert all(length(piece) <= limit and piece.messages[0].text.strip() for piece in fitted.pieces)
        words = " ".join(part for part in parts if isinstance(part, str)).split()
        kept = " ".join(piece.messages[0].text for piece in fitted.pieces).split()
        assert "".join(words).startswith("".join(kept))
        if not fitted.repairs or fitted.repairs == (SPLIT,):
            assert "".join(words) == "".join(kept)
        if choice == "cut":
            assert len(fitted.pieces) <= 1
