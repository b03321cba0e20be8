"""The layouts that public data comes in. Each is known by its keys, and read into turns, images and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_haplovl.data.layouts.documents import mmc4_turn, obelics_turn
from megatron_haplovl.data.layouts.media import is_empty, read_images, read_videos
from megatron_haplovl.data.layouts.repairs import Mending
from megatron_haplovl.data.layouts.turns import DOCUMENT, Turn, order_turns, read_text, read_turns
from megatron_haplovl.data.records import Image, Reason, RecordError, Video

Object = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """A record before its marks are understood."""

    turns: list[Turn]
    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One layout."""

    needs: tuple[str, ...]
    """Keys by which it is known: all of them are there, and not null."""
    also: tuple[str, ...]
    """Other keys that it reads."""
    read: Callable[[Object, dict[str, Any], Mending], Draft]
    """From the object and the allowed repairs; the dictionary gets what is not read of nested objects, by name."""


_IMAGE_KEYS = ("image", "images")
_VIDEO_KEYS = ("video", "videos")
_MEDIA_KEYS = (*_IMAGE_KEYS, *_VIDEO_KEYS)


def _conversations(value: Object, unread: dict[str, Any], mending: Mending) -> Draft:
    return _conversation(value, read_turns(value["conversations"], "conversations", unread), mending)


def _messages(value: Object, unread: dict[str, Any], mending: Mending) -> Draft:
    return _conversation(value, read_turns(value["messages"], "messages", unread), mending)


def _alpaca(value: Object, unread: dict[str, Any], mending: Mending) -> Draft:
    question = read_text(value["instruction"], "`instruction`")
    if value.get("input"):
        question += "\n" + read_text(value["input"], "`input`")
    return _asked(value, question, value["output"], "output", mending)


def _query_response(value: Object, unread: dict[str, Any], mending: Mending) -> Draft:
    return _asked(value, read_text(value["query"], "`query`"), value["response"], "response", mending)


def _asked(value: Object, question: str, answer: Any, answer_key: str, mending: Mending) -> Draft:
    """A question and its answer, behind those of `history`."""
    texts = [*_history(value.get("history")), question, read_text(answer, f"`{answer_key}`")]
    roles = ("user", "assistant")
    return _conversation(value, [Turn(roles[i % 2], (text,), i) for i, text in enumerate(texts)], mending)


def _history(history: Any) -> Iterator[str]:
    if not isinstance(history, (list, type(None))):
        raise RecordError(Reason.BAD_TURNS, f"`history` is {type(history).__name__}, not a list")
    for number, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(Reason.BAD_TURNS, f"`history[{number}]` is no list of a question and an answer")
        for text in pair:
            yield read_text(text, f"a text of `history[{number}]`")


def _conversation(value: Object, turns: list[Turn], mending: Mending) -> Draft:
    system = read_text(value["system"], "`system`") if value.get("system") else None
    return Draft(order_turns(turns, system, mending), _images(value), _videos(value))


def _text(value: Object, unread: dict[str, Any], mending: Mending) -> Draft:
    return _document(Turn(DOCUMENT, (read_text(value["text"], "`text`"),)), _images(value), _videos(value))


def _mmc4(value: Object, unread: dict[str, Any], mending: Mending) -> Draft:
    return _document(mmc4_turn(value, mending))


def _obelics(value: Object, unread: dict[str, Any], mending: Mending) -> Draft:
    return _document(obelics_turn(value, mending))


def _document(turn: Turn, images: tuple[Image, ...] = (), videos: tuple[Video, ...] = ()) -> Draft:
    if not turn.text.strip():
        raise RecordError(Reason.BAD_DOCUMENT, "the document has no text")
    return Draft([turn], images, videos)


def _images(value: Object) -> tuple[Image, ...]:
    key = _one_of(value, _IMAGE_KEYS)
    return read_images(value.get(key), key)


def _videos(value: Object) -> tuple[Video, ...]:
    key = _one_of(value, _VIDEO_KEYS)
    return read_videos(value.get(key), key)


def _one_of(value: Object, keys: tuple[str, ...]) -> str:
    given = [key for key in keys if key in value and not is_empty(value[key])]
    if len(given) > 1:
        raise RecordError(Reason.IMAGE_COUNT, f"the record has `{given[0]}` and `{given[1]}`; keep one of them")
    return given[0] if given else keys[0]


LAYOUTS = (
    Layout(("conversations",), ("system", *_MEDIA_KEYS), _conversations),
    Layout(("messages",), ("system", *_MEDIA_KEYS), _messages),
    Layout(("text_list", "image_info"), ("similarity_matrix",), _mmc4),
    Layout(("texts", "images"), (), _obelics),
    Layout(("instruction", "output"), ("input", "history", "system", *_MEDIA_KEYS), _alpaca),
    Layout(("query", "response"), ("history", "system", *_MEDIA_KEYS), _query_response),
    Layout(("text",), _MEDIA_KEYS, _text),
)
"""Every layout; the first whose keys are there is taken."""


def find_layout(value: Object) -> Layout | None:
    """The layout of a record, or None if its keys are those of no layout."""
    return next((one for one in LAYOUTS if all(value.get(key) is not None for key in one.needs)), None)
