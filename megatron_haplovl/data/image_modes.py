"""What the model sees of a picture, whatever its kind: one rule for training and for the exported processor.

The colours are those of Pillow's `convert("RGB")` of the upright picture, because the loaders of the LLaVA family and
of transformers do the same. Where that would clip, invert or guess, the rule is another, or the picture is refused.
The table in docs/data.md ("Pictures") says what each kind becomes.
"""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageCms

DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    ImageCms.PyCMSError,
)
"""What Pillow's decoders raise on damaged data, whichever the format."""

_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture of each EXIF orientation is set upright."""

# Tags of TIFF 6.0.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _SUBSAMPLING = 258, 262, 284, 339, 530
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_WHITE_IS_ZERO, _PLANES_APART, _UNSIGNED = 0, 2, 1


FREE_PIXELS = 1 << 22
"""Pixels that an image may take on its way whatever its own size."""


class ImageError(ValueError):
    """An image that cannot be used; the message says why."""


class UnclearImageError(ImageError):
    """The image can be read, but its numbers do not say which colours they are."""


class TruncatedImageError(ImageError):
    """The header is that of an image, but the pixels are incomplete or damaged."""


def said(error: BaseException) -> str:
    """What an error of a decoder says, on one line of bounded length; some say nothing but their name."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def to_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
    """The picture that the model sees.

    The first frame; set upright by its EXIF orientation; transparency is not used, so the colours below it show; of 16
    bits the upper 8; colour profiles are not applied. A picture that has been through this function stays as it is.

    Args:
        image: any picture of Pillow's, read or still to be read.
        upright: False leaves a picture as it is stored, for data that was prepared so.

    Returns:
        Mode RGB, 8 bits. The picture itself if it is that already.

    Raises:
        UnclearImageError: numbers without a known range or meaning.
        TruncatedImageError: the pixels cannot be read to the end.
    """
    kind = image.format or "Pillow"
    with warnings.catch_warnings():
        # Pillow advises RGBA where a palette's transparency is not used, and warns of tags that it cannot read.
        warnings.simplefilter("ignore")
        if (cause := _unclear(image)) is not None:
            raise UnclearImageError(f"a {kind} image of mode {image.mode}: {cause}")
        try:
            image.load()
        except DECODER_ERRORS as error:
            raise TruncatedImageError(f"the pixels of a {kind} image cannot be read: {said(error)}") from error
        turn = _TURNS.get(_orientation(image)) if upright else None
        if _has_16_bits(image):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if turn is not None:
            image = image.transpose(turn)
            image.info.clear()  # The tag must not turn it again.
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        return image if image.mode == "RGB" else image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    # Older releases of Pillow keep a 16-bit PNG in 32 bits.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation of a picture that has been read; damaged EXIF data is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return None


def _unclear(image: Image.Image) -> str | None:
    """Why a picture has no honest colours, or None."""
    if image.mode in ("I", "F") and not _has_16_bits(image):
        return (
            "its numbers have no stated range and would be clipped to 0..255; save it with 8 bits, or as a 16-bit PNG"
        )
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        return "without Adobe's marker nothing says whether its inks are inverted; save it as RGB"
    return _unclear_tiff(image) if image.format == "TIFF" else None


def _unclear_tiff(image: Image.Image) -> str | None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    tile_width, tile_height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    if tile_width * tile_height > max(4 * image.width * image.height, FREE_PIXELS):
        return f"its tiles of {tile_height} x {tile_width} pixels are out of proportion to it; save it without tiles"
    bits, format_ = set(tags.get(_BITS_PER_SAMPLE, (1,))), set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
    if format_ != {_UNSIGNED}:
        return f"its samples are not unsigned integers (SampleFormat {sorted(format_)}); save it with 8 bits"
    if image.mode.startswith("I;16") and bits != {16}:
        return f"it has {sorted(bits)} bits, which Pillow keeps as 16 without saying so; save it with 8 or 16"
    if image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO:
        return "its white is zero, which Pillow does not invert at 16 bits; save it with black as zero"
    if tags.get(_PLANAR) == _PLANES_APART and bits != {8}:
        return "its planes are stored apart and have not 8 bits, which Pillow misreads; save it with planes together"
    if image.mode == "YCbCr" and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
        return "its colours are subsampled without compression, which Pillow misreads; save it as RGB"
    return None


def left_out(image: Image.Image) -> tuple[str, ...]:
    """What `to_rgb` does not use of a picture that has been read, by name.

    Returns:
        Of "transparency" (a pixel is not opaque), "later frames", "colour profile" (another than sRGB) and "damaged
        EXIF", those that apply.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _left_out(image)


def _left_out(image: Image.Image) -> tuple[str, ...]:
    profile = (image.info.get("icc_profile") or b"").replace(b"\0", b"")  # The name may be in UTF-16.
    found = {
        "transparency": _is_transparent(image),
        "later frames": _has_later_frames(image),
        "colour profile": bool(profile) and b"sRGB" not in profile,
        "damaged EXIF": _has_damaged_exif(image),
    }
    return tuple(name for name, applies in found.items() if applies)


def _has_damaged_exif(image: Image.Image) -> bool:
    try:
        Image.Exif().load(image.info.get("exif", b""))
    except DECODER_ERRORS:
        return True
    return False


def _has_later_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODER_ERRORS:
        return True  # Something is there, if only a damaged one.


def _is_transparent(image: Image.Image) -> bool:
    has_band = image.getbands()[-1] in "Aa"
    if not has_band and "transparency" not in image.info:
        return False
    with_alpha = image if has_band else image.convert("RGBA")
    return bool(np.asarray(with_alpha.getchannel(with_alpha.getbands()[-1])).min() < 255)
