"""The tool from end to end: what it writes, what it refuses, and that workers change nothing."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_haplovl.commands.preprocess import preprocess
from megatron_haplovl.commands.preprocess_arguments import build_parser
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.manifest import DATA_SUFFIXES, MANIFEST_SUFFIX, REPORT_SUFFIX, read_manifest
from megatron_haplovl.data.preprocessing.video import FrameSettings, encoded_frames
from megatron_haplovl.data.sources import EncodedImage, EncodedVideo, IndexedSource
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.conftest import LlavaDataset, train_sentencepiece, write_image
from tests.unit.data.preprocessing.test_video import make_video


def run(dataset: LlavaDataset, tokenizer: Path, prefix: Path, *flags: str) -> int:
    words = [f"--input={dataset.json}", f"--image-folder={dataset.image_folder}", f"--output-prefix={prefix}"]
    words += [f"--tokenizer-model={tokenizer}", "--chat-template=vicuna_v1", "--workers=1", *flags]
    return preprocess(build_parser().parse_args(words))


def files_of(prefix: Path) -> dict[str, bytes]:
    paths = prefix.parent.iterdir()
    return {path.name.removeprefix(prefix.name): b"" if path.is_dir() else path.read_bytes() for path in paths}


def report_of(prefix: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{prefix}{REPORT_SUFFIX}").read_text().splitlines()]


def test_what_is_written_is_what_was_given(
    tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out" / "train"
    assert run(tiny_llava_dataset, tiny_spm_model, prefix) == 0
    assert set(files_of(prefix)) == {*DATA_SUFFIXES, MANIFEST_SUFFIX, REPORT_SUFFIX}
    manifest = read_manifest(str(prefix))
    assert (manifest.counts.samples, manifest.counts.images, manifest.counts.text_only_samples) == (24, 5, 6)
    assert manifest.counts.image_references == 24
    source = IndexedSource(str(prefix))
    tokenizer = load_tokenizer(tiny_spm_model)
    for i, record in enumerate(tiny_llava_dataset.records):
        sample = source.read(i)
        images = record.get("image", [])
        images = [images] if isinstance(images, str) else images
        assert [image.data for image in sample.visuals if isinstance(image, EncodedImage)] == [
            (tiny_llava_dataset.image_folder / image).read_bytes() for image in images
        ]
        text = tokenizer.hf.decode(sample.token_ids[~sample.is_visual].tolist(), skip_special_tokens=True)
        trained = str(tokenizer.hf.decode(sample.token_ids[sample.loss_mask == 1].tolist(), skip_special_tokens=True))
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        assert trained.split() == " ".join(answers).split()
        assert all(turn["value"].removeprefix("<image>\n").split()[-1] in text for turn in record["conversations"])
    counts = source.counts(VisionConfig(patch_size=8, image_size=16, image_aspect_ratio="pad"))
    assert counts.lm_tokens.sum() == manifest.counts.loss_tokens
    assert counts.text_tokens.sum() == manifest.counts.tokens - manifest.counts.image_references
    assert counts.patch_tokens.tolist() == [4 * len(source.read(i).visuals) for i in range(24)]
    summary = capsys.readouterr().out
    assert "24 samples" in summary and "5 distinct" in summary


def test_workers_change_nothing(tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path) -> None:
    many = tiny_llava_dataset.records * 8
    many[50] = {"id": "bad", "conversations": []}
    tiny_llava_dataset.json.write_text(json.dumps(many))
    one, three = tmp_path / "one" / "x", tmp_path / "three" / "x"
    assert run(tiny_llava_dataset, tiny_spm_model, one, "--skip-bad-records") == 0
    assert run(tiny_llava_dataset, tiny_spm_model, three, "--skip-bad-records", "--workers=3") == 0
    assert files_of(one) == files_of(three)
    assert report_of(one)[0]["location"] == "index 50"


def png_header(height: int, width: int) -> bytes:
    """A PNG that claims to be large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_lines(dataset: LlavaDataset) -> list[tuple[str, str]]:
    """JSONL lines that cannot be used, each with its reason."""
    folder = dataset.image_folder
    good = (folder / "a" / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_bytes(b"no image")
    (folder / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (folder / "large.png").write_bytes(png_header(9_000, 9_000))
    (folder.parent / "outside.png").write_bytes(good)
    os.symlink(folder.parent / "outside.png", folder / "link.png")
    question, answer = {"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "This."}

    def line(image: Any = None, turns: Any = (question, answer), **more: Any) -> str:
        return json.dumps({"id": "x", "image": image, "conversations": turns, **more})

    return [
        (line("absent.png"), "missing_image"),
        (line("text.png"), "undecodable_image"),
        (line("cut.png"), "truncated_image"),
        (line("bomb.png"), "decompression_bomb"),
        (line("large.png"), "decompression_bomb"),
        (line("a/0.png", []), "no_conversations"),
        (line(["a/0.png", "a/1.png"]), "image_mark_count_mismatch"),
        (line(None), "image_mark_count_mismatch"),
        (line("a/0.png", [question, {"from": "gpt", "value": ""}]), "empty_answer"),
        (line("../outside.png"), "path_escapes_image_folder"),
        (line(str(folder / "a" / "0.png")), "path_escapes_image_folder"),
        (line("link.png"), "path_escapes_image_folder"),
        (line(None, [{"from": "human", "value": "<video>"}, answer]), "image_mark_count_mismatch"),
        (line("a/0.png", [question, {"from": "gpt", "value": "a </s> b"}]), "reserved_token_in_text"),
        (line("a/0.png", [question, {"from": "gpt", "value": "It is. " * 100}]), "too_long"),
        ('{"id": "x", ', "unparsable_line"),
    ]


def test_every_bad_record_gets_its_line(
    tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = bad_lines(tiny_llava_dataset)
    lines = [json.dumps(tiny_llava_dataset.records[1])]
    for text, _ in bad:
        lines += [text, json.dumps(tiny_llava_dataset.records[2])]
    path = tiny_llava_dataset.json.with_suffix(".jsonl")
    path.write_text("\n".join(lines))
    dataset = LlavaDataset(path, tiny_llava_dataset.image_folder, [])
    prefix = tmp_path / "out" / "train"
    flags = ("--max-image-pixels=50000000", "--model=haplovl-debug", "--seq-length=300", "--vocab-size=430")
    assert run(dataset, tiny_spm_model, prefix, *flags) == 1
    assert set(files_of(prefix)) == {REPORT_SUFFIX, ".parts"}
    assert "Nothing was written" in capsys.readouterr().err

    assert run(dataset, tiny_spm_model, prefix, *flags, "--skip-bad-records") == 0
    report = report_of(prefix)
    assert [(r["location"], r["reason"]) for r in report] == [
        (f"line {2 * i + 2}", reason) for i, (_, reason) in enumerate(bad)
    ]
    assert all(r["detail"] for r in report)
    assert [r["id"] for r in report] == ["x"] * (len(bad) - 1) + [None]
    manifest = read_manifest(str(prefix))
    assert manifest.counts.samples == len(bad) + 1
    assert manifest.skipped["path_escapes_image_folder"] == 3 and sum(manifest.skipped.values()) == len(bad)
    assert "too_long: 1" in capsys.readouterr().err


def test_token_id_outside_the_vocabulary(
    tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path
) -> None:
    assert run(tiny_llava_dataset, tiny_spm_model, tmp_path / "out" / "x", "--vocab-size=200") == 1
    report = report_of(tmp_path / "out" / "x")
    assert {r["reason"] for r in report} == {"token_id_outside_vocabulary"}
    assert "the vocabulary has 200" in report[0]["detail"]


def test_old_files_survive_a_failure_and_are_replaced_by_a_success(
    tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "out" / "x"
    assert run(tiny_llava_dataset, tiny_spm_model, prefix) == 0
    before = files_of(prefix)
    tiny_llava_dataset.json.write_text(json.dumps([*tiny_llava_dataset.records[:3], {}]))
    assert run(tiny_llava_dataset, tiny_spm_model, prefix) == 1
    after = files_of(prefix)
    assert {k: v for k, v in after.items() if k not in (REPORT_SUFFIX, ".parts")} == {
        k: v for k, v in before.items() if k != REPORT_SUFFIX
    }
    assert run(tiny_llava_dataset, tiny_spm_model, prefix, "--skip-bad-records") == 0
    assert read_manifest(str(prefix)).counts.samples == 3


def test_text_only_data_has_empty_image_files(tiny_spm_model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It is red."}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"conversations": turns}] * 3))
    prefix = tmp_path / "out" / "x"
    assert run(LlavaDataset(path, tmp_path, []), tiny_spm_model, prefix) == 0
    source = IndexedSource(str(prefix))
    assert source.read(2).visuals == ()
    assert source.counts(VisionConfig()).patch_tokens.tolist() == [0, 0, 0]
    assert np.load(f"{prefix}_image_sizes.npy").shape == (0, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat-template=vicuna"], "'vicuna' is neither"),
        (["--image-folder=/nowhere/at/all"], "the image folder /nowhere/at/all does not exist"),
        (["--tokenizer-model=/nowhere"], "no tokenizer at /nowhere"),
        (["--input=/nowhere.json"], "nowhere.json does not exist"),
        (["--seq-length=100"], "need --model"),
        (["--image-size=28"], "need --model"),
        (["--model=haplovl-debug", "--image-size=65"], "--image-size 65 is not a multiple of --patch-size 16"),
        (["--max-image-pixels=999999999999"], "--max-image-pixels must be 1 to"),
        (["--workers=0"], "--workers must be at least 1"),
    ],
)
def test_flags_that_cannot_be(
    tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_llava_dataset, tiny_spm_model, tmp_path / "out" / "x", *flags)
    assert not list(tmp_path.glob("out/*"))


def test_no_usable_record(tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path) -> None:
    tiny_llava_dataset.json.write_text("[]")
    with pytest.raises(ValueError, match="has no usable record"):
        run(tiny_llava_dataset, tiny_spm_model, tmp_path / "out" / "x")


def test_a_hugging_face_folder_gives_the_same_files(
    tiny_llava_dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path
) -> None:
    load_tokenizer(tiny_spm_model).hf.save_pretrained(tmp_path / "hf")
    a, b = tmp_path / "a" / "x", tmp_path / "b" / "x"
    assert run(tiny_llava_dataset, tiny_spm_model, a) == run(tiny_llava_dataset, tmp_path / "hf", b) == 0
    assert files_of(a) == files_of(b)


def test_template_that_needs_tokens_the_tokenizer_lacks(tiny_llava_dataset: LlavaDataset, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, control_symbols=[])
    with pytest.raises(ValueError, match=r"writes '<\|im_end\|>', which the tokenizer does not know"):
        run(tiny_llava_dataset, model, tmp_path / "out" / "x", "--chat-template=chatml")


def test_what_is_not_used_of_images_is_counted(
    tiny_spm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    write_image(folder / "plain.png", 8, 8, seed=0)
    Image.new("RGBA", (8, 8), (255, 0, 0, 9)).save(folder / "clear.png")
    turns = [{"from": "human", "value": "<image><image>What?"}, {"from": "gpt", "value": "It."}]
    records = [{"image": ["clear.png", other], "conversations": turns} for other in ("clear.png", "plain.png")]
    records += [{"image": ["plain.png", "plain.png"], "conversations": turns}]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    prefix = tmp_path / "out" / "x"
    assert run(LlavaDataset(path, folder, []), tiny_spm_model, prefix, "--records-per-part=1") == 0
    assert read_manifest(str(prefix)).left_out == {"transparency": 2}
    assert "not used     transparency of 2 samples" in capsys.readouterr().out


def test_videos_become_frames(tiny_spm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file and from a folder, used twice, beside an image; the same for any number of workers."""
    pytest.importorskip("av")
    folder = tmp_path / "media"
    for number in (1, 2, 10):
        write_image(folder / "frames" / f"{number}.png", 8, 8, seed=number)
    make_video(folder / "a.mp4")
    records = [
        {
            "video": medium,
            "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "It."}],
        }
        for medium in ("a.mp4", "frames", "a.mp4")
    ]
    records.append({**records[0], "video": "absent.mp4"})
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    dataset = LlavaDataset(path, folder, [])
    one, two = tmp_path / "one" / "x", tmp_path / "two" / "x"
    flags = ("--num-frames=5", "--skip-bad-records", "--records-per-part=1")
    assert run(dataset, tiny_spm_model, one, *flags) == run(dataset, tiny_spm_model, two, *flags, "--workers=2") == 0
    assert files_of(one) == files_of(two)
    assert [line["reason"] for line in report_of(one)] == ["missing_image"]
    manifest = read_manifest(str(one))
    assert (manifest.num_frames, manifest.counts.videos, manifest.counts.images) == (5, 3, 5 + 3)
    assert manifest.counts.image_references == 13
    source = IndexedSource(str(one))
    first, second, third = (source.read(i).visuals[0] for i in range(3))
    assert isinstance(first, EncodedVideo) and isinstance(second, EncodedVideo) and first == third
    assert [frame.data for frame in second.frames] == [
        (folder / "frames" / f"{number}.png").read_bytes() for number in (1, 2, 10)
    ]
    assert [frame.data for frame in first.frames] == [
        frame.data for frame in encoded_frames(folder / "a.mp4", FrameSettings(5), 10**6)
    ]
    assert "videos       3, of 5 frames each or fewer" in capsys.readouterr().out
