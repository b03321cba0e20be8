"""LLaVA records: what one line of a training file may look like, and every reason why it cannot be used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK


class Reason(str, Enum):
    """Why a record cannot be used: the `reason` in a report line."""

    UNPARSABLE = "unparsable_line"
    NO_CONVERSATIONS = "no_conversations"
    BAD_TURNS = "bad_turns"
    EMPTY_ANSWER = "empty_answer"
    IMAGE_COUNT = "image_mark_count_mismatch"
    VIDEO = "video_not_supported"
    RESERVED_TOKEN = "reserved_token_in_text"
    TEMPLATE = "template_error"
    NOTHING_TO_TRAIN = "nothing_to_train"
    UNKNOWN_TOKEN_ID = "token_id_outside_vocabulary"
    TOO_LONG = "too_long"
    PATH_ESCAPES = "path_escapes_image_folder"
    MISSING_IMAGE = "missing_image"
    UNDECODABLE_IMAGE = "undecodable_image"
    TRUNCATED_IMAGE = "truncated_image"
    MISSING_VIDEO = "missing_video"
    UNDECODABLE_VIDEO = "undecodable_video"
    TRUNCATED_VIDEO = "truncated_video"
    DECOMPRESSION_BOMB = "decompression_bomb"


class RecordError(ValueError):
    """A record that cannot be used; becomes one line of the report."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RecordError], tuple[Reason, str]]:
        return RecordError, (self.reason, self.detail)


@dataclass(frozen=True)
class Image:
    """One picture of a record: where it lies, or its bytes."""

    path: str | None = None
    """Below the image folder."""
    data: bytes | None = None
    """The encoded bytes, where the record holds them."""


@dataclass(frozen=True)
class Video:
    """One video of a record: where it lies, its bytes, or its frames."""

    path: str | None = None
    """A video file or a folder of frames, below the image folder."""
    data: bytes | None = None
    """The encoded bytes of a video file, where the record holds them."""
    frames: tuple[Image, ...] = ()
    """The frames in order, where the record lists them."""


Part = str | Image | Video
"""What a message is made of."""


@dataclass(frozen=True)
class Message:
    """What one side says."""

    role: str
    """system, user or assistant."""
    parts: tuple[Part, ...]
    """Text and media in the order in which they are read."""

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """The parts that are no text."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def text(self) -> str:
        """The text, media left out."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Record:
    """A checked record, whichever layout it had."""

    messages: tuple[Message, ...]
    """User and assistant alternate, behind a system message perhaps; the last is an assistant's."""
    is_document: bool = False
    """Plain or interleaved text: one message, no chat template, every text token is trained."""

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """Images and videos in the order of their placeholders."""
        return tuple(medium for message in self.messages for medium in message.media)


@dataclass(frozen=True)
class RawRecord:
    """A record before it is checked, with its place in the file."""

    location: str
    """`line 7` of a JSONL file, `index 7` of a JSON list."""
    value: Any
    """The parsed JSON, or a :class:`RecordError` if the line could not be parsed."""

    @property
    def id(self) -> str | None:
        """The record's own id, if it has one."""
        found = self.value.get("id") if isinstance(self.value, dict) else None
        return None if found is None else str(found)


