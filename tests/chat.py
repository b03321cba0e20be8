"""Records written the short way: messages as dictionaries, in whose texts every `<image>` and `<video>` is a medium."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_haplovl.data.records import Image, Message, Part, Record, Video

_MEDIA: dict[str, Part] = {"<image>": Image(path="a.png"), "<video>": Video(path="a.mp4")}


def chat(messages: Sequence[dict[str, str]]) -> Record:
    """The record of `role` and `content`."""
    return Record(tuple(Message(message["role"], _parts(message["content"])) for message in messages))


def _parts(text: str) -> tuple[Part, ...]:
    pieces = re.split(f"({'|'.join(_MEDIA)})", text)
    return tuple(_MEDIA.get(piece, piece) for piece in pieces if piece)
