"""Verification finds every changed bit, and names what it changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_haplovl.commands import verify
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.manifest import read_manifest
from megatron_haplovl.data.pack_dataset import PackDataset
from megatron_haplovl.data.plan.epoch import BlendedSource, PlanSettings, build_epoch
from megatron_haplovl.data.plan.packs import PackPlan
from megatron_haplovl.data.sources import IndexedSource
from megatron_haplovl.data.verification import verify_prefix
from tests.fixtures.small_prefix import SAMPLES, write_small_prefix
from tests.fixtures.tiny_haplo import tiny_model

_MODEL = tiny_model()
_FILES = (names.MANIFEST_SUFFIX, *names.DATA_SUFFIXES)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_small_prefix(tmp_path)


def problems(prefix: str) -> dict[str, tuple[str, ...]]:
    """What is wrong, by file."""
    return {finding.name: finding.problems for finding in verify_prefix(prefix) if finding.problems}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def read_everything(prefix: str) -> None:
    """All that a training run reads."""
    source = IndexedSource(prefix)
    blended = BlendedSource(source.name, 1.0, source.counts(_MODEL.vision))
    settings = PlanSettings(seed=0, seq_length=64, packing=False, shuffle=False, skip_long_samples=False)
    dataset = PackDataset(PackPlan([build_epoch([blended], [], settings, 0)]), [source], 64, _MODEL, empty_length=64)
    for sample in range(len(SAMPLES)):
        dataset[[sample]]


@pytest.mark.parametrize("version", [1, 2])
def test_good_files(tmp_path: Path, version: int, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_small_prefix(tmp_path)
    if version == 1:
        _as_format_1(prefix)
    read_everything(prefix)
    assert problems(prefix) == {}
    assert verify.main([prefix, prefix]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + len(read_manifest(prefix).suffixes) + 2)
    assert sum(line.endswith("  good") for line in lines) == len(lines) - 2


def _as_format_1(prefix: str) -> None:
    """What an older version would have written of the same data: fewer files, fewer fields, the images' own hash."""
    manifest = read_manifest(prefix)
    for suffix in names.ADDED_IN_2:
        Path(prefix + suffix).unlink()
    fields = dataclasses.asdict(manifest)
    fields = {name: value for name, value in fields.items() if name not in ("repairs", "unread_keys", "num_frames")}
    fields |= {"format_version": 1, "files": {s: e for s, e in fields["files"].items() if s not in names.ADDED_IN_2}}
    fields["files"]["_images.bin"]["sha256"] = hashlib.sha256(Path(prefix + "_images.bin").read_bytes()).hexdigest()
    Path(prefix + names.MANIFEST_SUFFIX).write_text(json.dumps(fields, indent=2) + "\n")


def test_every_flipped_bit_is_found(prefix: str) -> None:
    """Two hundred, in every file; training ends in nothing but a ValueError that names a file."""
    choose = random.Random(0)
    for number in range(200):
        path = Path(prefix + _FILES[number % len(_FILES)])
        before = path.read_bytes()
        flip(path, bit := choose.randrange(8 * len(before)))
        assert verify.main([prefix]) == 1, (path.name, bit)
        try:
            read_everything(prefix)
        except ValueError as error:
            assert "small" in str(error), (path.name, bit, error)
        path.write_bytes(before)
    assert problems(prefix) == {}


def test_a_changed_image_is_named(prefix: str) -> None:
    index = json.loads(Path(prefix + names.MANIFEST_SUFFIX).read_text())["files"]["_images.bin"]["bytes"]
    flip(Path(prefix + "_images.bin"), 8 * (index - 20))
    found = problems(prefix)
    assert list(found) == ["small_images.bin"]
    assert "image 3 is not what was written" in found["small_images.bin"][0]


def test_a_changed_token_names_its_sample(prefix: str) -> None:
    flip(Path(prefix + ".bin"), 32 * 14)  # 6 and 4 tokens stand before sample 2
    found = problems(prefix)
    assert list(found) == ["small.bin", "contents"]
    assert found["contents"] == ("sample 2: its hash is not that of its tokens and images",)


@pytest.mark.parametrize(
    ("bit", "message"),
    [
        (32 * 11 + 30, r"small\.bin is damaged: sample 2 has the token id 1073741"),
        (32 * 3 + 31, r"small\.bin is damaged: sample 0 has the token id -"),
        (32 * 24 + 5, r"small\.bin is damaged: sample 3 has the token id 56, the manifest's ids are 0 to 24"),
        (32 * 1, r"small: sample 0 has 1 image and video marks that do not fit its 1 images and videos"),
    ],
)
def test_training_refuses_a_token_that_is_none(prefix: str, bit: int, message: str) -> None:
    flip(Path(prefix + ".bin"), bit)
    with pytest.raises(ValueError, match=message):
        read_everything(prefix)


@pytest.mark.parametrize(
    ("suffix", "at", "value", "message"),
    [
        ("_loss_mask.bin", 8, 3, r"small_loss_mask\.bin is damaged: sample 1 has the value 3"),
        ("_image_refs.bin", 0, 4, r"small: a sample refers to image 4, but there are 4"),
        ("_image_refs.bin", 4, -9, r"small: a sample refers to a video with more frames than follow"),
        ("_image_refs.bin", 8, -1, r"small: a sample refers to a video with more frames than follow"),
    ],
)
def test_training_refuses_other_nonsense(prefix: str, suffix: str, at: int, value: int, message: str) -> None:
    path = Path(prefix + suffix)
    values = np.fromfile(path, dtype=np.uint8 if "mask" in suffix else np.int32)
    values[at if "mask" in suffix else at // 4] = value
    values.tofile(path)
    with pytest.raises(ValueError, match=message):
        read_everything(prefix)
    assert verify.main([prefix]) == 1


@pytest.mark.parametrize("suffix", [".idx", "_loss_mask.idx", "_image_refs.idx", "_images.idx"])
def test_training_refuses_a_sample_that_begins_elsewhere(prefix: str, suffix: str) -> None:
    """The offset of the second sequence: the files would be read, as other samples than those that were written."""
    path = Path(prefix + suffix)
    count = 4
    flip(path, 8 * (9 + 25 + 4 * count + 8) + 2)
    with pytest.raises(ValueError, match="small"):
        read_everything(prefix)


def test_what_a_sample_says_of_itself(prefix: str) -> None:
    """Files with right checksums that do not fit each other."""
    path = Path(prefix + "_sample_lm_tokens.npy")
    values = np.load(path)
    values[1] += 1
    np.save(path, values)
    assert "sample 1: 2 trained tokens, not 3" in problems(prefix)["contents"]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(names.Counts)])
def test_counts_are_counted_again(prefix: str, field: str) -> None:
    """A manifest with a right hash that states another count."""
    manifest = read_manifest(prefix)
    counts = dataclasses.replace(manifest.counts, **{field: getattr(manifest.counts, field) + 1})
    dataclasses.replace(manifest, counts=counts).write(Path(prefix + names.MANIFEST_SUFFIX))
    found = problems(prefix)["contents"]
    assert len(found) == 1 and found[0].startswith(f"the manifest says counts.{field} {getattr(counts, field)}, the ")


@pytest.mark.parametrize("suffix", names.DATA_SUFFIXES)
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_missing_and_truncated_files(prefix: str, suffix: str, how: str) -> None:
    path = Path(prefix + suffix)
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-1])
    assert path.name in problems(prefix)


def test_no_manifest(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(prefix + names.MANIFEST_SUFFIX).unlink()
    assert verify.main([prefix]) == 1
    assert "is not the prefix of preprocessed data" in capsys.readouterr().out
