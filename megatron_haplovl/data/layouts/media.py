"""Images and videos as records give them: paths, structs of bytes and path, data: URLs, lists of frames."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from megatron_haplovl.data.records import Image, Reason, RecordError, Video

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp")

_LONGEST_NAME = 255  # bytes of one name in a path, on the usual file systems
_SURROGATE = re.compile("[\ud800-\udfff]")
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


def shown(value: Any) -> str:
    """A value in a message: short, and without the bytes of an image."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return f"a data: URL of {len(value)} characters"
        return repr(value if len(value) <= 80 else value[:60] + "...")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{shown(key)}: {shown(value[key])}" for key in list(value)[:4]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(item) for item in value[:4]) + (", ...]" if len(value) > 4 else "]")
    return repr(value)[:80]


def is_empty(value: Any) -> bool:
    """Whether a key holds nothing: null, "", no bytes, an empty list or object, or one of nothing but these."""
    if value is None or isinstance(value, (str, bytes)):
        return not value
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(item) for item in value)
    return False


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can write and UTF-8 cannot."""
    return not _SURROGATE.search(text)


def read_images(value: Any, key: str) -> tuple[Image, ...]:
    """The images of a key: one, or a list of them.

    Raises:
        RecordError: something there is no image.
    """
    if is_empty(value):
        return ()
    return tuple(read_image(item, key) for item in (value if isinstance(value, (list, tuple)) else [value]))


def read_image(value: Any, key: str) -> Image:
    """One image: a path, a data: URL, bytes, or an object of `bytes` and `path`, or with a `url`.

    Raises:
        RecordError: it is none of these, an address elsewhere, or base64 that cannot be decoded.
    """
    path, data = _path_or_bytes(value, key, "an image")
    return Image(path, data)


def read_videos(value: Any, key: str) -> tuple[Video, ...]:
    """The videos of a key: one, or a list of them. A list of image files is one video, with these frames.

    Raises:
        RecordError: something there is no video.
    """
    if is_empty(value):
        return ()
    if not isinstance(value, (list, tuple)) or _are_frames(value):
        return (read_video(value, key),)
    return tuple(read_video(item, key) for item in value)


def read_video(value: Any, key: str) -> Video:
    """One video: a path of a file or a folder of frames, a data: URL, bytes, an object of them, or a list of frames.

    Raises:
        RecordError: as :func:`read_image`.
    """
    if isinstance(value, (list, tuple)) and value:
        return Video(frames=read_images(value, key))
    path, data = _path_or_bytes(value, key, "a video")
    return Video(path, data)


def _are_frames(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(v, str) and PurePosixPath(v).suffix.lower() in IMAGE_SUFFIXES for v in values)


def _path_or_bytes(value: Any, key: str, what: str) -> tuple[str | None, bytes | None]:
    given = value
    if isinstance(given, Mapping):
        given = next((given[k] for k in ("bytes", "path", "url") if not is_empty(given.get(k))), None)
    if isinstance(given, bytes) and given:
        return None, given
    if not isinstance(given, str) or not given or not is_unicode(given):
        raise RecordError(
            Reason.MISSING_IMAGE,
            f"`{key}` must hold a path, a list of paths, or the bytes of {what}, not {shown(value)}",
        )
    start = given[:8].lower()
    if start.startswith(("http://", "https://")):
        raise RecordError(
            Reason.REMOTE_IMAGE, f"`{key}` holds the address {shown(given)}; download the files and give their paths"
        )
    if start.startswith("data:"):
        return None, _decode(given, key)
    if any(len(name.encode()) > _LONGEST_NAME for name in given.split("/")):
        raise RecordError(
            Reason.MISSING_IMAGE,
            f"`{key}` holds a text of {len(given)} characters, which is no path; base64 needs `data:image/png;base64,` "
            "before it",
        )
    return given, None


def _decode(url: str, key: str) -> bytes:
    head = _DATA_URL.match(url)
    try:
        data = base64.b64decode("".join(url[head.end() :].split()), validate=True) if head else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise RecordError(
            Reason.UNDECODABLE_IMAGE, f"`{key}` holds a data: URL of {len(url)} characters that is not valid base64"
        )
    return data
