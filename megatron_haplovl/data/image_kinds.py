"""Why some bytes are no image that can be read: the real cause, for the person who has to mend the data."""

from __future__ import annotations

import io
import re
import struct
import warnings

from PIL import Image

from megatron_haplovl.data.image_modes import DECODER_ERRORS, said

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of what is read. Their decoders are part of Pillow and start no other program (as the one for EPS
does); JPEG includes MPO, PNG includes APNG, PPM includes PGM and PBM."""

# What often stands in the place of an image, by the first bytes.
_NO_IMAGES = (
    (rb"\0+\Z", "only zero bytes"),
    (rb"(?i)\s*<(!doctype html|html|head|body)", "an HTML page"),
    (rb"\s*(<\?xml.*)?<svg", "an SVG drawing"),
    (rb"\s*<", "an XML text"),
    (rb"\s*[{[]", "a JSON text"),
    (rb"version https://git-lfs", "a pointer of Git LFS, whose file was not fetched (git lfs pull)"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIF image"),
    (rb".{4}ftypavi[fs]", "an AVIF image"),
    (rb".{4}ftyp|.{4}(moov|mdat)|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image"),
    (rb"\x1f\x8b", "a gzip file"),
    (rb"PK\x03\x04", "a zip file"),
)


def why_unreadable(data: bytes) -> str:
    """One clause about bytes that `Image.open` has refused: what they are, or what is wrong with their header."""
    if not data:
        return "the file is empty"
    for name in FORMATS:
        if error := _error_of(name, data):
            return f"the header of a {name} image is damaged, or of a kind that is not read: {error}"
    return f"{_what_else(data)}; {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are read"


def _what_else(data: bytes) -> str:
    for start, what in _NO_IMAGES:
        if re.match(start, data[:4096], re.DOTALL):
            return f"it is {what}"
    Image.init()
    for name in Image.OPEN:
        if _error_of(name, data) == "":
            return f"it is an image of the format {name}"
    return f"its first bytes, {data[:8]!r}, are not those of a known image"


def _error_of(name: str, data: bytes) -> str | None:
    """What a format's decoder says against the bytes, or nothing; None if they do not begin as its images do."""
    factory, accept = Image.OPEN[name]
    try:
        accepted = accept is None or accept(data[:16])
    except struct.error:
        return None  # Fewer bytes than its images begin with.
    if isinstance(accepted, str):
        return accepted  # Pillow was built without this decoder.
    if not accepted:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            factory(io.BytesIO(data), "")
    except DECODER_ERRORS as error:
        return said(error)
    return ""
