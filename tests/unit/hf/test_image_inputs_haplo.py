"""However an image reaches the exported processor, it becomes the picture that training sees."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from megatron_haplovl.data.image_kinds import FORMATS
from megatron_haplovl.data.image_processing import decode_image, image_to_tiles
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.hf import HaploImageProcessor, HaploProcessor
from megatron_haplovl.hf.image_inputs_haplo import as_picture
from tests.fixtures.pictures import in_mode, numbers, saved
from tests.fixtures.tiny_haplo import train_tokenizer

PROCESSOR = HaploImageProcessor(size={"height": 8, "width": 8}, patch_size=4, image_aspect_ratio="anyres_max_4")


def trained(data: bytes) -> np.ndarray:
    """The numbers of an image in training."""
    return image_to_tiles(decode_image(data), PROCESSOR.vision)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def files() -> Iterator[tuple[str, bytes]]:
    """Whatever Pillow writes and training reads."""
    for kind in (*FORMATS, "MPO"):
        for mode in Image.MODES:
            try:
                yield f"{kind} {mode}", saved(in_mode(mode), kind)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # Pillow does not write this mode in this format.
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "MPO"):
        for orientation in range(1, 9):
            yield f"{kind} of orientation {orientation}", saved(in_mode("RGB"), kind, exif=exif(orientation))
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        yield f"{kind} of two frames", saved(in_mode("RGB"), kind, save_all=True, append_images=[in_mode("L")])


@pytest.mark.parametrize(("name", "data"), [pytest.param(name, data, id=name) for name, data in files()])
def test_every_way_in_gives_the_pixels_of_training(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    ways: dict[str, Callable[[], Any]] = {
        "opened": lambda: Image.open(path),
        "path": lambda: str(path),
        "base64": lambda: text,
        "data URL": lambda: f"data:image/png;base64,{text}",
        "load_image": lambda: load_image(str(path)),
    }
    mode = Image.open(path).mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        del ways["load_image"]  # It clips them to 0..255 before anybody can know.
    for way, given in ways.items():
        if mode in ("I", "F"):
            with pytest.raises(ValueError, match=f"of mode {mode}: its numbers have no stated range"):
                PROCESSOR(given(), return_tensors="np")
            continue
        found = PROCESSOR(given(), return_tensors="np")
        assert np.array_equal(found["pixel_values"], trained(data)), way
        upright = decode_image(data)
        assert found["image_sizes"].tolist() == [[upright.height, upright.width]]


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays(channels: int | None) -> None:
    values = numbers(1, channels)
    colours = values if channels == 3 else values[:, :, :3] if channels == 4 else np.dstack([values] * 3)
    assert np.array_equal(np.asarray(as_picture(values)), colours)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (numbers(1, 3) / 255, "an array of float64 does not say which of its numbers is white"),
        (numbers(1, 3).astype(np.int64), "an array of int64"),
        (numbers(1) > 9, "an array of bool"),
        (numbers(1, 3).transpose(2, 0, 1), r"an array \[3, 10, 14\] is no image"),
        (numbers(1, 2), r"an array \[10, 14, 2\] is no image"),
        (np.zeros((0, 4, 3), np.uint8), "is no image"),
        (7, "expected a PIL image, a uint8 array .*, got int"),
        ("no such file", "'no such file' is no file, no address"),
        ("http://127.0.0.1:9/a.png", "http://127.0.0.1:9/a.png cannot be fetched: .*refused"),
        (base64.b64encode(b"<html>").decode(), "it is an HTML page"),
    ],
)
def test_what_is_no_image_is_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_picture(given)


def test_addresses(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(saved(in_mode("RGB"), "PNG"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(as_picture(f"{address}/image.png")), np.asarray(in_mode("RGB")))
        with pytest.raises(ValueError, match="none.png cannot be fetched: HTTP Error 404"):
            as_picture(f"{address}/none.png")
        server.shutdown()


def test_a_picture_of_a_chat(tmp_path: Path) -> None:
    """As transformers documents it: a path or an opened picture in the message."""
    data = saved(in_mode("RGB"), "JPEG", exif=exif(6))
    (tmp_path / "photo.jpg").write_bytes(data)
    part = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    template = (
        f"{{% for message in messages %}}{{% for part in message['content'] %}}{part}{{% endfor %}}{{% endfor %}}"
    )
    processor: Any = HaploProcessor(PROCESSOR, load_tokenizer(train_tokenizer(tmp_path)).hf, chat_template=template)
    for image in (
        {"path": str(tmp_path / "photo.jpg")},
        {"url": str(tmp_path / "photo.jpg")},
        {"image": Image.open(tmp_path / "photo.jpg")},
    ):
        chat: Any = [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": " red"}]}]
        found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert np.array_equal(found["pixel_values"].numpy(), trained(data))
    nested = PROCESSOR.fetch_images([[str(tmp_path / "photo.jpg")], []])
    assert np.array_equal(np.asarray(nested[0][0]), np.asarray(decode_image(data))) and nested[1] == []