_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_records(path: Path) -> tuple[int, Iterator[RawRecord]]:
    """Number of records and the records of a file.

    Args:
        path: `.json`, one list; or `.jsonl`, one object per line (blank lines are skipped).

    Raises:
        ValueError: the file is missing, has another suffix, or ends in `.json` and is not a JSON list.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return sum(1 for line in lines if line.strip()), _read_lines(path)
    if path.suffix != ".json":
        raise ValueError(f"{path} must end in .json or .jsonl")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records, not {type(records).__name__}")
    return len(records), (RawRecord(f"index {index}", record) for index, record in enumerate(records))


def _read_lines(path: Path) -> Iterator[RawRecord]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value: Any = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                value = RecordError(Reason.UNPARSABLE, str(error))
            yield RawRecord(f"line {number}", value)


def check_record(raw: RawRecord) -> Record:
    """Turn a LLaVA record into messages and image paths.

    A record is `{"id": ..., "image": PATH or [PATH, ...], "system": ..., "conversations": [{"from": "human" or "gpt",
    "value": TEXT}, ...]}`; `id`, `image` and `system` are optional, and `role`/`content` with user and assistant are
    understood as well.

    Raises:
        RecordError: the record cannot be used.
    """
    if isinstance(raw.value, RecordError):
        raise raw.value
    if not isinstance(raw.value, dict):
        raise RecordError(Reason.NO_CONVERSATIONS, f"a record must be an object, not {type(raw.value).__name__}")
    turns = _read_turns(raw.value)
    system = raw.value.get("system")
    opening = [{"role": "system", "content": _read_text(system, "`system`")}] if system else []
    _check_order(turns, may_begin_with_system=not opening)
    messages = [*opening, *turns]
    images = _check_images(raw.value)
    texts = [message["content"] for message in messages]
    if raw.value.get("video") or any(VIDEO_MARK in text for text in texts):
        raise RecordError(Reason.VIDEO, "video records are not supported")
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if marks != len(images):
        raise RecordError(Reason.IMAGE_COUNT, f"{marks} {IMAGE_MARK} marks in the text, {len(images)} images given")
    remaining = iter(images)
    return Record(
        tuple(Message(message["role"], _split_at_marks(message["content"], remaining)) for message in messages)
    )


def _split_at_marks(text: str, images: Iterator[str]) -> tuple[Part, ...]:
    """The parts of a text in which every mark stands for the next image."""
    first, *others = text.split(IMAGE_MARK)
    parts: list[Part] = [first]
    for piece in others:
        parts += [Image(path=next(images)), piece]
    return tuple(part for part in parts if part != "")


def _read_turns(value: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of `conversations`, whatever their order. Errors give a turn's number there, counted from 0."""
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RecordError(Reason.NO_CONVERSATIONS, "`conversations` is missing, empty or not a list")
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RecordError(Reason.BAD_TURNS, f"turn {number} is not an object")
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise RecordError(Reason.BAD_TURNS, f"turn {number} is from {speaker!r}, not one of {sorted(_ROLES)}")
        messages.append({"role": _ROLES[speaker], "content": _read_text(text, f"the text of turn {number}")})
    return messages


def _read_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise RecordError(Reason.BAD_TURNS, f"{name} is {type(text).__name__}, not a string")
    if not _is_unicode(text):
        raise RecordError(Reason.BAD_TURNS, f"{name} contains half a surrogate pair")
    return text


def _check_order(turns: list[dict[str, str]], *, may_begin_with_system: bool) -> None:
    """User and assistant must alternate, and answers must have text. Turns are counted as in :func:`_read_turns`."""
    first = 1 if may_begin_with_system and turns[0]["role"] == "system" else 0
    if len(turns) == first:
        raise RecordError(Reason.NO_CONVERSATIONS, "there is nothing but a system message")
    for number, message in enumerate(turns[first:], start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if message["role"] != expected:
            raise RecordError(
                Reason.BAD_TURNS, f"turn {number} is from the {message['role']} where the {expected} is expected"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise RecordError(Reason.EMPTY_ANSWER, f"the answer in turn {number} is empty")
    if (len(turns) - first) % 2:
        raise RecordError(Reason.EMPTY_ANSWER, "the last question has no answer")


def _check_images(value: dict[str, Any]) -> tuple[str, ...]:
    given = value.get("image")
    if given is None or given == "":
        return ()
    images = [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(
        isinstance(image, str) and image and _is_unicode(image) for image in images
    ):
        raise RecordError(Reason.MISSING_IMAGE, f"`image` must be a path or a list of paths, not {given!r}")
    return tuple(images)


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can write and UTF-8 cannot."""
    return not _SURROGATE.search(text)


def resolve_image(relative: str, folder: Path, *, may_be_folder: bool = False) -> Path:
    """Find an image inside the image folder.

    Args:
        relative: path as the record gives it.
        folder: the image folder, itself already resolved.
        may_be_folder: whether a folder (of frames) is meant as well as a file.

    Raises:
        RecordError: the path is absolute, climbs out of the folder (through `..` or a symbolic link), or is no file.
    """
    if os.path.isabs(relative) or ".." in Path(relative).parts or "\0" in relative:
        raise RecordError(Reason.PATH_ESCAPES, f"{relative!r} is not a path below the image folder")
    try:
        resolved = Path(os.path.realpath(folder / relative))
        if not resolved.is_relative_to(folder):
            raise RecordError(Reason.PATH_ESCAPES, f"{relative!r} leads out of the image folder, to {resolved}")
        if not resolved.is_file() and not (may_be_folder and resolved.is_dir()):
            raise RecordError(Reason.MISSING_IMAGE, f"{relative!r} is not a file in the image folder")
    except OSError as error:  # a name too long, a loop of links
        raise RecordError(Reason.MISSING_IMAGE, f"{relative!r} cannot be opened: {error}") from error
    return resolved
