"""The exported processor against training's own layout: the same ids, mask, patch sources and pixels, bit for bit.

Random text with images and videos at random places, of random shapes, seen in every way that a model may see them.
Planted once to see this test fail: the number of images without the videos in the processor's rule, a video's newline
that sees its last frame, frames that are cut like images, and in training the tiles of an image alone for several.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.dataset import Document, lay_out_document
from megatron_haplovl.data.image_geometry import Frames, Picture, visual_layouts
from megatron_haplovl.data.image_processing import normalise
from megatron_haplovl.data.sources import EncodedImage, EncodedVideo, Sample
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_haplovl.hf import HaploImageProcessor, HaploProcessor
from megatron_haplovl.hf.modeling_haplo import NEWLINE, TEXT
from tests.fixtures.tiny_haplo import train_tokenizer
from tests.fixtures.visual_rule import blocks_of_sample
from tests.unit.data.test_image_references import some_vision

VISIONS, SAMPLES = 20, 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def some_image(random: np.random.Generator) -> EncodedImage:
    height, width = np.exp(random.uniform(0, 4, size=2)).astype(int).tolist()
    pixels = random.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return EncodedImage(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes(), height, width)


def opened(image: EncodedImage) -> Image.Image:
    return Image.open(io.BytesIO(image.data))


def some_conversation(random: np.random.Generator) -> tuple[str, list[EncodedImage | EncodedVideo]]:
    words: list[str] = []
    visuals: list[EncodedImage | EncodedVideo] = []
    for _ in range(int(random.integers(1, 9))):
        kind = random.choice(["red circle", "what", "<image>", "<image>", "<video>"])
        words.append(str(kind))
        if kind == "<image>":
            visuals.append(some_image(random))
        elif kind == "<video>":
            visuals.append(EncodedVideo(tuple(some_image(random) for _ in range(int(random.integers(1, 6))))))
    return " ".join(words), visuals


def processor_of(vision: VisionConfig, tokenizer: TextTokenizer) -> HaploProcessor:
    mode = vision.image_aspect_ratio
    return HaploProcessor(
        HaploImageProcessor(
            size={"height": vision.image_size, "width": vision.image_size},
            patch_size=vision.patch_size,
            image_aspect_ratio=f"anyres_max_{vision.max_tiles}" if mode == "anyres" else mode,
            image_newline=vision.image_newline,
            image_token_budget=vision.image_token_budget,
        ),
        tokenizer.hf,
    )


def visual_source(document: Document) -> np.ndarray:
    source = np.full(len(document.tokens), TEXT)
    source[document.patch_target] = document.patch_source
    source[document.newline_target] = NEWLINE
    return source


@pytest.mark.parametrize("seed", range(VISIONS))
def test_ids_mask_sources_and_pixels(tokenizer: TextTokenizer, seed: int) -> None:
    random = np.random.default_rng(seed)
    vision = some_vision(random)
    processor = processor_of(vision, tokenizer)
    for _ in range(SAMPLES):
        text, visuals = some_conversation(random)
        ids = np.array(tokenizer.hf(text, add_special_tokens=False)["input_ids"], np.int32)
        is_visual = np.isin(ids, tokenizer.placeholder_ids)
        document = lay_out_document([Sample(ids, np.ones(len(ids), np.uint8), is_visual, tuple(visuals))], vision)
        given = processor(
            text=text,
            images=[opened(visual) for visual in visuals if isinstance(visual, EncodedImage)] or None,
            videos=[list(map(opened, visual.frames)) for visual in visuals if isinstance(visual, EncodedVideo)] or None,
        )
        found = given["input_ids"][0].numpy()
        assert len(found) == len(document.tokens)
        assert np.array_equal(found[document.is_text], document.tokens[document.is_text])
        shapes = [Frames(len(v.frames)) if isinstance(v, EncodedVideo) else Picture(v.height, v.width) for v in visuals]
        blocks, tiles = blocks_of_sample(shapes, vision)
        assert len(found) == len(ids) - len(visuals) + sum(map(len, blocks))
        marks = [
            ids[is_visual][i]
            for i, layout in enumerate(visual_layouts(shapes, vision))
            for _ in range(layout.num_tokens)
        ]
        assert found[~document.is_text].tolist() == marks
        if not visuals:
            assert "pixel_values" not in given
            continue
        assert np.array_equal(given["visual_source"][0].numpy(), visual_source(document))
        assert torch.equal(given["pixel_values"], torch.from_numpy(normalise(np.concatenate(document.tiles))))
        assert len(given["pixel_values"]) == tiles
        starts, positions = given["attention_start_ids"][0].numpy(), np.arange(len(found))
        # Key j is visible to query i: by the processor where its block has begun, in training where i's has not ended.
        assert np.array_equal(starts[None, :] <= positions[:, None], positions[None, :] < document.kv_end[:, None])
