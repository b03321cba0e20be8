"""Turns of a conversation, and the repairs of their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_haplovl.data.layouts.media import is_empty, is_unicode, read_image, read_video, shown
from megatron_haplovl.data.layouts.repairs import Mending
from megatron_haplovl.data.records import Image, Reason, RecordError, Video

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DOCUMENT = "document"
"""Role of the only turn of a document."""


@dataclass(frozen=True)
class Slot:
    """A part that stands for the record's next image or video."""

    kind: str
    """image or video."""


Piece = str | Image | Video | Slot


@dataclass(frozen=True)
class Turn:
    """What one side says, before its marks are understood."""

    role: str
    pieces: tuple[Piece, ...]
    number: int = 0
    """Place in the record, from 0, for messages."""

    @property
    def text(self) -> str:
        """The text alone."""
        if len(self.pieces) == 1 and isinstance(self.pieces[0], str):  # nearly always
            return self.pieces[0]
        return "".join(piece for piece in self.pieces if isinstance(piece, str))


def read_text(text: Any, name: str) -> str:
    """A text that can be encoded.

    Raises:
        RecordError: it is no string, or no Unicode.
    """
    if not isinstance(text, str):
        raise RecordError(Reason.BAD_TURNS, f"{name} is {type(text).__name__}, not a string")
    if not is_unicode(text):
        raise RecordError(Reason.BAD_TURNS, f"{name} contains half a surrogate pair")
    return text


def read_turns(turns: Any, key: str, unread: dict[str, Any]) -> list[Turn]:
    """The turns of `conversations` or `messages`.

    Args:
        turns: the list.
        key: its key in the record.
        unread: gets what is not read of the turns, as `key[].name`.

    Raises:
        RecordError: a turn cannot be understood. Its number counts from 0.
    """
    if not isinstance(turns, list) or not turns:
        raise RecordError(Reason.NO_CONVERSATIONS, f"`{key}` is missing, empty or not a list")
    return [_read_turn(turn, number, key, unread) for number, turn in enumerate(turns)]


def _read_turn(turn: Any, number: int, key: str, unread: dict[str, Any]) -> Turn:
    if not isinstance(turn, Mapping):
        raise RecordError(Reason.BAD_TURNS, f"turn {number} is not an object")
    speaker = turn["from"] if turn.get("from") is not None else turn.get("role")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RecordError(Reason.BAD_TURNS, f"turn {number} is from {shown(speaker)}, not one of {sorted(_ROLES)}")
    for name, value in turn.items():
        if name not in ("from", "role", "value", "content") and not is_empty(value):
            unread[f"{key}[].{name}"] = value
    pieces: tuple[Piece, ...]
    if isinstance(content, list):
        pieces = tuple(_read_part(part, number, key, unread) for part in content)
    else:
        pieces = (read_text(content, f"the text of turn {number}"),)
    return Turn(_ROLES[speaker], pieces, number)


_MEDIA = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


def _read_part(part: Any, number: int, key: str, unread: dict[str, Any]) -> Piece:
    """A string, or an object with a `type`; a medium without a source stands for the record's next one."""
    if isinstance(part, str):
        return read_text(part, f"a part of turn {number}")
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" and kind not in _MEDIA:
        known = ("text", *_MEDIA)
        raise RecordError(Reason.BAD_TURNS, f"turn {number} has a part of type {shown(kind)}, not one of {known}")
    read = ("type", "text") if kind == "text" else ("type", kind, *("url", "path", "bytes"))
    for name, value in part.items():
        if name not in read and not is_empty(value):
            unread[f"{key}[].content[].{name}"] = value
    if kind == "text":
        return read_text(part.get("text"), f"a part of turn {number}")
    source = part[kind] if not is_empty(part.get(kind)) else {name: part.get(name) for name in read[2:]}
    if is_empty(source):
        return Slot(_MEDIA[kind])
    name = f"{key}[].content[].{kind}"
    return read_image(source, name) if _MEDIA[kind] == "image" else read_video(source, name)


def order_turns(turns: list[Turn], system: str | None, mending: Mending) -> list[Turn]:
    """Turns in the order that is trained: a system message perhaps, then user and assistant in turn.

    Args:
        turns: as the record has them; the first may be the system's, if `system` is None.
        system: text of a system message from elsewhere in the record.
        mending: repairs that are allowed.

    Raises:
        RecordError: somebody is out of turn, an answer is missing or blank, and no allowed repair mends it.
    """
    opening = [Turn("system", (system,))] if system is not None else []
    if not opening and turns[0].role == "system":
        opening, turns = turns[:1], turns[1:]
    if not turns:
        raise RecordError(Reason.NO_CONVERSATIONS, "there is nothing but a system message")
    for turn in turns:
        if turn.role == "system":
            raise RecordError(
                Reason.BAD_TURNS, f"turn {turn.number} is from the system, which is not the first to speak"
            )
    turns = _join(_without_leading_answers(turns, mending), mending)
    turns = _without_trailing_question(turns, mending)
    for turn in turns:
        if turn.role == "assistant" and not turn.text.strip():
            raise RecordError(Reason.EMPTY_ANSWER, f"the answer in turn {turn.number} is empty")
    return [*opening, *turns]


def _without_leading_answers(turns: list[Turn], mending: Mending) -> list[Turn]:
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    if first == 0:
        return turns
    problem = f"turn {turns[0].number} is from the assistant where the user is expected"
    if not any(turn.role == "assistant" for turn in turns[first:]):
        raise RecordError(Reason.BAD_TURNS, problem)  # nothing would be left
    mending.use("drop_leading_answer", Reason.BAD_TURNS, problem)
    return turns[first:]


def _join(turns: list[Turn], mending: Mending) -> list[Turn]:
    joined = turns[:1]
    for turn in turns[1:]:
        last = joined[-1]
        if turn.role == last.role:
            other = {"user": "assistant", "assistant": "user"}[turn.role]
            problem = f"turn {turn.number} is from the {turn.role} where the {other} is expected"
            mending.use("join_turns", Reason.BAD_TURNS, problem)
            joined[-1] = replace(last, pieces=(*last.pieces, "\n", *turn.pieces))
        else:
            joined.append(turn)
    return joined


def _without_trailing_question(turns: list[Turn], mending: Mending) -> list[Turn]:
    if turns[-1].role == "assistant":
        return turns
    problem = "the last question has no answer"
    if len(turns) == 1:
        raise RecordError(Reason.EMPTY_ANSWER, problem)
    mending.use("drop_trailing_question", Reason.EMPTY_ANSWER, problem)
    return turns[:-1]
