"""Every layout that public data comes in, through the command line: what is stored, repaired, counted and refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from megatron_haplovl.commands.preprocess import main
from megatron_haplovl.data.manifest import read_manifest
from megatron_haplovl.data.sources import EncodedVideo, IndexedSource
from tests.layouts import ANSWERED, CASES, MEMBERS, Tool, as_json, bytes_of, chat, compact, says, write, write_tar


@pytest.mark.parametrize("name", CASES)
def test_a_layout_becomes_a_sample(tool: Tool, name: str) -> None:
    case = CASES[name]
    record = case.record(tool.images) if callable(case.record) else case.record
    got = tool(write(tool.folder, f"a{case.file}", [record]))
    assert got.status == 0, (got.complained, got.report)
    assert (got.texts, got.visuals) == ([compact(case.text)], [list(case.visuals)])
    trained = compact(case.trained)
    assert got.trained == [trained + "</s>"]
    assert got.manifest is not None
    assert got.manifest.repairs == dict.fromkeys(case.repairs, 1)
    assert got.manifest.unread_keys == dict.fromkeys(case.unread, 1)
    assert all(f"{word} 1" in got.printed for word in (*case.repairs, *case.unread))
    # The record's name is known where something is wrong with it.
    bad = write(tool.folder, f"b{case.file}", [{**record, "photo_path": "x.png"}])
    assert [(line["id"], line["reason"]) for line in tool(bad).report] == [(case.id, "unread_media_key")]


REPAIRED = {name: case for name, case in CASES.items() if case.repairs and case.repairs != ("sample_id",)}


@pytest.mark.parametrize("name", REPAIRED)
def test_without_its_repair_it_is_refused_and_the_repair_is_named(tool: Tool, name: str) -> None:
    case = REPAIRED[name]
    record = case.record(tool.images) if callable(case.record) else case.record
    path = write(tool.folder, f"a{case.file}", [record])
    got = tool(path, flags=("--repairs", "none"))
    assert got.status == 1 and len(got.report) == 1
    assert f"--repairs {case.repairs[0]}" in got.report[0]["detail"]
    assert tool(path, flags=("--repairs", ",".join(case.repairs))).status == 0


def test_without_its_repair_another_id_is_a_key_that_is_not_read(tool: Tool) -> None:
    record = {"sample_id": 5, "question_id": 6, "conversations": chat("a")}
    got = tool(write(tool.folder, "a.json", [record]), flags=("--repairs", "none"))
    assert got.manifest is not None
    assert (got.manifest.repairs, got.manifest.unread_keys) == ({}, {"question_id": 1, "sample_id": 1})


def test_a_mark_at_the_edge_of_a_question_without_an_image(tool: Tool) -> None:
    """More likely an image that was lost than a text; by a named repair it is text."""
    path = write(tool.folder, "a.json", [{"conversations": chat("<image>\nWhat is it?")}])
    got = tool(path)
    assert [line["reason"] for line in got.report] == ["image_mark_count_mismatch"]
    assert "--repairs literal_mark" in got.report[0]["detail"]
    got = tool(path, flags=("--repairs", "llava,literal_mark"))
    assert (got.texts, got.visuals) == ([says("<image>\nWhat is it?")], [[]])


def write_video(path: Path, frames: int) -> None:
    """Frames that become brighter, 8 grey levels each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 8 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("given", ["path", "bytes", "part"])
