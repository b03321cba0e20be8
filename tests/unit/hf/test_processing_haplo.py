from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.hf import HaploImageProcessor, HaploProcessor
from megatron_haplovl.hf.modeling_haplo import NEWLINE, TEXT
from tests.fixtures.tiny_haplo import chat_inputs, noise_image, train_tokenizer

_SIZE = {"height": 8, "width": 8}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _processor(path: Path, ratio: str = "anyres_max_4", newline: bool = True) -> HaploProcessor:
    images = HaploImageProcessor(size=_SIZE, patch_size=4, image_aspect_ratio=ratio, image_newline=newline)
    return HaploProcessor(images, load_tokenizer(path).hf)


def test_tiles_of_a_wide_image_are_put_back_into_one_grid(tokenizer_path: Path) -> None:
    """16 x 8 pixels are two tiles of 2 x 2 patches, which make two rows of four: by hand."""
    processor = _processor(tokenizer_path)
    image = noise_image(8, 16)
    out = processor(text="red <image> blue", images=image)
    visual = out["visual_source"][0]
    assert visual[visual != TEXT].tolist() == [0, 1, 4, 5, NEWLINE, 2, 3, 6, 7, NEWLINE]
    first = int((visual != TEXT).nonzero()[0])
    start = out["attention_start_ids"][0]
    assert start[first : first + 10].tolist() == [first] * 10
    assert start[first + 10 :].tolist() == list(range(first + 10, len(start)))
    assert (out["input_ids"][0] == processor.image_token_id).sum() == 10

    pixels = (np.asarray(image, dtype=np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    expected = torch.tensor(np.stack([pixels[:, :8], pixels[:, 8:]])).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(out["pixel_values"], expected)


def test_one_tile_without_newlines(tokenizer_path: Path) -> None:
    out = _processor(tokenizer_path, "pad", newline=False)(text="<image>", images=[noise_image(30, 10)])
    assert out["pixel_values"].shape == (1, 3, 8, 8)
    visual = out["visual_source"][0]
    assert visual[visual != TEXT].tolist() == [0, 1, 2, 3]


def test_video_frames_are_blocks_of_their_own(tokenizer_path: Path) -> None:
    processor = _processor(tokenizer_path)
    frames = [noise_image(20, 30, seed) for seed in range(3)]
    out = processor(text="<video>", videos=frames)
    first = int((out["visual_source"][0] != TEXT).nonzero()[0])
    assert out["pixel_values"].shape == (3, 3, 8, 8)
    assert out["visual_source"][0, first:].tolist() == [*range(12), NEWLINE]
    start = (out["attention_start_ids"][0, first:] - first).tolist()
    assert start == [0] * 4 + [4] * 4 + [8] * 4 + [12]
    assert set(out["input_ids"][0, first:].tolist()) == {processor.video_token_id}
    both = processor(text="<image> <video>", images=noise_image(8, 8), videos=[frames])
    assert both["visual_source"].max() == 4 + 11


@pytest.mark.parametrize("form", ["images", "arrays", "array"])
def test_chat_messages_hold_videos(tokenizer_path: Path, form: str) -> None:
    """In every form that a video may have; the template writes a mark where the message has the video."""
    processor = _processor(tokenizer_path)
    processor.chat_template = load_chat_template("vicuna_v1").source
    frames, image = [noise_image(20, 30, seed) for seed in range(3)], noise_image(9, 17, seed=3)
    arrays = [np.asarray(frame) for frame in frames]
    video = {"images": frames, "arrays": arrays, "array": np.stack(arrays)}[form]
    first = [{"type": "video", "video": video}, {"type": "image", "image": image}, {"type": "text", "text": "what"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": first}]
    found = chat_inputs(processor, messages, add_generation_prompt=True)
    text = str(processor.apply_chat_template(messages, add_generation_prompt=True))
    assert text.index("<video>") < text.index("<image>") < text.index("what")
    expected = processor(text=text, images=image, videos=frames)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_a_row_as_a_whole(tokenizer_path: Path, side: str) -> None:
    processor = _processor(tokenizer_path)
    texts = ["<image> red", "what", "<image> two <image>"]
    images = [[noise_image(8, 16)], [], [noise_image(8, 8), noise_image(16, 8)]]
    batch = processor(text=texts, images=images, padding_side=side)
    first_patch = 0
    for i, (text, row_images) in enumerate(zip(texts, images, strict=True)):
        alone = processor(text=text, images=row_images or None)
        length = alone["input_ids"].shape[1]
        total = batch["input_ids"].shape[1]
        span = slice(total - length, total) if side == "left" else slice(0, length)
        assert batch["attention_mask"][i].sum() == length
        assert batch["attention_mask"][i, span].all()
        assert torch.equal(batch["input_ids"][i, span], alone["input_ids"][0])
        if row_images:
            source = alone["visual_source"][0]
            shifted = torch.where(source >= 0, source + first_patch, source)
            assert torch.equal(batch["visual_source"][i, span], shifted)
            start = alone["attention_start_ids"][0] + span.start
            assert torch.equal(batch["attention_start_ids"][i, span], start)
            first_patch += 4 * len(alone["pixel_values"])
        else:
            assert "pixel_values" not in alone
            assert (batch["visual_source"][i] == TEXT).all()


def test_images_may_be_given_flat(tokenizer_path: Path) -> None:
    processor = _processor(tokenizer_path)
    texts = ["<image> red", "what", "<image> two <image>"]
    images = [noise_image(8, 16, 1), noise_image(8, 8, 2), noise_image(16, 8, 3)]
    flat, nested = processor(text=texts, images=images), processor(text=texts, images=[images[:1], [], images[1:]])
    assert all(torch.equal(flat[name], nested[name]) for name in flat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<image> <image>", "images": noise_image(8, 8)}, "text 0 has 2 image marks, but 1 images"),
        ({"text": "red", "images": noise_image(8, 8)}, "text 0 has 0 image marks, but 1 images"),
        ({"text": "<image>"}, "text 0 has 1 image marks, but 0 images"),
        ({"text": ["<image>", "<image>"], "images": [noise_image(8, 8)]}, "1 images were given for 2 image marks"),
        ({"text": ["<image>"] * 2, "images": [[noise_image(8, 8)]] * 3}, "images for 3 texts were given"),
        ({"text": "<video>"}, "text 0 has 1 video marks"),
        ({"text": "<video>", "videos": [[]]}, "no images given"),
        ({"text": "<video>", "videos": "clip.mp4"}, "a video is its frames in order .* not 'clip.mp4'"),
        ({"text": "<video>", "videos": [["0.png"]]}, "'0.png' is no file"),
        ({"images": noise_image(8, 8)}, "text is needed"),
        ({"text": "red", "shiny": True}, "unknown arguments: shiny"),
        ({"text": "red", "audio": [1]}, "audio"),
        ({"text": "red", "return_tensors": "tf"}, "return_tensors"),
        ({"text": "red", "padding_side": "middle"}, "padding_side"),
        ({"text": ["red", "red two left"], "padding": False}, "different lengths"),
    ],
)
def test_calls_that_are_refused(tokenizer_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _processor(tokenizer_path)(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
        ({"image_aspect_ratio": "anyres_max_0"}, "image_aspect_ratio"),
        ({"image_aspect_ratio": "pad_max_2"}, "image_aspect_ratio"),
        ({"image_grid_pinpoints": [[8, 16]]}, "image_grid_pinpoints"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"resample": int(Image.Resampling.NEAREST)}, "resample"),
        ({"size": {"height": 8, "width": 16}}, "not a square"),
    ],
)
def test_image_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaploImageProcessor(**{"size": _SIZE, "patch_size": 4, "image_aspect_ratio": "anyres_max_4", **changes})


def test_saving(tokenizer_path: Path, tmp_path: Path) -> None:
    processor = _processor(tokenizer_path)
    processor.save_pretrained(tmp_path)
    loaded = HaploProcessor.from_pretrained(tmp_path)
    image = noise_image(21, 9)
    before, after = (one(text="what <image>", images=image) for one in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="num_image_tokens is 9"):
        HaploProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=9)
    with pytest.raises(ValueError, match="no token '<picture>'"):
        HaploProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")
