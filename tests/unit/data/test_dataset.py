"""Batches against a reference that places one token after the other and builds the dense mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.data.dataset import Document, collate, lay_out_document
from megatron_haplovl.data.image_geometry import image_layout
from megatron_haplovl.data.image_processing import CLIP_MEAN, CLIP_STD, cut_tiles, decode_image, normalise
from megatron_haplovl.data.mock_source import MockSource
from megatron_haplovl.data.sources import EncodedImage, EncodedVideo, Sample
from tests.fixtures.pictures import in_mode, saved

VISIONS = [
    VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="pad", image_newline=False),
    VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="resize", image_newline=True),
    VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="anyres", max_tiles=4, image_newline=True),
]
SEQ_LENGTH = 150


def packs_of(source: MockSource) -> list[list[list[Sample]]]:
    """Three sequences: several documents (one joined of two samples), one document with a video and an image, none."""
    read = source.read
    return [[[read(0)], [read(1), read(3)], [read(2)]], [[with_video(source)]], []]


def with_video(source: MockSource) -> Sample:
    """Text, a video of two frames, an image, text that is trained."""
    first, second, third = (read.visuals[0] for read in map(source.read, (1, 2, 4)))
    assert isinstance(first, EncodedImage) and isinstance(second, EncodedImage)
    return Sample(
        np.array([5, 99, 98, 6, 7], np.int32),
        np.array([0, 0, 0, 1, 1], np.uint8),
        np.array([False, True, True, False, False]),
        (EncodedVideo((first, second)), third),
    )


def blocks_of(visual: EncodedImage | EncodedVideo, alone: bool, vision: VisionConfig) -> list[tuple[Any, VisionConfig]]:
    """The images whose tokens see each other, and how each is seen: alone, one of several, or a frame."""
    if isinstance(visual, EncodedVideo):
        stretched = dataclasses.replace(vision, image_aspect_ratio="resize", image_newline=False)
        return [(frame, stretched) for frame in visual.frames]
    return [(visual, vision if alone else dataclasses.replace(vision, max_tiles=1))]


def make_batch(vision: VisionConfig) -> tuple[list[list[list[Sample]]], Batch]:
    packs = packs_of(MockSource(100, vision, 40, seed=3))
    return packs, collate([[lay_out_document(d, vision) for d in pack] for pack in packs], SEQ_LENGTH, vision)


@pytest.mark.parametrize("vision", VISIONS, ids=lambda v: v.image_aspect_ratio)
def test_against_a_token_by_token_reference(vision: VisionConfig) -> None:
    packs, batch = make_batch(vision)
    allowed = torch.zeros(len(packs), SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool)
    patches: list[tuple[int, int]] = []
    newlines: list[int] = []
    tiles: list[npt.NDArray[np.uint8]] = []
    for row, pack in enumerate(packs):
        # One entry per position: (document, image or None, token or None, trained)
        places: list[tuple[int, int | None, int | None, bool]] = []
        image_number = 0
        positions: list[int] = []
        for number, document in enumerate(pack):
            start = len(places)
            for sample in document:
                visuals = iter(sample.visuals)
                for i, token in enumerate(sample.token_ids.tolist()):
                    if not sample.is_visual[i]:
                        places.append((number, None, token, bool(sample.loss_mask[i]) and i > 0))
                        continue
                    visual = next(visuals)
                    for image, seen in blocks_of(visual, len(sample.visuals) == 1, vision):
                        layout = image_layout(image.height, image.width, seen)
                        first = len(places)
                        sources = layout.patch_source().tolist()
                        base = sum(t.shape[0] for t in tiles) * vision.cells_per_tile
                        for r in range(layout.rows):
                            for c in range(layout.cols):
                                patches.append((base + sources[r * layout.cols + c], row * SEQ_LENGTH + len(places)))
                                places.append((number, image_number, None, False))
                            if seen.image_newline:
                                newlines.append(row * SEQ_LENGTH + len(places))
                                places.append((number, image_number, None, False))
                        assert len(places) - first == layout.num_tokens
                        tiles.append(cut_tiles(decode_image(image.data), seen))
                        image_number += 1
                    if isinstance(visual, EncodedVideo) and vision.image_newline:
                        newlines.append(row * SEQ_LENGTH + len(places))
                        places.append((number, None, None, False))
            positions += range(len(places) - start)
        for i, (own_document, own_image, _, _) in enumerate(places):
            for j, (other_document, other_image, _, _) in enumerate(places):
                same_image = own_image is not None and own_image == other_image
                allowed[row, i, j] = own_document == other_document and (j <= i or same_image)
        for i in range(len(places), SEQ_LENGTH):
            allowed[row, i, i] = True

        length, rest = len(places), SEQ_LENGTH - len(places)
        assert batch.tokens_BS[row].tolist() == [t or 0 for _, _, t, _ in places] + [0] * rest
        assert batch.text_mask_BS[row].tolist() == [t is not None for _, _, t, _ in places] + [False] * rest
        assert batch.position_ids_BS[row].tolist() == positions + [0] * rest
        labels = [IGNORE_INDEX] * SEQ_LENGTH
        for i in range(length - 1):
            if places[i + 1][3] and places[i][0] == places[i + 1][0]:
                labels[i] = places[i + 1][2] or 0
        assert batch.labels_BS[row].tolist() == labels

    keys = torch.arange(SEQ_LENGTH)
    from_vectors = (batch.kv_start_BS[..., None] <= keys) & (keys < batch.kv_end_BS[..., None])
    assert torch.equal(from_vectors, allowed)
    assert batch.kv_start_BS.dtype == batch.kv_end_BS.dtype == torch.int32
    assert list(zip(batch.patch_source_P.tolist(), batch.patch_target_P.tolist(), strict=True)) == patches
    assert batch.newline_target_N.tolist() == newlines
    assert torch.equal(batch.tiles_TCHW, torch.from_numpy(np.concatenate(tiles)))


@pytest.mark.parametrize("vision", VISIONS, ids=lambda v: v.image_aspect_ratio)
def test_packed_documents_equal_documents_alone(vision: VisionConfig) -> None:
    packs, packed = make_batch(vision)
    start = 0
    patches_before, tiles_before, newlines_before = 0, 0, 0
    for samples in packs[0]:
        document = lay_out_document(samples, vision)
        alone = collate([[document]], SEQ_LENGTH, vision)
        n = len(document.tokens)
        for name in ("tokens_BS", "labels_BS", "text_mask_BS", "position_ids_BS"):
            assert torch.equal(getattr(packed, name)[0, start : start + n], getattr(alone, name)[0, :n]), name
        for name in ("kv_start_BS", "kv_end_BS"):
            assert torch.equal(getattr(packed, name)[0, start : start + n] - start, getattr(alone, name)[0, :n]), name
        p, t, m = len(alone.patch_source_P), len(alone.tiles_TCHW), len(alone.newline_target_N)
        here = slice(patches_before, patches_before + p)
        cells = vision.cells_per_tile
        assert torch.equal(packed.patch_source_P[here] - tiles_before * cells, alone.patch_source_P)
        assert torch.equal(packed.patch_target_P[here] - start, alone.patch_target_P)
        assert torch.equal(
            packed.newline_target_N[newlines_before : newlines_before + m] - start, alone.newline_target_N
        )
        assert torch.equal(packed.tiles_TCHW[tiles_before : tiles_before + t], alone.tiles_TCHW)
        start, patches_before, tiles_before, newlines_before = (
            start + n,
            patches_before + p,
            tiles_before + t,
            newlines_before + m,
        )


@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
def test_visible_pairs_are_those_that_the_model_lets_attend(image_attention: str) -> None:
    vision = VISIONS[0]
    packs = packs_of(MockSource(100, vision, 40, seed=3))
    documents = [[lay_out_document(d, vision) for d in pack] for pack in packs]
    batch = collate(documents, SEQ_LENGTH, vision, image_attention)
    query, key = torch.arange(SEQ_LENGTH)[:, None], torch.arange(SEQ_LENGTH)
    end = batch.kv_end_BS if image_attention == "bidirectional" else (query.T + 1).expand_as(batch.kv_end_BS)
    seen = (key >= batch.kv_start_BS[..., None]) & (key < end[..., None])
    assert batch.visible_pairs == int(seen.sum())
    causal = sum(n * (n + 1) // 2 for pack in documents for n in (len(d.tokens) for d in pack))
    padding = len(packs) * SEQ_LENGTH - sum(len(d.tokens) for pack in documents for d in pack)
    assert (batch.visible_pairs == causal + padding) == (image_attention == "causal")


def test_text_only_batch_has_no_tiles() -> None:
    vision = VISIONS[0]
    sample = Sample(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.uint8), np.zeros(3, bool), ())
    batch = collate([[lay_out_document([sample], vision)]], 4, vision)
    assert batch.tiles_TCHW.shape == (0, 3, 16, 16)
    assert batch.patch_source_P.shape == batch.newline_target_N.shape == (0,)
    assert batch.labels_BS.tolist() == [[IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX]]


def test_first_answer_token_behind_an_image_is_predicted_by_its_last_patch() -> None:
    vision = VISIONS[0]
    image = MockSource(100, vision, 40, seed=0).read(1).visuals[0]
    sample = Sample(
        np.array([1, 999, 8], np.int32), np.array([1, 0, 1], np.uint8), np.array([False, True, False]), (image,)
    )
    document = lay_out_document([sample], vision)
    assert document.labels.tolist() == [IGNORE_INDEX] * 4 + [8, IGNORE_INDEX]
    assert document.kv_end.tolist() == [1, 5, 5, 5, 5, 6]


def test_nothing_is_predicted_across_joined_samples() -> None:
    first = Sample(np.array([1, 2, 3], np.int32), np.array([0, 0, 1], np.uint8), np.zeros(3, bool), ())
    # A mask made elsewhere may train the first token; in a joined document it would get a predecessor.
    second = Sample(np.array([4, 5], np.int32), np.array([1, 1], np.uint8), np.zeros(2, bool), ())
    document = lay_out_document([first, second], VISIONS[0])
    assert document.labels.tolist() == [IGNORE_INDEX, 3, IGNORE_INDEX, 5, IGNORE_INDEX]


def test_image_of_another_size_than_recorded() -> None:
    vision = VISIONS[0]
    image = MockSource(100, vision, 40, seed=0).read(1).visuals[0]
    assert isinstance(image, EncodedImage)
    smaller = EncodedImage(image.data, image.height, image.width + 1)
    sample = Sample(np.array([9], np.int32), np.zeros(1, np.uint8), np.ones(1, bool), (smaller,))
    with pytest.raises(ValueError, match="were recorded; preprocess again"):
        lay_out_document([sample], vision)


def test_mock_counts_are_those_of_its_samples() -> None:
    for vision in VISIONS:
        source = MockSource(100, vision, 60, seed=3, num_samples=40)
        counts = source.counts(vision)
        kinds = []
        for i in range(40):
            document: Document = lay_out_document([source.read(i)], vision)
            assert len(document.tokens) <= 60
            kinds.append(tuple(type(visual).__name__ for visual in source.read(i).visuals))
            assert counts.tokens[i] == len(document.tokens)
            assert counts.text_tokens[i] == document.is_text.sum()
            assert counts.patch_tokens[i] == len(document.patch_source)
            assert counts.tiles[i] == sum(map(len, document.tiles))
            assert counts.lm_tokens[i] == (document.labels != IGNORE_INDEX).sum()
        image, video = "EncodedImage", "EncodedVideo"
        assert set(kinds) == {(), (image,), (image, image), (video,), (image, video)}
    # Four patches and four words: no second image, and no second frame.
    short = MockSource(100, VISIONS[0], 8, seed=3, num_samples=5)
    assert short.counts(VISIONS[0]).tiles.tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="--mock-data needs --seq-length of at least 8"):
        MockSource(100, VISIONS[0], 7, seed=0)


def test_normalising_in_the_batch_is_the_formula_bit_for_bit() -> None:
    vision = VISIONS[0]
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    _, batch = make_batch(vision)
    pixels = dataclasses.replace(batch, tiles_TCHW=torch.from_numpy(levels)).pixels_TCHW()
    mean, std = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    expected = (levels.astype(np.float32) * np.float32(1 / 255) - mean) / std
    assert pixels.dtype == torch.float32 and np.array_equal(pixels.numpy(), expected)
    assert np.array_equal(normalise(levels), expected)
    assert batch.tiles_TCHW.dtype == torch.uint8 and batch.to("cpu").tiles_TCHW.dtype == torch.uint8


def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning needs a GPU, so it is only seen who is asked for it."""
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    _, batch = make_batch(VISIONS[0])
    copy = batch.pin_memory()
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(pinned) == len(tensors) > 5 and all(a is b for a, b in zip(pinned, tensors, strict=True))
    assert copy.visible_pairs == batch.visible_pairs and copy.tiles_TCHW is not batch.tiles_TCHW
    assert torch.equal(copy.tiles_TCHW, batch.tiles_TCHW)


def test_pictures_are_upright_unless_they_were_recorded_as_stored() -> None:
    """Prefixes of format 1 recorded the stored size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(in_mode("RGB"), "PNG", exif=exif)
    vision = dataclasses.replace(VISIONS[0], image_aspect_ratio="resize")

    def tiles(height: int, width: int, *, upright: bool) -> npt.NDArray[np.uint8]:
        image = EncodedImage(data, height, width, upright=upright)
        ids, mask = np.array([5, 6], np.int32), np.ones(2, np.uint8)
        return lay_out_document([Sample(ids, mask, np.array([False, True]), (image,))], vision).tiles[0]

    stored = cut_tiles(in_mode("RGB"), vision)
    assert np.array_equal(tiles(10, 14, upright=False), stored)
    turned = cut_tiles(in_mode("RGB").transpose(Image.Transpose.ROTATE_270), vision)
    assert np.array_equal(tiles(14, 10, upright=True), turned) and not np.array_equal(turned, stored)
    with pytest.raises(ValueError, match="has 14 x 10 pixels where 10 x 14 were recorded; preprocess again"):
        tiles(10, 14, upright=True)
