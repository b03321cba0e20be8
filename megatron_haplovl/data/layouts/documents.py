"""Interleaved documents: MMC4 and OBELICS, and what becomes of their missing images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from megatron_haplovl.data.layouts.media import is_empty, read_image, shown
from megatron_haplovl.data.layouts.repairs import Mending
from megatron_haplovl.data.layouts.turns import DOCUMENT, Piece, Turn, read_text
from megatron_haplovl.data.records import Image, Message, Reason, Record, RecordError, Video

Found = TypeVar("Found")


def mmc4_turn(value: dict[str, Any], mending: Mending) -> Turn:
    """Each image of `image_info` before the sentence of `text_list` that it matches, sentences joined by spaces.

    Raises:
        RecordError: a sentence is no text, or an image has no name or matches no sentence.
    """
    sentences, infos = value["text_list"], value["image_info"]
    if not isinstance(sentences, list) or not isinstance(infos, list):
        raise RecordError(Reason.BAD_DOCUMENT, "`text_list` and `image_info` must be lists")
    images: dict[int, list[Image]] = {}
    for number, info in enumerate(infos):
        index = info.get("matched_text_index") if isinstance(info, Mapping) else None
        if type(index) is not int or not 0 <= index < len(sentences):
            raise RecordError(
                Reason.BAD_DOCUMENT,
                f"`image_info[{number}]` has the matched_text_index {shown(index)} of {len(sentences)} sentences",
            )
        if is_empty(info.get("image_name")):
            mending.use("drop_missing_image", Reason.MISSING_IMAGE, f"`image_info[{number}]` has no image_name")
        else:
            images.setdefault(index, []).append(read_image(info["image_name"], "image_name"))
    pieces: list[Piece] = []
    for index, sentence in enumerate(sentences):
        pieces += [" "] if index else []
        pieces += [*images.get(index, []), read_text(sentence, f"`text_list[{index}]`")]
    return Turn(DOCUMENT, tuple(pieces))


def obelics_turn(value: dict[str, Any], mending: Mending) -> Turn:
    """Two lists side by side, at each place a text or an image. Texts that meet have an empty line between them.

    Raises:
        RecordError: the lists do not fit each other, or hold something else.
    """
    texts, images = value["texts"], value["images"]
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise RecordError(Reason.BAD_DOCUMENT, "`texts` and `images` must be lists of the same length")
    pieces: list[Piece] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and not is_empty(image):
            raise RecordError(Reason.BAD_DOCUMENT, f"place {number} has a text and an image")
        if text is not None:
            pieces += ["\n\n"] if pieces and isinstance(pieces[-1], str) else []
            pieces.append(read_text(text, f"`texts[{number}]`"))
        elif is_empty(image):
            mending.use("drop_missing_image", Reason.MISSING_IMAGE, f"place {number} has neither text nor image")
        else:
            pieces.append(read_image(image, "images"))
    return Turn(DOCUMENT, tuple(pieces))


def find_media(
    record: Record, find: Callable[[Image | Video], Found], mending: Mending
) -> tuple[Record, tuple[Found, ...]]:
    """Look for the media of a record.

    Args:
        record: a conversation or a document.
        find: opens one; raises a :class:`RecordError` if it cannot be used.
        mending: if it allows `drop_missing_image`, images of a document that are missing are left out.

    Returns:
        The record with the media that are there, and what `find` returned for them, in order.

    Raises:
        RecordError: of `find`.
    """
    found: list[Found] = []
    messages: list[Message] = []
    for message in record.messages:
        parts = []
        for part in message.parts:
            if not isinstance(part, str):
                try:
                    found.append(find(part))
                except RecordError as error:
                    if not record.is_document or error.reason is not Reason.MISSING_IMAGE:
                        raise
                    mending.use("drop_missing_image", error.reason, error.detail)
                    continue
            parts.append(part)
        messages.append(replace(message, parts=tuple(parts)))
    return replace(record, messages=tuple(messages)), tuple(found)
