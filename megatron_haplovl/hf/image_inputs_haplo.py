"""Whatever a caller gives as an image, as the picture that training sees."""

from __future__ import annotations

import base64
import binascii
import os
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_haplovl.data.image_modes import to_rgb
from megatron_haplovl.data.image_processing import decode_image

_SECONDS = 60
"""How long a server may be silent."""


def as_picture(given: Any) -> Image.Image:
    """The RGB picture that training would see.

    Transformers' `load_image` is not used for paths and addresses, because it clips what has more than 8 bits.

    Args:
        given: a picture of Pillow's; an array `[height, width]`, `[height, width, 1]`, `[height, width, 3]` or
            `[height, width, 4]` of uint8 (the last one's transparency is not used); a path, an address (http, https), a
            data URL, or base64 text.

    Raises:
        ValueError: anything else, or an image that cannot be used.
    """
    if isinstance(given, Image.Image):
        return to_rgb(given)
    if isinstance(given, np.ndarray):
        return to_rgb(_of_array(given))
    if isinstance(given, str):
        return decode_image(_bytes_of(given))
    raise ValueError(
        f"expected a PIL image, a uint8 array [height, width, 3], a path or an address, got {type(given).__name__}"
    )


def _of_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(
            f"an array of {array.dtype} does not say which of its numbers is white; give uint8, 0 to 255 (for numbers "
            "from 0 to 1: (255 * array).round().astype('uint8'))"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"an array {list(array.shape)} is no image; give [height, width] or [height, width, 3]")
    return Image.fromarray(array)


def _bytes_of(address: str) -> bytes:
    if address.startswith(("http://", "https://")):
        try:
            # Some servers answer nobody without a name.
            request = urllib.request.Request(address, headers={"User-Agent": "megatron-haplovl"})
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                fetched: bytes = answer.read()
        except OSError as error:
            raise ValueError(f"{address} cannot be fetched: {error}") from error
        return fetched
    if address.startswith("data:image/"):
        address = address.partition(",")[2]
    elif os.path.isfile(address):
        return Path(address).read_bytes()
    try:
        return base64.b64decode("".join(address.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{address[:100]!r} is no file, no address (http, https) and no base64 text") from error
