"""Pixels against the Hugging Face processors, and images that must be refused."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_processing import (
    CLIP_MEAN,
    CLIP_STD,
    HIGHEST_MAX_PIXELS,
    DecompressionBombError,
    TruncatedImageError,
    UndecodableImageError,
    cut_tiles,
    decode_image,
    image_to_tiles,
)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    # Coarse blocks, so that a shift or a wrong filter shows.
    coarse = np.random.default_rng(seed).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def normalised(pixels_HWC: np.ndarray) -> np.ndarray:
    return ((pixels_HWC.astype(np.float64) / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (32, 32), (5, 90)])
def test_resize(size: tuple[int, int]) -> None:
    vision = VisionConfig(patch_size=8, image_size=32, image_aspect_ratio="resize")
    image = picture(*size)
    expected = normalised(np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))
    tiles = image_to_tiles(image, vision)
    assert tiles.shape == (1, 3, 32, 32) and tiles.dtype == np.float32
    np.testing.assert_allclose(tiles[0], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (32, 32)])
def test_pad_is_what_clips_processor_makes_of_a_padded_square(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    vision = VisionConfig(patch_size=8, image_size=32, image_aspect_ratio="pad")
    image = picture(*size)
    height, width = size
    side = max(size)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    expected = processor(Image.fromarray(square), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(image_to_tiles(image, vision), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 61), (70, 30), (32, 32), (100, 25), (1, 200)])
def test_anyres_is_what_llava_nexts_processor_makes(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    from megatron_haplovl.data.image_geometry import grid_pinpoints

    vision = VisionConfig(patch_size=8, image_size=32, image_aspect_ratio="anyres", max_tiles=4)
    image = picture(*size)
    processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[list(p) for p in grid_pinpoints(vision)],
    )
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    # Their tiles begin with one of the whole image, which this model does not have.
    np.testing.assert_allclose(image_to_tiles(image, vision), pixels[1:], atol=1e-5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_formats(kind: str) -> None:
    decoded = decode_image(encode(picture(20, 30), kind))
    assert (decoded.mode, decoded.size) == ("RGB", (30, 20))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_modes(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encode(picture(9, 9).convert("RGB").convert(mode), kind)).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF"])
def test_truncated(kind: str) -> None:
    data = encode(picture(64, 64), kind)
    with pytest.raises((TruncatedImageError, UndecodableImageError)):
        decode_image(data[: len(data) // 2])


def test_truncated_says_so() -> None:
    data = encode(picture(64, 64), "JPEG")
    with pytest.raises(TruncatedImageError, match="the pixels of a JPEG image cannot be read"):
        decode_image(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_undecodable(data: bytes) -> None:
    with pytest.raises(UndecodableImageError):
        decode_image(data)


def test_decompression_bomb() -> None:
    data = encode(Image.new("1", (3000, 3000)), "PNG")
    with pytest.raises(DecompressionBombError, match="3000 x 3000 pixels are more than the limit of 1000000"):
        decode_image(data, max_pixels=1_000_000)
    # Far more than Pillow itself allows; the header is enough to refuse it.
    header = bytearray(encode(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = (60000).to_bytes(4, "little") * 2
    with pytest.raises(DecompressionBombError):
        decode_image(bytes(header), max_pixels=HIGHEST_MAX_PIXELS)


@pytest.mark.parametrize("size", [(40, 3000), (3000, 40), (9, 2999), (2999, 8), (700, 3000), (2500, 611)])
def test_a_padded_strip_is_the_padded_square(size: tuple[int, int]) -> None:
    """The squares of these are too large to be made, but not too large to compare with."""
    vision = VisionConfig(patch_size=14, image_size=336, image_aspect_ratio="pad")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[1]) // 2, (side - size[0]) // 2))
    expected = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC)).astype(int)
    found = cut_tiles(image, vision)[0].transpose(1, 2, 0)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.05 and (expected != [122, 116, 104]).any()


MEMORY = """
import resource, sys
from PIL import Image, ImageCms
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.image_processing import decode_image, image_to_tiles

shapes = [(1, 1), (1, 100000), (100000, 1), (2, 50000), (50000, 2), (10, 60000), (60000, 10), (65000, 30)]
files = []
for height, width in shapes:
    Image.new("RGB", (width, height)).save(path := f"{sys.argv[1]}/{height}.png")
    files.append(open(path, "rb").read())
for i, data in enumerate(files):
    for ratio in ("resize", "pad", "anyres"):
        vision = VisionConfig(patch_size=14, image_size=336, image_aspect_ratio=ratio, max_tiles=6)
        assert image_to_tiles(decode_image(data), vision).shape[1:] == (3, 336, 336)
    if i == 0:  # Everything is loaded now; from here on, 48 MB more must do.
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 48 * 2**20, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its size from /proc")
def test_no_shape_costs_memory_out_of_proportion(tmp_path: Path) -> None:
    """The largest of these has 2 million pixels: 8 MB in Pillow's form."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
