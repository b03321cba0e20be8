"""A record of training data, whichever layout it had, and every reason why one cannot be used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Reason(str, Enum):
    """Why a record cannot be used: the `reason` in a report line."""

    UNPARSABLE = "unparsable_line"
    NO_CONVERSATIONS = "no_conversations"
    BAD_TURNS = "bad_turns"
    BAD_DOCUMENT = "bad_document"
    UNREAD_MEDIA = "unread_media_key"
    EMPTY_ANSWER = "empty_answer"
    IMAGE_COUNT = "image_mark_count_mismatch"
    MARK_BEHIND_TEXT = "mark_behind_text"
    RESERVED_TOKEN = "reserved_token_in_text"
    TEMPLATE = "template_error"
    NOTHING_TO_TRAIN = "nothing_to_train"
    UNKNOWN_TOKEN_ID = "token_id_outside_vocabulary"
    TOO_LONG = "too_long"
    PATH_ESCAPES = "path_escapes_image_folder"
    MISSING_IMAGE = "missing_image"
    REMOTE_IMAGE = "remote_image"
    UNDECODABLE_IMAGE = "undecodable_image"
    TRUNCATED_IMAGE = "truncated_image"
    UNDECODABLE_VIDEO = "undecodable_video"
    TRUNCATED_VIDEO = "truncated_video"
    DECOMPRESSION_BOMB = "decompression_bomb"


LONGEST_DETAIL = 300
"""Characters of a report line's `detail`."""


class RecordError(ValueError):
    """A record that cannot be used; becomes one line of the report. A long detail is cut."""

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = detail if len(detail) <= LONGEST_DETAIL else detail[: LONGEST_DETAIL - 3] + "..."
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


ID_KEYS = ("id", "sample_id", "question_id")
"""Keys that name a record, the first of them that there is."""


@dataclass(frozen=True)
class RawRecord:
    """A record before it is checked, with its place in the file."""

    location: str
    """`line 7` of JSON lines, `index 7` of a JSON list, `row 7` of a table, `member 000007` of a tar file; with several
    input files, the file's name stands before it."""
    value: Any
    """The object, or a :class:`RecordError` if it could not be parsed."""

    @property
    def id(self) -> str | None:
        """The record's own id, if it has one: `id`, `sample_id`, `question_id`, or a tar member's stem."""
        if not isinstance(self.value, dict):
            return None
        inner = self.value.get("json")
        values = (
            *(self.value.get(key) for key in ID_KEYS),
            *(inner.get(k) for k in ID_KEYS if isinstance(inner, dict)),
        )
        found = next((value for value in (*values, self.value.get("__key__")) if value is not None), None)
        return None if found is None else str(found)[:LONGEST_DETAIL]


def resolve_image(relative: str, folder: Path, roots: Sequence[Path] = (), *, may_be_folder: bool = False) -> Path:
    """Find an image or a video inside the image folder.

    Args:
        relative: path as the record gives it.
        folder: the image folder, itself already resolved.
        roots: further folders, already resolved, into which links inside the image folder may lead.
        may_be_folder: whether it is a video, which may be a folder of frames as well as a file.

    Raises:
        RecordError: the path is absolute, climbs out of the folder through `..`, leads by a link to where no root is,
            or is no file.
    """
    shown = repr(relative if len(relative) <= 100 else relative[:97] + "...")
    if os.path.isabs(relative) or ".." in Path(relative).parts or "\0" in relative:
        raise RecordError(Reason.PATH_ESCAPES, f"{shown} is not a path below the image folder")
    try:
        resolved = Path(os.path.realpath(folder / relative))
        if not any(resolved.is_relative_to(root) for root in (folder, *roots)):
            raise RecordError(
                Reason.PATH_ESCAPES,
                f"{shown} leads out of the image folder by a link, to {str(resolved)[:100]}; "
                "--image-root FOLDER allows links into a further folder",
            )
        if not resolved.is_file() and not (may_be_folder and resolved.is_dir()):
            what = "a file or folder" if may_be_folder else "a file"
            raise RecordError(Reason.MISSING_IMAGE, f"{shown} is not {what} in the image folder")
    except OSError as error:  # a name too long, a loop of links
        raise RecordError(Reason.MISSING_IMAGE, f"{shown} cannot be opened: {error.strerror}") from error
    return resolved
