"""Small files that would become huge pictures are refused by their headers, before memory is taken."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import pytest
from PIL import Image

from megatron_haplovl.data.bounded import bounded
from megatron_haplovl.data.image_kinds import FORMATS
from megatron_haplovl.data.image_modes import ImageError
from megatron_haplovl.data.image_processing import decode_image, inspect_image

MEMORY = 64 << 20
"""Far less than any of the pictures below would take."""


def encoded(kind: str, **options: object) -> bytearray:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 40)).save(file, kind, **options)
    return bytearray(file.getvalue())


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(*extra: bytes, side: int = 8) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + pixels + chunk(b"IEND", b"")


def patched(kind: str, place: int, form: str, *values: int, **options: object) -> bytes:
    data = encoded(kind, **options)
    struct.pack_into(form, data, place, *values)
    return bytes(data)


def jpeg() -> bytes:
    data = encoded("JPEG")
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65535, 65535)
    return bytes(data)


def tiff() -> bytes:
    """Width and length are the first two tags of the directory."""
    data = encoded("TIFF")
    directory = struct.unpack_from("<I", data, 4)[0]
    for number in range(struct.unpack_from("<H", data, directory)[0]):
        place = directory + 2 + 12 * number
        if struct.unpack_from("<H", data, place)[0] in (256, 257):
            struct.pack_into("<HII", data, place + 2, 4, 1, 1 << 20)
    return bytes(data)


def webp() -> bytes:
    """An extended file, whose canvas is 2^24 pixels wide and high."""
    simple = bytes(encoded("WEBP", lossless=True))[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff" * 6
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(simple)) + b"WEBP" + canvas + simple


BOMBS = {
    "PNG": png(side=1 << 30),
    "GIF": patched("GIF", 6, "<HH", 65535, 65535),
    "BMP": patched("BMP", 18, "<ii", 1 << 30, 1 << 30),
    "JPEG": jpeg(),
    "TIFF": tiff(),
    "WEBP": webp(),
    "PPM": b"P6 1000000 1000000 255\n" + bytes(300),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("read", [decode_image, inspect_image])
def test_a_huge_size_in_a_small_file(kind: str, read) -> None:
    assert len(BOMBS[kind]) < 2000
    with bounded(60, MEMORY), pytest.raises(ImageError):
        read(BOMBS[kind])


def test_every_format_is_among_them() -> None:
    assert set(FORMATS) - {"MPO"} <= set(BOMBS)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_chunk_that_inflates_to_much_more(name: bytes) -> None:
    """The picture is 8 x 8 pixels; what stands beside it is refused or passed over."""
    squeezed = zlib.compress(bytes(128 << 20), 1)
    content = {
        b"zTXt": b"Comment\0\0" + squeezed,
        b"iTXt": b"Comment\0\1\0\0\0" + squeezed,
        b"iCCP": b"profile\0\0" + squeezed,
    }[name]
    with bounded(60, MEMORY), contextlib.suppress(ImageError):
        assert decode_image(png(chunk(name, content))).size == (8, 8)


def test_pixels_that_inflate_beyond_the_picture() -> None:
    """Only as much is unpacked as the header promises."""
    squeezed = chunk(b"IDAT", zlib.compress(bytes(128 << 20), 1))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    with bounded(60, MEMORY):
        assert decode_image(b"\x89PNG\r\n\x1a\n" + head + squeezed + chunk(b"IEND", b"")).size == (8, 8)