def test_video_file(tool: Tool, given: str) -> None:
    """Frames at fixed times, stored as pictures."""
    tool.images = tool.folder
    write_video(tool.folder / "v.mp4", 30)
    data = (tool.folder / "v.mp4").read_bytes()
    records: dict[str, Any] = {
        "path": {"id": "v2", "video": "v.mp4", "conversations": chat("<video>\nWhat happens?")},
        "bytes": {"video": {"bytes": data, "path": "v.mp4"}, "conversations": chat("<video>\nWhat happens?")},
        "part": {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}, "What?"]}, ANSWERED]},
    }
    path = write(tool.folder, "a.jsonl" if given != "bytes" else "a.parquet", [records[given]])
    prefix = tool.folder / "out" / "v"
    words = [f"--input={path}", f"--image-folder={tool.images}", f"--output-prefix={prefix}", "--num-frames=4"]
    words += [f"--tokenizer-model={tool.tokenizer}", "--chat-template=vicuna_v1", "--workers=1"]
    assert main(words) == 0, tool.capture.readouterr().err
    manifest = read_manifest(str(prefix))
    assert (manifest.counts.videos, manifest.num_frames, manifest.counts.image_references) == (1, 4, 4)
    (video,) = IndexedSource(str(prefix)).read(0).visuals
    assert isinstance(video, EncodedVideo)
    levels = [float(np.asarray(Image.open(io.BytesIO(frame.data))).mean()) for frame in video.frames]
    assert levels == pytest.approx([8 * (29 * i // 3) for i in range(4)], abs=4)


TWICE = [*chat("<image>\na", "b"), *chat("<image>\nc", "d")]
REFUSED: dict[str, tuple[Any, str, str]] = {
    "mark_twice_one_image": (
        {"image": "a.png", "conversations": TWICE},
        "image_mark_count_mismatch",
        "2 <image> marks in the text, 1 images given",
    ),
    "unknown_image_key": (
        {"id": 1, "image_path": "a.png", "conversations": chat("q")},
        "unread_media_key",
        "the key 'image_path' looks like media",
    ),
    "an address": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": "https://a.b/c.png"}, "x"]},
                ANSWERED,
            ]
        },
        "remote_image",
        "download",
    ),
    "an address in `image`": (
        {"image": "http://a.b/c.png", "conversations": chat("<image>")},
        "remote_image",
        "download",
    ),
    "base64 that is cut": (
        {"image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEU", "conversations": chat("<image>")},
        "undecodable_image",
        "not valid base64",
    ),
    "base64 without its head": (
        {"image": "iVBORw0KGgoAAAANSUhEU" * 100, "conversations": chat("<image>")},
        "missing_image",
        "needs `data:image/png",
    ),
    "two keys of images": (
        {"image": "a.png", "images": ["a.png"], "conversations": chat("<image>")},
        "image_mark_count_mismatch",
        "`image` and `images`",
    ),
    "parts and a key": (
        {
            "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, "x"]}, ANSWERED],
            "images": ["b.png"],
        },
        "image_mark_count_mismatch",
        "the messages hold their own media",
    ),
    "fewer images than parts": (
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, ANSWERED],
            "images": ["b.png"],
        },
        "image_mark_count_mismatch",
        "2 image parts without a source, 1 images given",
    ),
    "a part of another kind": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "x"}]}, ANSWERED]},
        "bad_turns",
        "'input_audio'",
    ),
    "images beside a message": (
        {"messages": [{"role": "user", "content": "x", "images": ["a.png"]}, ANSWERED]},
        "unread_media_key",
        "messages[].images",
    ),
    "no layout": ({"prompt": "a", "completion": "b"}, "no_conversations", "'prompt'"),
    "mmc4 without its sentence": (
        {"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
        "bad_document",
        "1 sentences",
    ),
    "obelics of two lengths": ({"texts": ["a"], "images": [None, "a.png"]}, "bad_document", "same length"),
    "a document without text": ({"text": " \n"}, "bad_document", "no text"),
    "a history of other things": ({"query": "a", "response": "b", "history": ["x"]}, "bad_turns", "history[0]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tool: Tool, name: str) -> None:
    record, reason, detail = REFUSED[name]
    got = tool(write(tool.folder, "a.jsonl", [record, {"conversations": chat("a")}]))
    assert (got.status, [line["reason"] for line in got.report]) == (1, [reason])
    assert detail in got.report[0]["detail"] and len(got.report[0]["detail"]) <= 300
    assert "iVBOR" not in json.dumps(got.report) and got.report[0]["location"] == "line 1"


MEDIA_KEYS = [
    *("image_path", "image_paths", "img", "imgs", "picture", "pictures", "photo", "audio", "audios", "frames"),
    *("video_path", "imagePath", "image_url", "image_file", "img_path", "images_list", "pic", "media"),
]


@pytest.mark.parametrize("key", MEDIA_KEYS)
@pytest.mark.parametrize("value", ["x.png", ["x.png"], {"path": "x.png"}])
def test_a_key_that_looks_like_media_and_is_not_read(tool: Tool, key: str, value: Any) -> None:
    path = write(tool.folder, "a.json", [{"id": 1, key: value, "conversations": chat("a")}])
    got = tool(path)
    assert (got.status, got.report[0]["reason"]) == (1, "unread_media_key") and repr(key) in got.report[0]["detail"]
    got = tool(path, flags=("--ignore-keys", "other", key))
    assert got.manifest is not None and got.manifest.unread_keys == {key: 1}


@pytest.mark.parametrize("key", MEDIA_KEYS)
def test_an_empty_key_is_no_media(tool: Tool, key: str) -> None:
    values = [None, "", [], {}, [None], {"bytes": None, "path": None}]
    got = tool(write(tool.folder, "a.json", [{key: value, "conversations": chat("a")} for value in values]))
    assert got.manifest is not None and got.manifest.unread_keys == {} and len(got.texts) == 6


def test_bytes_are_media_whatever_their_name(tool: Tool) -> None:
    record = {"thing": {"bytes": b"\x89PNG" * 50}, "conversations": chat("a")}
    got = tool(write(tool.folder, "a.parquet", [record]))
    assert got.report[0]["reason"] == "unread_media_key" and "200 bytes" in got.report[0]["detail"]
    assert "PNG" not in json.dumps(got.report)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_tar_shard(tool: Tool, name: str, suffix: str) -> None:
    members, text, visuals = MEMBERS[name]
    got = tool(write_tar(tool.folder / f"a{suffix}", members(tool.images)))
    assert got.status == 0, got.report
    assert (got.texts, got.visuals) == ([text], [visuals])


def test_bad_samples_of_a_tar_shard(tool: Tool) -> None:
    picture = bytes_of(tool.images, "a.png")
    path = write_tar(
        tool.folder / "a.tar",
        {
            "1.json": as_json(id="one", conversations=chat("a")),
            "2.png": picture,
            "3.json": b"{",
            "4.json": as_json(conversations=chat("<image>a"), image=["x.png", "y.png"]),
            "4.png": picture,
            "5.json": as_json(conversations=chat("a")),
            "5.wav": b"RIFF",
            "1.png": picture,
        },
    )
    got = tool(path, flags=("--skip-bad-records",))
    assert got.texts == [says("a")]
    assert [(line["location"], line["id"], line["reason"]) for line in got.report] == [
        ("member 2", "2", "no_conversations"),
        ("member 3", None, "unparsable_line"),
        ("member 4", "4", "missing_image"),
        ("member 5", "5", "unread_media_key"),
        ("member 1", None, "unparsable_line"),
    ]
