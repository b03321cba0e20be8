"""Which `<image>` and `<video>` in a text stand for media, and where the media of a turn stand.

A mark in a text counts only where the record has media of its kind and no part of a message is a medium itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_haplovl.data.layouts.repairs import Mending
from megatron_haplovl.data.layouts.turns import DOCUMENT, Slot, Turn
from megatron_haplovl.data.records import Image, Message, Part, Reason, RecordError, Video
from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK

_MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")


def place_media(
    turns: Sequence[Turn], images: Sequence[Image], videos: Sequence[Video], mending: Mending
) -> tuple[Message, ...]:
    """Messages with their media in place.

    Args:
        turns: in the order that is trained.
        images: those of the record's own keys.
        videos: likewise.
        mending: repairs that are allowed.

    Raises:
        RecordError: marks and media do not match, or an allowed repair is missing.
    """
    if any(not isinstance(piece, str) for turn in turns for piece in turn.pieces):
        placed = _fill_slots(turns, images, videos, mending)
    else:
        placed = _place_marks(turns, images, videos, mending)
    return tuple(_to_front(message, mending) for message in placed)


def _fill_slots(
    turns: Sequence[Turn], images: Sequence[Image], videos: Sequence[Video], mending: Mending
) -> list[Message]:
    slots = [piece.kind for turn in turns for piece in turn.pieces if isinstance(piece, Slot)]
    given: dict[str, Sequence[Image | Video]] = {"image": images, "video": videos}
    if not slots and (images or videos):
        raise RecordError(
            Reason.IMAGE_COUNT,
            f"the messages hold their own media, and the record {len(images)} images and {len(videos)} videos as well",
        )
    for kind, media in given.items():
        if slots.count(kind) != len(media):
            raise RecordError(
                Reason.IMAGE_COUNT, f"{slots.count(kind)} {kind} parts without a source, {len(media)} {kind}s given"
            )
    remaining = {kind: iter(media) for kind, media in given.items()}
    return [
        Message(turn.role, tuple(next(remaining[p.kind]) if isinstance(p, Slot) else p for p in turn.pieces if p != ""))
        for turn in turns
    ]


def _place_marks(
    turns: Sequence[Turn], images: Sequence[Image], videos: Sequence[Video], mending: Mending
) -> list[Message]:
    if not images and not videos and not any("<" in turn.text for turn in turns):
        return [Message(turn.role, (turn.text,) if turn.text else ()) for turn in turns]
    asked = "".join(turn.text for turn in turns if turn.role != "assistant")
    # LLaVA-Hound writes `<image>` for its videos.
    image_means_video = bool(videos) and not images and VIDEO_MARK not in asked and IMAGE_MARK in asked
    marks: dict[str, Sequence[Image | Video]] = {IMAGE_MARK: videos if image_means_video else images}
    if not image_means_video:
        marks[VIDEO_MARK] = videos
    places: dict[str, tuple[str, ...]] = {}
    front: list[Part] = []
    for mark, media in marks.items():
        places[mark] = _roles_with(mark, turns, media, mending)
        if media and not places[mark]:
            front += [part for medium in media for part in (medium, "\n")]
    remaining = {mark: iter(media) for mark, media in marks.items()}
    messages = []
    for turn in turns:
        counted = [mark for mark in marks if turn.role in places[mark]]
        parts = _split(turn.text, counted, remaining)
        if front and turn.role in ("user", DOCUMENT):
            parts, front = (*front, *parts), []
        messages.append(Message(turn.role, parts))
    return messages


def _roles_with(mark: str, turns: Sequence[Turn], media: Sequence[Image | Video], mending: Mending) -> tuple[str, ...]:
    """The roles in whose turns a mark stands for a medium."""
    counts = dict.fromkeys(("system", "user", "assistant", DOCUMENT), 0)
    for turn in turns:
        counts[turn.role] += turn.text.count(mark)
    total, asked = sum(counts.values()), counts["user"] + counts[DOCUMENT]
    if not media:
        edges = [turn for turn in turns if turn.role == "user" and _is_at_edge(mark, turn.text)] if asked else []
        if edges:
            mending.use(
                "literal_mark",
                Reason.IMAGE_COUNT,
                f"{total} {mark} marks in the text, none is given (turn {edges[0].number} begins or ends with it)",
            )
        return ()
    if total == len(media):
        return tuple(counts)
    if asked == len(media):
        return ("user", DOCUMENT)
    what = "videos" if isinstance(media[0], Video) else "images"
    problem = f"{total} {mark} marks in the text, {len(media)} {what} given"
    if total:
        raise RecordError(Reason.IMAGE_COUNT, problem)
    mending.use("add_missing_mark", Reason.IMAGE_COUNT, problem)
    return ()


def _is_at_edge(mark: str, text: str) -> bool:
    return text.strip().startswith(mark) or text.strip().endswith(mark)


def _split(text: str, marks: list[str], remaining: dict[str, Iterator[Image | Video]]) -> tuple[Part, ...]:
    if not marks or "<" not in text:
        return (text,) if text else ()
    pieces = _MARKS.split(text)
    parts: list[Part] = []
    for piece in pieces:
        if piece in marks:
            parts.append(next(remaining[piece]))
        elif piece and parts and isinstance(parts[-1], str):  # a mark that is text
            parts[-1] += piece
        elif piece:
            parts.append(piece)
    return tuple(parts)


def _to_front(message: Message, mending: Mending) -> Message:
    """A question's only medium comes first, as in LLaVA; where a question has several, their places have a meaning."""
    if message.role != "user" or len(message.parts) < 2 or len(message.media) != 1:
        return message
    before = message.parts[: message.parts.index(message.media[0])]
    if not "".join(part for part in before if isinstance(part, str)).strip():
        return message
    mending.use("mark_to_front", Reason.MARK_BEHIND_TEXT, "a question's only image or video stands behind text")
    text = message.text.strip()
    return replace(message, parts=(message.media[0], f"\n{text}") if text else message.media)
