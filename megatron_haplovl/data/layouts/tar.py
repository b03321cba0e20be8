"""Samples of tar shards (and of tables made from such) as objects of the other layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from megatron_haplovl.data.layouts.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_empty, shown
from megatron_haplovl.data.natural_order import natural_key
from megatron_haplovl.data.records import Reason, RecordError
from megatron_haplovl.data.tokenizer import IMAGE_MARK, VIDEO_MARK

_CAPTIONS = (".txt", ".text", ".caption")


def from_members(value: Mapping[str, Any], has_layout: Any) -> dict[str, Any]:
    """One object of a sample's members.

    The `json` member is the record. Images and videos are the members with such suffixes, in natural order; if the
    record names them (by file name or suffix), in its order. A text beside them is their caption, if the record has no
    conversation of its own.

    Args:
        value: members by the part of their name behind the stem, and `__key__`.
        has_layout: whether an object is a record by itself.

    Raises:
        RecordError: there are several `json` members, or the record names more media than there are.
    """
    members = {name: member for name, member in value.items() if not name.startswith("__") and not is_empty(member)}
    objects = [name for name in members if _suffix(name) == ".json"]
    if len(objects) > 1:
        raise RecordError(
            Reason.BAD_TURNS, f"the sample has the members {objects[0]} and {objects[1]}; which is the record?"
        )
    record = members.pop(objects[0]) if objects else {}
    record = {"conversations": record} if isinstance(record, list) else record
    if not isinstance(record, Mapping):
        raise RecordError(Reason.NO_CONVERSATIONS, f"the json member must be an object, not {type(record).__name__}")
    record = dict(record)
    marks = ""
    for key, suffixes, mark in (("image", IMAGE_SUFFIXES, IMAGE_MARK), ("video", VIDEO_SUFFIXES, VIDEO_MARK)):
        names = sorted((name for name in members if _suffix(name) in suffixes), key=natural_key)
        media = {name: members.pop(name) for name in names}
        marks += mark * len(media)
        given = next((k for k in (key, f"{key}s") if not is_empty(record.get(k))), key)
        if media:
            record[given] = _in_order(record.get(given), media, str(value["__key__"]))
    captions = [name for name in members if _suffix(name) in _CAPTIONS]
    if captions and not has_layout(record):
        caption = members.pop(captions[0])
        if marks:
            record["conversations"] = [{"from": "human", "value": marks}, {"from": "gpt", "value": caption}]
        else:
            record["text"] = caption
    # What nobody reads is counted under its name; its bytes are of no use.
    return record | {name: f"a member of {value['__key__']}" for name in members if name not in record}


def _suffix(name: str) -> str:
    return "." + name.lower().rpartition(".")[2]


def _in_order(given: Any, media: dict[str, Any], key: str) -> list[Any]:
    """The members that the record names, or all of them if it names none."""
    if is_empty(given):
        return list(media.values())
    wanted = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) for name in wanted):
        return wanted
    stem = PurePosixPath(key).name
    by_name = {f"{stem}.{name}": member for name, member in media.items()} | media
    found = [by_name.get(PurePosixPath(name).name) for name in wanted]
    if None not in found:
        return found
    # The names of the files before they were packed: they are as many, and in the same order.
    if found == [None] * len(media):
        return list(media.values())
    raise RecordError(
        Reason.MISSING_IMAGE,
        f"the record names {len(wanted)} files, such as {shown(wanted[0])}; the sample has {list(media)}",
    )
