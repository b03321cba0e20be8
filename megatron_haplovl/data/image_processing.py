"""From encoded image bytes to tiles. Pillow and numpy only, so that the released processor can share it."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import (
    fit_within,
    grid_pinpoints,
    select_best_resolution,
)
from megatron_haplovl.data.image_kinds import FORMATS, why_unreadable
from megatron_haplovl.data.image_modes import DECODER_ERRORS, FREE_PIXELS, left_out, to_rgb
from megatron_haplovl.data.image_modes import ImageError as ImageError
from megatron_haplovl.data.image_modes import TruncatedImageError as TruncatedImageError

CLIP_MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the pixels that OpenAI's CLIP was trained on (red, green, blue, of pixels in 0..1)."""
CLIP_STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the same pixels."""

DEFAULT_MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded by default: where Pillow starts to warn of a decompression bomb."""
HIGHEST_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS
"""Pillow refuses larger images whatever limit is given."""


class UndecodableImageError(ImageError):
    """The bytes are no image of a supported format."""


class DecompressionBombError(ImageError):
    """The image has more pixels than allowed."""


def decode_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS, *, upright: bool = True) -> Image.Image:
    """Decode an image to what the model sees of it (`image_modes.to_rgb`).

    Args:
        data: the encoded bytes, in one of `image_kinds.FORMATS`.
        max_pixels: refuse larger images before decoding them; at most `HIGHEST_MAX_PIXELS`.
        upright: False leaves the picture as it is stored, for data that was prepared so.

    Returns:
        Mode RGB.

    Raises:
        UndecodableImageError: no image of these formats.
        UnclearImageError: the numbers do not say which colours they are.
        TruncatedImageError: the pixels cannot be read to the end.
        DecompressionBombError: more than `max_pixels` pixels.
    """
    return to_rgb(open_image(data, max_pixels), upright=upright)


@dataclass(frozen=True)
class InspectedImage:
    """An image that has been decoded once, to the end."""

    height: int
    """Of the upright picture."""
    width: int
    left_out: tuple[str, ...]
    """What of it is not used (`image_modes.left_out`)."""


def inspect_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> InspectedImage:
    """Decode an image for its size and for what is lost of it.

    Raises:
        ImageError: see :func:`decode_image`.
    """
    image = open_image(data, max_pixels)
    picture = to_rgb(image)
    return InspectedImage(picture.height, picture.width, left_out(image))


def open_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Read an image's header; the pixels are read when they are first used.

    Raises:
        UndecodableImageError: see :func:`decode_image`.
        DecompressionBombError: likewise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What the warnings say is in the errors, or is no concern of the pixels.
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise DecompressionBombError(str(error)) from error
        except DECODER_ERRORS as error:
            raise UndecodableImageError(f"not a readable image ({len(data)} bytes): {why_unreadable(data)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise DecompressionBombError(f"{height} x {width} pixels are more than the limit of {max_pixels}")
    if width < 1 or height < 1:
        raise UndecodableImageError(f"an image of {height} x {width} pixels")
    return image


def image_to_tiles(image: Image.Image, vision: VisionConfig) -> npt.NDArray[np.float32]:
    """The numbers that the model sees of an image: :func:`cut_tiles`, normalised.

    Returns:
        `[T, 3, image_size, image_size]`.
    """
    return normalise(cut_tiles(image, vision))


def cut_tiles(image: Image.Image, vision: VisionConfig) -> npt.NDArray[np.uint8]:
    """Fit an image into its tiles; `image_geometry.image_layout` describes the same tiles.

    Args:
        image: an RGB image.
        vision: tile size and the way to treat the shape.

    Returns:
        `[T, 3, image_size, image_size]` uint8: tiles in row-major order, as they travel to the device.
    """
    side = vision.image_size
    if vision.image_aspect_ratio == "resize":
        pixels_HWC = np.asarray(_resize(image, side, side))
    elif vision.image_aspect_ratio == "pad":
        pixels_HWC = np.asarray(_pad_to_square(image, side))
    else:
        pixels_HWC = _fit_and_pad(image, *select_best_resolution(image.height, image.width, grid_pinpoints(vision)))
    rows, cols = pixels_HWC.shape[0] // side, pixels_HWC.shape[1] // side
    tiles = pixels_HWC.reshape(rows, side, cols, side, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles).reshape(rows * cols, 3, side, side)


def normalise(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """`(tile / 255 - mean) / std` in float32: what `Batch.pixels_TCHW` computes on the device, bit for bit on a CPU.

    Args:
        tiles: `[T, 3, height, width]`.
    """
    pixels = tiles.astype(np.float32)
    pixels *= np.float32(1 / 255)
    pixels -= np.array(CLIP_MEAN, dtype=np.float32).reshape(3, 1, 1)
    pixels /= np.array(CLIP_STD, dtype=np.float32).reshape(3, 1, 1)
    return pixels


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize by the bicubic filter, in memory in proportion to the image and to the result.

    Releases of Pillow that resize the rows first, whatever it costs, would make a narrow strip as wide as the result at
    its full height.
    """
    if width * image.height > max(4 * image.width * image.height, FREE_PIXELS):
        image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _pad_to_square(image: Image.Image, side: int) -> Image.Image:
    """Centre the image on a square of CLIP's mean colour, as LLaVA-1.5 does, and resize the square."""
    long = max(image.size)
    if long**2 > max(4 * image.width * image.height, FREE_PIXELS):
        return _pad_strip(image, side)
    square = _on_mean_colour(image, long, long) if image.width != image.height else image
    return square.resize((side, side), Image.Resampling.BICUBIC)


def _pad_strip(image: Image.Image, side: int) -> Image.Image:
    """The same for a long strip, whose square would be out of proportion: at most one level of 255 apart.

    The long side is resized first. Of the square, only the band around the strip is then made: all that the filter
    reaches from the strip's pixels. The rest keeps its one colour.
    """
    if image.width > image.height:
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        return _pad_strip(turned, side).transpose(Image.Transpose.TRANSPOSE)
    scale = image.height / side
    columns = min(side, math.ceil(image.width / scale) + 8)
    columns -= (side - columns) % 2  # The band is as much to the left of the middle as to the right.
    width = math.ceil(columns * scale)
    width += (image.height - width) % 2  # The strip lies half a pixel off the middle where it does in the square.
    strip = image.resize((image.width, side), Image.Resampling.BICUBIC)
    box = ((width - columns * scale) / 2, 0, (width + columns * scale) / 2, side)
    band = _on_mean_colour(strip, width, side).resize((columns, side), Image.Resampling.BICUBIC, box)
    return _on_mean_colour(band, side, side)


def _on_mean_colour(image: Image.Image, width: int, height: int) -> Image.Image:
    red, green, blue = (int(channel * 255) for channel in CLIP_MEAN)
    canvas = Image.new("RGB", (width, height), (red, green, blue))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _fit_and_pad(image: Image.Image, target_height: int, target_width: int) -> npt.NDArray[np.uint8]:
    """Scale to fit, and pad evenly with black to `[target_height, target_width, 3]`, as LLaVA-NeXT does."""
    height, width = fit_within(image.height, image.width, target_height, target_width)
    canvas = np.zeros((target_height, target_width, 3), dtype=np.uint8)
    top, left = (target_height - height) // 2, (target_width - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(_resize(image, width, height))
    return canvas
