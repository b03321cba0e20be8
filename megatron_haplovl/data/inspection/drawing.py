"""An image as the model sees it: its tiles, its patches and its newlines, as SVG around the picture itself."""

from __future__ import annotations

import base64
import io

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_geometry import ImageLayout, fit_within
from megatron_haplovl.data.image_processing import decode_image
from megatron_haplovl.data.sources import EncodedImage

_LONGEST_SIDE = 768  # pixels of a picture in a page


def data_uri(content: bytes, kind: str) -> str:
    """An image as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def draw_image(image: EncodedImage, layout: ImageLayout, vision: VisionConfig, *, is_frame: bool) -> str:
    """SVG of an image or frame: blue lines around tiles, thin ones around kept patches, and a bar for each newline.

    Raises:
        ValueError: the image cannot be decoded.
    """
    picture = decode_image(image.data, image.height * image.width, upright=image.upright)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "png")
    side, cell = vision.image_size, vision.patch_size
    height, width = layout.tile_rows * side, layout.tile_cols * side
    is_stretched = is_frame or vision.image_aspect_ratio == "resize"
    shown_height, shown_width = (
        (height, width) if is_stretched else fit_within(image.height, image.width, height, width)
    )
    top, left = layout.first_row * cell, layout.first_col * cell
    bottom, right = top + layout.rows * cell, left + layout.cols * cell
    newline = cell if layout.newline else 0
    pieces = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {width + newline + 4} {height + 4}" '
        f'width="{min(width + newline, _LONGEST_SIDE)}">',
        f'<rect width="{width}" height="{height}" class="canvas"/>',
        f'<image x="{(width - shown_width) // 2}" y="{(height - shown_height) // 2}" width="{shown_width}" '
        f'height="{shown_height}" preserveAspectRatio="none" href="{data_uri(file.getvalue(), "image/png")}"/>',
        _grid(range(left, right + 1, cell), range(top, bottom + 1, cell), "patch"),
        _grid(range(0, width + 1, side), range(0, height + 1, side), "tile"),
    ]
    if layout.newline:
        pieces += [
            f'<rect x="{right + cell // 4}" y="{y + 1}" width="{max(cell // 2, 1)}" height="{cell - 2}" '
            'class="newline"/>'
            for y in range(top, bottom, cell)
        ]
    return "".join([*pieces, "</svg>"])


def _grid(xs: range, ys: range, kind: str) -> str:
    vertical = "".join(f"M{x} {ys[0]}V{ys[-1]}" for x in xs)
    horizontal = "".join(f"M{xs[0]} {y}H{xs[-1]}" for y in ys)
    return f'<path d="{vertical}{horizontal}" class="{kind}"/>'
