"""Every layout becomes one internal record; what was repaired and what was not read is said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_haplovl.data.layouts.marks import place_media
from megatron_haplovl.data.layouts.media import is_empty, shown
from megatron_haplovl.data.layouts.repairs import LLAVA, Mending
from megatron_haplovl.data.layouts.table import find_layout
from megatron_haplovl.data.layouts.tar import from_members
from megatron_haplovl.data.layouts.turns import DOCUMENT
from megatron_haplovl.data.records import ID_KEYS, Message, RawRecord, Reason, Record, RecordError


@dataclass(frozen=True)
class NormaliseOptions:
    """What may be done to a record."""

    repairs: frozenset[str] = LLAVA
    """Names of repairs that are allowed (:data:`megatron_haplovl.data.layouts.repairs.REPAIRS`)."""
    ignored_keys: frozenset[str] = frozenset()
    """Keys that may look like media and are not read all the same."""


@dataclass(frozen=True)
class Normalised:
    """A record, and how it came about."""

    record: Record
    mending: Mending
    """The repairs that it had, and may still have when its images are looked for."""
    unread_keys: tuple[str, ...] = ()
    """Keys with a value that nothing reads, sorted."""

    @property
    def repairs(self) -> tuple[str, ...]:
        """Names of the repairs that it had."""
        return self.mending.used


def normalise(raw: RawRecord, options: NormaliseOptions) -> Normalised:
    """Turn a raw record of any layout into the internal one.

    Raises:
        RecordError: the record cannot be used.
    """
    if isinstance(raw.value, RecordError):
        raise raw.value
    if not isinstance(raw.value, dict):
        raise RecordError(Reason.NO_CONVERSATIONS, f"a record must be an object, not {type(raw.value).__name__}")
    try:
        return _normalise(raw, options)
    except RecursionError as error:
        raise RecordError(Reason.UNPARSABLE, "lists and objects in the record are nested too deep") from error


def _normalise(raw: RawRecord, options: NormaliseOptions) -> Normalised:
    value = from_members(raw.value, find_layout) if "__key__" in raw.value else raw.value
    layout = find_layout(value)
    if layout is None:
        raise RecordError(
            Reason.NO_CONVERSATIONS,
            f"the keys {shown(list(value))} are those of no layout (`conversations` is missing); docs/data.md has all",
        )
    mending = Mending(options.repairs)
    unread: dict[str, Any] = {}
    draft = layout.read(value, unread, mending)
    unread |= {key: item for key, item in value.items() if key not in (*layout.needs, *layout.also, "id")}
    unread = {key: item for key, item in unread.items() if not is_empty(item)}
    _read_id(unread, value, mending)
    for key, item in unread.items():
        if key not in options.ignored_keys and looks_like_media(key, item):
            raise RecordError(
                Reason.UNREAD_MEDIA,
                f"the key {shown(key)} looks like media and is not read (value {shown(item)}); call it `image`, "
                "`images`, `video` or `videos`, or name it with --ignore-keys",
            )
    messages = place_media(draft.turns, draft.images, draft.videos, mending)
    is_document = messages[0].role == DOCUMENT
    if is_document:
        messages = (Message("assistant", messages[0].parts),)
    return Normalised(Record(messages, is_document), mending, tuple(sorted(unread)))


def _read_id(unread: dict[str, Any], value: Mapping[str, Any], mending: Mending) -> None:
    """Another key may serve as `id`; without the repair it is one that is not read."""
    other = next((key for key in ID_KEYS[1:] if key in unread), None)
    if other is not None and is_empty(value.get("id")) and mending.allows("sample_id"):
        mending.use("sample_id", Reason.NO_CONVERSATIONS, "the record has no `id`")
        del unread[other]


_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_MEDIUM = re.compile(
    r"(image|img|picture|pic|photo|video|vid|audio|frame|media|wav|mp3|flac)"
    r"(s|path|paths|file|files|url|urls|list|name|names|folder|dir|bytes)?"
)
_ABOUT = re.compile(
    r"(id|size|width|height|count|num|number|n|source|caption|description|label|type|class|category|hash|sha256|md5|license"
    r"|title|token|idx|index|format|resolution|ratio|fps|duration|length|start|end|quality|score|aspect|question|answer)s?"
)


def looks_like_media(key: str, value: Any) -> bool:
    """Whether a key with a value may hold media.

    One of the name's words is image, img, picture, photo, video, audio, frame, media or the like, and none says that it
    is something about them, such as id, size or caption; the value is a text, bytes, or a list or an object. Bytes are
    media whatever the name.
    """
    if _holds_bytes(value):
        return True
    words = [word.lower() for word in _WORDS.findall(key.rpartition(".")[2])]
    named = any(_MEDIUM.fullmatch(word) for word in words) and not any(_ABOUT.fullmatch(word) for word in words)
    return named and _may_be_media(value)


def _may_be_media(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_may_be_media(item) for item in value)
    return isinstance(value, (str, bytes, Mapping)) and not is_empty(value)


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_bytes(item) for item in value)
    return isinstance(value, bytes) and bool(value)
