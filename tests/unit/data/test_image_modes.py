"""What each kind of picture becomes: against the numbers that were written, whatever Pillow makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_haplovl.data.image_kinds import FORMATS
from megatron_haplovl.data.image_modes import ImageError, TruncatedImageError, UnclearImageError, left_out, to_rgb
from megatron_haplovl.data.image_processing import UndecodableImageError, decode_image, inspect_image, open_image
from tests.fixtures.pictures import Pixels, grey, in_mode, numbers, png, reference, saved, tiff

Image.init()


def assert_pixels(found: Image.Image, expected: Pixels, allowed: int = 0) -> None:
    assert found.mode == "RGB"
    difference = np.abs(np.asarray(found).astype(int) - expected.astype(int))
    assert difference.shape == expected.shape and difference.max() <= allowed


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow(mode: str) -> None:
    image = in_mode(mode)
    if mode in ("I", "F"):
        with pytest.raises(UnclearImageError, match=f"of mode {mode}: its numbers have no stated range"):
            to_rgb(image)
        return
    found = to_rgb(image)
    assert_pixels(found, *reference(image))
    assert to_rgb(found) is found


def written_by_pillow() -> Iterator[tuple[str, str]]:
    for kind in sorted(Image.SAVE):
        for mode in Image.MODES:
            try:
                saved(in_mode(mode), kind)
            except (OSError, ValueError, KeyError, TypeError, NotImplementedError):
                continue  # Pillow does not write this mode in this format.
            yield kind, mode


@pytest.mark.parametrize(("kind", "mode"), list(written_by_pillow()))
def test_all_that_pillow_writes(kind: str, mode: str) -> None:
    data = saved(in_mode(mode), kind)
    if kind not in (*FORMATS, "MPO"):
        with pytest.raises(UndecodableImageError, match="JPEG, PNG, WEBP, GIF, BMP, TIFF and PPM are read"):
            decode_image(data)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's advice is followed or is no concern.
        opened = open_image(data)
        if opened.mode in ("I", "F"):
            with pytest.raises(UnclearImageError, match=f"a {kind} image of mode {opened.mode}"):
                decode_image(data)
            return
        assert_pixels(decode_image(data), *reference(opened))


# Each with what must come out. Rows of numbers that Pillow cannot write, or keeps in another way than they are meant.
GREY16, RGB16, RGB = numbers(1, top=65536, dtype=np.uint16), numbers(2, 3, 65536, np.uint16), numbers(3, 3)
RGBA = numbers(10, 4)
LA16, RGBA16 = numbers(4, 2, 65536, np.uint16), numbers(5, 4, 65536, np.uint16)
GREY, ALPHA, INDEX = numbers(6), numbers(7, 4), numbers(8, top=4)
PALETTE = numbers(9, 3)[0, :4]
READ = {
    "PNG 1 bit": (png(INDEX % 2, 0, 1), grey(INDEX % 2 * 255)),
    "PNG 2 bits": (png(INDEX, 0, 2), grey(INDEX * 85)),
    "PNG 4 bits": (png(GREY % 16, 0, 4), grey(GREY % 16 * 17)),
    "PNG grey with a transparent level": (png(GREY, 0, 8, [(b"tRNS", bytes([0, GREY[0, 0]]))]), grey(GREY)),
    "PNG 16 bits": (png(GREY16, 0, 16), grey(GREY16 // 256)),
    "PNG 16 bits with a transparent level": (png(GREY16, 0, 16, [(b"tRNS", b"\0\x07")]), grey(GREY16 // 256)),
    "PNG RGB with a transparent colour": (png(RGB, 2, 8, [(b"tRNS", bytes(6))]), RGB),
    "PNG RGB 16 bits": (png(RGB16, 2, 16), RGB16 // 256),
    "PNG palette": (png(INDEX, 3, 2, [(b"PLTE", PALETTE.tobytes())]), PALETTE[INDEX]),
    "PNG palette with alpha": (
        png(INDEX, 3, 2, [(b"PLTE", PALETTE.tobytes()), (b"tRNS", b"\0\x40\x80\xff")]),
        PALETTE[INDEX],
    ),
    "PNG palette with one transparent colour": (
        png(INDEX, 3, 2, [(b"PLTE", PALETTE.tobytes()), (b"tRNS", b"\xff\0\xff\xff")]),
        PALETTE[INDEX],
    ),
    "PNG grey and alpha 16 bits": (png(LA16, 4, 16), grey(LA16[:, :, 0] // 256)),
    "PNG RGBA 16 bits": (png(RGBA16, 6, 16), RGBA16[:, :, :3] // 256),
    "PPM 16 bits": (b"P6 14 10 65535\n" + RGB16.astype(">u2").tobytes(), np.round(RGB16 / 65535 * 255)),
    "PPM of 1023": (
        b"P6 14 10 1023\n" + (RGB16 % 1024).astype(">u2").tobytes(),
        np.round((RGB16 % 1024) / 1023 * 255),
    ),
    "PGM of 15": (b"P5 14 10 15\n" + (GREY % 16).tobytes(), grey(GREY % 16 * 17)),
    "PGM in text": (b"P2 14 10 255\n" + b" ".join(b"%d" % x for x in GREY.flat), grey(GREY)),
    "TIFF 16 bits little-endian": (tiff(GREY16.astype("<u2").tobytes(), {258: 16, 262: 1}), grey(GREY16 // 256)),
    "TIFF 16 bits big-endian": (tiff(GREY16.astype(">u2").tobytes(), {258: 16, 262: 1}, ">"), grey(GREY16 // 256)),
    "TIFF white is zero": (tiff(GREY.tobytes(), {258: 8, 262: 0}), grey(255 - GREY)),
    "TIFF RGB 16 bits": (tiff(RGB16.astype("<u2").tobytes(), {258: [16] * 3, 262: 2, 277: 3}), RGB16 // 256),
    "TIFF planes apart": (
        tiff(RGB.transpose(2, 0, 1).tobytes(), {258: [8] * 3, 262: 2, 277: 3, 284: 2, 278: 10}, strips=3),
        RGB,
    ),
    "TIFF RGB and more": (
        tiff(np.dstack([RGB, GREY]).tobytes(), {258: [8] * 4, 262: 2, 277: 4, 338: 0}),
        RGB,
    ),
    "TIFF YCbCr": (
        tiff(np.full((10, 14, 3), [81, 90, 240], np.uint8).tobytes(), {258: [8] * 3, 262: 6, 277: 3, 530: [1, 1]}),
        np.full((10, 14, 3), [238, 14, 14]),
    ),
    "TIFF CMYK": (
        tiff(ALPHA.tobytes(), {258: [8] * 4, 262: 5, 277: 4}),
        np.round((255.0 - ALPHA[:, :, :3]) * (255.0 - ALPHA[:, :, 3:]) / 255),
    ),
    "TIFF palette": (
        tiff(
            INDEX.tobytes(),
            {
                258: 8,
                262: 3,
                320: (257 * np.vstack([PALETTE.astype(int), np.zeros((252, 3))])).astype(int).T.ravel().tolist(),
            },
        ),
        PALETTE[INDEX],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_kinds_that_are_read(name: str) -> None:
    data, expected = READ[name]
    assert_pixels(decode_image(data), expected, allowed=1 if name in ("TIFF CMYK", "TIFF YCbCr") else 0)


def test_a_16_bit_png_of_an_older_pillow() -> None:
    image = Image.fromarray(GREY16.astype(np.int32))
    image.format = "PNG"
    assert_pixels(to_rgb(image), grey(GREY16 // 256))


@pytest.mark.parametrize("compression", ["raw", "packbits", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B"])
def test_compressed_tiff(mode: str, compression: str) -> None:
    image = in_mode(mode)
    assert_pixels(decode_image(saved(image, "TIFF", compression=compression)), *reference(image))


def adobe_removed(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


F32 = GREY.astype("<f4")
UNCLEAR = {
    "JPEG CMYK without Adobe's marker": (
        adobe_removed(saved(in_mode("CMYK"), "JPEG")),
        "a JPEG image of mode CMYK: without Adobe's marker nothing says whether its inks are inverted",
    ),
    "PGM 16 bits": (b"P5 14 10 65535\n" + GREY16.astype(">u2").tobytes(), "PPM image of mode I: its numbers have no"),
    "PGM of 1023": (b"P5 14 10 1023\n" + (GREY16 % 1024).astype(">u2").tobytes(), "PPM image of mode I: its numbers"),
    "PFM": (b"Pf 14 10 -1.0\n" + F32.tobytes(), "PPM image of mode F"),
    "TIFF float": (tiff(F32.tobytes(), {258: 32, 262: 1, 339: 3}), "TIFF image of mode F"),
    "TIFF 32 bits": (tiff(GREY.astype("<u4").tobytes(), {258: 32, 262: 1}), "TIFF image of mode I"),
    "TIFF signed 16 bits": (tiff(GREY16.astype("<i2").tobytes(), {258: 16, 262: 1, 339: 2}), "TIFF image of mode I"),
    "TIFF signed": (tiff(GREY.tobytes(), {258: 8, 262: 1, 339: 2}), r"not unsigned integers \(SampleFormat \[2\]\)"),
    "TIFF 12 bits": (tiff(bytes(10 * 21), {258: 12, 262: 1}), r"it has \[12\] bits, which Pillow keeps as 16"),
    "TIFF white is zero, 16 bits": (tiff(GREY16.tobytes(), {258: 16, 262: 0}), "its white is zero"),
    "TIFF planes apart, 16 bits": (
        tiff(RGB16.transpose(2, 0, 1).tobytes(), {258: [16] * 3, 262: 2, 277: 3, 284: 2, 278: 10}, strips=3),
        "its planes are stored apart and have not 8 bits",
    ),
    "TIFF grey planes apart, 16 bits": (
        tiff(GREY16.tobytes(), {258: 16, 262: 1, 284: 2}),
        "its planes are stored apart",
    ),
    "TIFF YCbCr subsampled": (tiff(bytes(420), {258: [8] * 3, 262: 6, 277: 3}), "its colours are subsampled"),
    "TIFF of huge tiles": (
        tiff(bytes(99), {258: 8, 259: 8, 262: 1, 322: 40000, 323: 40000}),
        "its tiles of 40000 x 40000 pixels are out of proportion to it",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_kinds_whose_numbers_are_unclear(name: str) -> None:
    data, message = UNCLEAR[name]
    with pytest.raises(UnclearImageError, match=message):
        decode_image(data)


JPEG = saved(Image.fromarray(RGB), "JPEG")
UNREADABLE = {
    "nothing": (b"", "the file is empty"),
    "zeros": (bytes(5000), "it is only zero bytes"),
    "HTML": (b"\n<!DOCTYPE html><html>", "it is an HTML page"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "it is an SVG drawing"),
    "XML": (b"<Error>denied</Error>", "it is an XML text"),
    "JSON": (b'{"error": 404}', "it is a JSON text"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "PDF": (b"%PDF-1.7", "it is a PDF document"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is a PostScript drawing"),
    "HEIF": (b"\0\0\0\x18ftypheic", "it is a HEIF image"),
    "AVIF": (b"\0\0\0\x18ftypavif", "it is an AVIF image"),
    "MP4": (b"\0\0\0\x18ftypisom", "it is a video"),
    "JPEG XL": (b"\xff\x0a\x10", "it is a JPEG XL image"),
    "gzip": (b"\x1f\x8b\x08", "it is a gzip file"),
    "zip": (b"PK\x03\x04", "it is a zip file"),
    "ICO": (saved(Image.fromarray(RGB), "ICO"), "it is an image of the format ICO"),
    "TGA": (saved(Image.fromarray(RGB), "TGA"), "it is an image of the format TGA"),
    "text": (b"hello", "its first bytes, b'hello', are not those of a known image"),
    "JPEG of 12 bits": (
        JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        "the header of a JPEG image is damaged, or of a kind that is not read: cannot handle 12-bit layers",
    ),
    "PNG cut in its header": (png(GREY, 0, 8)[:20], "the header of a PNG image is damaged"),
    "TIFF of 64-bit floats": (
        tiff(bytes(1120), {258: 64, 262: 1, 339: 3}),
        "a TIFF image is damaged, .*unknown pixel mode",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_cause_is_named(name: str) -> None:
    data, message = UNREADABLE[name]
    with pytest.raises(UndecodableImageError, match=message) as caught:
        decode_image(data)
    assert "MPO" not in str(caught.value) and len(str(caught.value)) < 400


# By the Exif standard: how the stored rows and columns lie. Each turns a stored picture upright.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


def with_orientation(image: Image.Image, kind: str, value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("value", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_pictures_are_set_upright(kind: str, value: int) -> None:
    image = Image.fromarray(RGB)
    stored = decode_image(saved(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    found = decode_image(with_orientation(image, kind, value))
    assert_pixels(found, UPRIGHT.get(value, UPRIGHT[1])(np.asarray(stored)))
    inspected = inspect_image(with_orientation(image, kind, value))
    assert (inspected.width, inspected.height) == found.size
    assert to_rgb(found) is found
    if kind != "TIFF":  # Pillow turns TIFF itself.
        assert_pixels(decode_image(with_orientation(image, kind, value), upright=False), np.asarray(stored))


def test_upright_in_another_mode_and_without_exif() -> None:
    values = GREY16
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(values), "PNG", exif=exif)
    assert_pixels(decode_image(data), np.rot90(grey(values // 256), -1))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="8"/></x:xmpmeta>'
    data = saved(Image.fromarray(RGB), "PNG")
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    assert_pixels(decode_image(png(RGB, 2, 8, [(b"iTXt", text)])), np.rot90(RGB))


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    data = saved(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0nonsense")
    assert_pixels(decode_image(data), RGB)
    assert inspect_image(data).left_out == ("damaged EXIF",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_is_taken(kind: str) -> None:
    first, second = (Image.fromarray(grey(numbers(seed))) for seed in (1, 2))
    exact = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=[second], **exact)
    assert_pixels(decode_image(data), np.asarray(first), allowed=0 if kind != "MPO" else 60)
    assert inspect_image(data).left_out == ("later frames",)


def test_transparency_is_named_where_there_is_some() -> None:
    opaque, half = RGBA.copy(), RGBA.copy()
    opaque[:, :, 3], half[:, :, 3] = 255, 128
    assert inspect_image(png(opaque, 6, 8)).left_out == ()
    assert inspect_image(png(half, 6, 8)).left_out == ("transparency",)
    for name in ("PNG palette with alpha", "PNG grey with a transparent level", "PNG grey and alpha 16 bits"):
        assert inspect_image(READ[name][0]).left_out == ("transparency",), name
    assert left_out(in_mode("La")) == ("transparency",)


@pytest.mark.parametrize(
    ("name", "found"),
    [(b"sRGB IEC61966-2.1", ()), ("sRGB".encode("utf-16be"), ()), (b"Display P3", ("colour profile",))],
)
def test_profiles_other_than_srgb_are_named(name: bytes, found: tuple[str, ...]) -> None:
    assert inspect_image(saved(Image.fromarray(RGB), "PNG", icc_profile=b"desc" + name)).left_out == found


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_always_an_image_error(kind: str) -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data = np.frombuffer(saved(Image.fromarray(RGB), kind, **options), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            damaged = data.copy()
            for place in random.integers(0, len(data), 3):
                damaged[place] = random.integers(0, 256)
            try:
                image = decode_image(damaged.tobytes(), max_pixels=10**6)
                inspect_image(damaged.tobytes(), max_pixels=10**6)
            except ImageError:
                continue
            assert image.mode == "RGB"


def test_cut_pixels_say_so() -> None:
    with pytest.raises(TruncatedImageError, match="the pixels of a JPEG image cannot be read"):
        decode_image(JPEG[:-50])


def test_the_page_has_every_mode_and_every_format() -> None:
    page = Path(__file__).parents[3] / "docs" / "data.md"
    pictures = page.read_text(encoding="utf-8").partition("## Pictures")[2].partition("\n## ")[0]
    first_columns = " ".join(line.split("|")[1] for line in pictures.splitlines() if line.startswith("|"))
    assert [mode for mode in Image.MODES if f"`{mode}`" not in first_columns] == []
    assert [kind for kind in FORMATS if kind not in first_columns.upper()] == []
    assert [
        name
        for name in ("transparency", "later frames", "colour profile", "damaged EXIF")
        if f"`{name}`" not in " ".join(pictures.split())
    ] == []
