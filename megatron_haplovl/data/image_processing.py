"""From encoded image bytes to normalised tiles. Pillow and numpy only, so that the released processor can share it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import (
    fit_within,
    grid_pinpoints,
    select_best_resolution,
)

CLIP_MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the pixels that OpenAI's CLIP was trained on (red, green, blue, of pixels in 0..1)."""
CLIP_STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the same pixels."""

DEFAULT_MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded by default: where Pillow starts to warn of a decompression bomb."""
HIGHEST_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS
"""Pillow refuses larger images whatever limit is given."""

# Only formats whose decoders are part of Pillow and start no other program (as the one for EPS does).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO")
# What Pillow's decoders raise on damaged data, whichever the format.
_DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, struct.error, zlib.error)


class ImageError(ValueError):
    """An image that cannot be used; the message says why."""


class UndecodableImageError(ImageError):
    """The bytes are no image of a supported format."""


class TruncatedImageError(ImageError):
    """The header is that of an image, but the pixels are incomplete or damaged."""


class DecompressionBombError(ImageError):
    """The image has more pixels than allowed."""


def decode_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB.

    The first frame of an animation is taken, and no EXIF rotation is applied (as in the LLaVA family, whose weights
    were trained so).

    Args:
        data: the encoded bytes: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.
        max_pixels: refuse larger images before decoding them; at most `HIGHEST_MAX_PIXELS`.

    Raises:
        UndecodableImageError: no image of these formats.
        TruncatedImageError: the pixels cannot be read to the end.
        DecompressionBombError: more than `max_pixels` pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise DecompressionBombError(str(error)) from error
        except _DECODER_ERRORS as error:
            raise UndecodableImageError(f"not a readable image ({len(data)} bytes): {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise DecompressionBombError(f"{height} x {width} pixels are more than the limit of {max_pixels}")
    if width < 1 or height < 1:
        raise UndecodableImageError(f"an image of {height} x {width} pixels")
    try:
        return image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise TruncatedImageError(f"the pixels of a {image.format} image cannot be read: {error}") from error


def image_to_tiles(image: Image.Image, vision: VisionConfig) -> npt.NDArray[np.float32]:
    """Fit an image into its tiles and normalise it; `image_geometry.image_layout` describes the same tiles.

    Args:
        image: an RGB image.
        vision: tile size and the way to treat the shape.

    Returns:
        `[T, 3, image_size, image_size]` float32: tiles in row-major order, `(pixel / 255 - mean) / std`.
    """
    side = vision.image_size
    if vision.image_aspect_ratio == "resize":
        pixels_HWC = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    elif vision.image_aspect_ratio == "pad":
        pixels_HWC = np.asarray(_pad_to_square(image).resize((side, side), Image.Resampling.BICUBIC))
    else:
        pixels_HWC = _fit_and_pad(image, *select_best_resolution(image.height, image.width, grid_pinpoints(vision)))
    rows, cols = pixels_HWC.shape[0] // side, pixels_HWC.shape[1] // side
    tiles = pixels_HWC.reshape(rows, side, cols, side, 3).transpose(0, 2, 4, 1, 3).reshape(rows * cols, 3, side, side)
    mean = np.array(CLIP_MEAN, dtype=np.float32).reshape(3, 1, 1)
    std = np.array(CLIP_STD, dtype=np.float32).reshape(3, 1, 1)
    return (tiles.astype(np.float32) * np.float32(1 / 255) - mean) / std


def _pad_to_square(image: Image.Image) -> Image.Image:
    """Centre the image on a square of CLIP's mean colour, as LLaVA-1.5 does."""
    if image.width == image.height:
        return image
    side = max(image.size)
    red, green, blue = (int(channel * 255) for channel in CLIP_MEAN)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _fit_and_pad(image: Image.Image, target_height: int, target_width: int) -> npt.NDArray[np.uint8]:
    """Scale to fit, and pad evenly with black to `[target_height, target_width, 3]`, as LLaVA-NeXT does."""
    height, width = fit_within(image.height, image.width, target_height, target_width)
    canvas = np.zeros((target_height, target_width, 3), dtype=np.uint8)
    top, left = (target_height - height) // 2, (target_width - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(
        image.resize((width, height), Image.Resampling.BICUBIC)
    )
    return canvas
