"""Headers of a prefix's files: whatever is in them, opening and reading end in nothing but a ValueError."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_haplovl.data.manifest import Manifest, load_manifest
from megatron_haplovl.data.sources import IndexedSource
from tests.fixtures.small_prefix import SAMPLES, write_small_prefix
from tests.fixtures.tiny_haplo import tiny_model

VISION = tiny_model().vision
LENGTHS = 34
"""Where the lengths begin in an index: magic, version, number type, sequences, boundaries."""
POINTERS = LENGTHS + 4 * len(SAMPLES)
HUGE = (1 << 62, (1 << 63) - 1)


def put(path: Path, place: int, form: str, *values: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, place, *values)
    path.write_bytes(content)


def read_everything(prefix: str) -> None:
    """All that a training run reads."""
    source = IndexedSource(prefix)
    source.counts(VISION)
    source.hashes()
    for sample in range(source.num_samples):
        source.read(sample)


@pytest.mark.parametrize(
    ("place", "form", "value", "message"),
    [
        (9, "<Q", 7, "has version 7 and number type 4"),
        (17, "<B", 0, "has version 1 and number type 0"),
        (17, "<B", 9, "has version 1 and number type 9"),
        (17, "<B", 7, "is damaged: it says that the numbers are float32, not int32"),
        (17, "<B", 5, "is damaged: it says that the numbers are int64, not int32"),
        (18, "<Q", 5, "is truncated: it has 122 bytes, 5 sequences need 134"),
        (18, "<Q", 3, "is damaged: it has 122 bytes, 3 sequences and 5 boundaries need 110"),
        (18, "<Q", (1 << 64) - 1, "is truncated: it has 122 bytes, 18446744073709551615 sequences need"),
        (26, "<Q", 6, "is truncated: it has 122 bytes, 4 sequences need 130"),
        (26, "<Q", (1 << 64) - 1, "is truncated"),
        (LENGTHS, "<i", -1, r"is damaged: sequence 0 ends at byte -4, the next one begins at 24"),
        (LENGTHS, "<i", (1 << 31) - 1, r"is damaged: sequence 0 ends at byte 8589934588, the next one begins at 24"),
        (LENGTHS + 12, "<i", -9, "small.idx is damaged: sequence 3 would be the bytes 68 to 32"),
        (LENGTHS + 12, "<i", 10, r"small.bin is truncated: it has 104 bytes, its index needs 108"),
        (POINTERS, "<q", -8, "is damaged: sequence 0 ends at byte 16, the next one begins at 24"),
        (POINTERS + 8, "<q", 20, "is damaged: sequence 0 ends at byte 24, the next one begins at 20"),
        (POINTERS + 8, "<q", HUGE[0], "is damaged: sequence 0 ends at byte 24, the next one begins at 46116860"),
        (POINTERS + 24, "<q", HUGE[1], r"small.bin is truncated: it has 104 bytes, its index needs 92233720"),
    ],
)
def test_an_index(tmp_path: Path, place: int, form: str, value: int, message: str) -> None:
    prefix = write_small_prefix(tmp_path)
    put(Path(f"{prefix}.idx"), place, form, value)
    with pytest.raises(ValueError, match=message):
        read_in_order(IndexedDataset(prefix, np.int32))
    with pytest.raises(ValueError, match="small"):
        read_everything(prefix)


def read_in_order(dataset: IndexedDataset) -> None:
    for index in range(len(dataset)):
        dataset.in_order(index)


def test_sequences_that_overlap(tmp_path: Path) -> None:
    """Every one of them is inside the file."""
    with IndexedDatasetWriter(tmp_path / "x", np.int32) as writer:
        for length in (4, 4, 4):
            writer.add(range(length))
    put(tmp_path / "x.idx", LENGTHS + 4 * 3 + 8, "<q", 8)
    dataset = IndexedDataset(tmp_path / "x")
    for index in range(3):
        with pytest.raises(ValueError, match=r"x\.idx is damaged: sequence [01] ends at byte"):
            dataset.in_order(index)
    with pytest.raises(ValueError, match="do not follow each other in order"):
        dataset.read_all()


def changed(manifest: Manifest, **changes: Any) -> dict[str, Any]:
    """A manifest that states what it is told to, with a content hash that fits it."""
    fields = json.loads(manifest.to_json()) | changes
    del fields["content_hash"]
    return fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": None}, "is not a manifest"),
        ({"counts": {"samples": 4}}, "is not a manifest"),
        ({"counts": []}, "is not a manifest"),
        ({"files": {".bin": {"bytes": 1}}}, "is not a manifest"),
        ({"files": [1]}, "is not a manifest"),
        ({"files": {}}, r"does not list small\.bin"),
        ({"format_version": 3}, "has format version 3, this program reads versions 1 to 2"),
        ({"format_version": "2"}, "is not a manifest: format_version is '2' and no whole number"),
        ({"format_version": 2.0}, "is not a manifest: format_version is 2.0 and no whole number"),
        ({"image_token_id": "90"}, "is not a manifest: image_token_id is '90' and no whole number"),
        ({"image_token_id": True}, "is not a manifest: image_token_id is True and no whole number"),
        ({"chat_template": 3}, "is not a manifest: chat_template is 3 and no text"),
        ({"tokenizer_fingerprint": None}, "is not a manifest: tokenizer_fingerprint is None and no text"),
        ({"skipped": 3}, "is not a manifest: skipped is 3 and no object"),
        ({"unknown": 3}, "is not a manifest"),
        ({"num_frames": "8"}, "is not a manifest: num_frames is '8' and no whole number"),
    ],
)
def test_a_manifest(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    prefix = write_small_prefix(tmp_path)
    fields = changed(load_manifest(prefix), **changes)
    Path(prefix + names.MANIFEST_SUFFIX).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"small\.manifest\.json {message}"):
        read_everything(prefix)


@pytest.mark.parametrize("name", ["samples", "images", "largest_token_id", "longest_sample"])
@pytest.mark.parametrize("value", [-1, "4", 4.5, None, True, 1 << 70])
def test_counts_of_a_manifest(tmp_path: Path, name: str, value: Any) -> None:
    prefix = write_small_prefix(tmp_path)
    manifest = load_manifest(prefix)
    counts = dataclasses.asdict(manifest.counts) | {name: value}
    Path(prefix + names.MANIFEST_SUFFIX).write_text(json.dumps(changed(manifest, counts=counts)))
    with pytest.raises(ValueError, match=rf"small\.manifest\.json is not a manifest: counts\.{name} is"):
        read_everything(prefix)


def test_a_single_sample_without_images_was_once_counted_as_true(tmp_path: Path) -> None:
    manifest = load_manifest(write_small_prefix(tmp_path))
    for name, fits in (("text_only_samples", True), ("tokens", False)):
        counts = dataclasses.replace(manifest.counts, **{name: True})
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="no whole number"):
            names.check_kinds(dataclasses.replace(manifest, counts=counts))


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 100_000, '{"format_version": 1e999}', "\udcff"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "small.manifest.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"small\.manifest\.json is not a manifest"):
        load_manifest(str(tmp_path / "small"))


def test_number_of_samples_is_that_of_the_files(tmp_path: Path) -> None:
    prefix = write_small_prefix(tmp_path)
    manifest = load_manifest(prefix)
    counts = dataclasses.asdict(manifest.counts) | {"samples": 5}
    Path(prefix + names.MANIFEST_SUFFIX).write_text(json.dumps(changed(manifest, counts=counts)))
    with pytest.raises(ValueError, match=r"small: the manifest says 5 samples, its files have 4"):
        read_everything(prefix)


def test_random_bytes_in_headers(tmp_path: Path) -> None:
    """Numbers that programs trip over, at random places of every header; the sizes stay."""
    choose = random.Random(0)
    prefix = write_small_prefix(tmp_path)
    for number in range(300):
        path = Path(prefix + names.DATA_SUFFIXES[number % len(names.DATA_SUFFIXES)])
        before = path.read_bytes()
        form = choose.choice(["<i", "<q", "<h"])
        bits = 8 * struct.calcsize(form) - 1
        place = choose.randrange(min(len(before), 130) - 8)
        value = choose.choice([0, -1, 1, (1 << bits) - 1, -(1 << bits), 1 << (bits - 1), choose.getrandbits(bits)])
        put(path, place, form, value)
        try:
            read_everything(prefix)
        except ValueError as error:
            assert "small" in str(error), (path.name, place, value, error)
        path.write_bytes(before)
    read_everything(prefix)
