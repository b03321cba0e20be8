"""Every layout that public data comes in, through the command line: what is stored, repaired, counted and refused."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_haplovl.commands.preprocess import main
from megatron_haplovl.data.manifest import REPORT_SUFFIX, Manifest, read_manifest
from megatron_haplovl.data.sources import EncodedVideo, IndexedSource
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.conftest import write_image

NAMES = ("a.png", "b.png", "coco/train2017/1.png", "clips/v_1/10.png", "clips/v_1/2.png", "clips/v_1/1.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image folder."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        write_image(folder / name, 8 + number, 9, seed=number)
    (folder / "clips/v_1/notes.txt").write_text("no frame")
    return folder


@dataclass
class Outcome:
    """What a run left behind."""

    status: int
    printed: str
    complained: str
    report: list[dict[str, Any]]
    manifest: Manifest | None = None
    texts: list[str] = field(default_factory=list)
    """What each sample reads behind the system message, without spaces; an image is `<image>`."""
    trained: list[str] = field(default_factory=list)
    visuals: list[list[Any]] = field(default_factory=list)
    """Names of each sample's images; of a video, the list of its frames."""


@dataclass
class Tool:
    """The tool with a tokenizer and an image folder."""

    folder: Path
    images: Path
    tokenizer: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *inputs: Path | str, flags: tuple[str, ...] = ()) -> Outcome:
        prefix = str(self.folder / "out" / "x")
        words = ["--input", *map(str, inputs), "--image-folder", str(self.images), "--output-prefix", prefix]
        words += ["--tokenizer-model", str(self.tokenizer), "--chat-template", "vicuna_v1", "--workers", "1", *flags]
        status = main(words)
        printed = self.capture.readouterr()
        path = Path(prefix + REPORT_SUFFIX)
        report = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        outcome = Outcome(status, printed.out, printed.err, report)
        if status == 0:
            self._read(prefix, outcome)
        return outcome

    def _read(self, prefix: str, outcome: Outcome) -> None:
        outcome.manifest = read_manifest(prefix)
        hf = load_tokenizer(self.tokenizer).hf
        source = IndexedSource(prefix)
        names = {(self.images / name).read_bytes(): name for name in NAMES}
        for i in range(outcome.manifest.counts.samples):
            sample = source.read(i)
            outcome.texts.append(compact(str(hf.decode(sample.token_ids.tolist()))).rpartition("questions.")[2])
            outcome.trained.append(compact(str(hf.decode(sample.token_ids[sample.loss_mask == 1].tolist()))))
            outcome.visuals.append(
                [
                    [names[frame.data] for frame in visual.frames]
                    if isinstance(visual, EncodedVideo)
                    else names[visual.data]
                    for visual in sample.visuals
                ]
            )


@pytest.fixture
def tool(tmp_path: Path, images: Path, tiny_spm_model: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, images, tiny_spm_model, capsys)


def compact(text: str) -> str:
    return "".join(text.split())


def chat(question: str, answer: str = "A bus.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def says(question: str, answer: str = "A bus.") -> str:
    return compact(f"USER:{question}ASSISTANT:{answer}</s>")


def write(folder: Path, name: str, records: list[Any]) -> Path:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(records))
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, records)))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def bytes_of(images: Path, name: str) -> bytes:
    return (images / name).read_bytes()


@dataclass(frozen=True)
class Case:
    """A record of one layout, and what becomes of it."""

    file: str
    record: Any
    """The record, or a function of the image folder that makes it."""
    text: str
    visuals: tuple[Any, ...] = ()
    trained: str = "A bus."
    repairs: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    id: str | None = None


ASKED = {"role": "user", "content": "<image>What is it?"}
ANSWERED = {"role": "assistant", "content": "A bus."}
FIRST = "coco/train2017/1.png"
FRAMES = ["clips/v_1/1.png", "clips/v_1/2.png", "clips/v_1/10.png"]
CASES = {
    "llava_image": Case(
        ".json",
        {"id": "000000000001", "image": FIRST, "conversations": chat("<image>\nWhat is it?")},
        says("<image>\nWhat is it?"),
        (FIRST,),
        id="000000000001",
    ),
    "llava_text_only": Case(
        ".json", {"id": "ab12_0", "model": "", "conversations": chat("Hello")}, says("Hello"), id="ab12_0"
    ),
    "null media keys": Case(
        ".json",
        {"image": None, "images": [], "video": "", "videos": [None], "conversations": chat("Hello")},
        says("Hello"),
    ),
    "image_behind_question": Case(
        ".json",
        {"image": "a.png", "conversations": chat("What is it?\n<image>")},
        says("<image>\nWhat is it?"),
        ("a.png",),
        repairs=("mark_to_front",),
    ),
    "gpt_first": Case(
        ".json",
        {"conversations": [{"from": "gpt", "value": "Yes."}, *chat("a")]},
        says("a"),
        repairs=("drop_leading_answer",),
    ),
    "human_last": Case(
        ".json",
        {"conversations": [*chat("a"), {"from": "human", "value": "c"}]},
        says("a"),
        repairs=("drop_trailing_question",),
    ),
    "two_humans_in_a_row": Case(
        ".json",
        {"conversations": [{"from": "human", "value": "a"}, *chat("b")]},
        says("a\nb"),
        repairs=("join_turns",),
    ),
    "two answers in a row": Case(
        ".json",
        {"conversations": [*chat("a"), {"from": "gpt", "value": "It is red."}]},
        says("a", "A bus.\nIt is red."),
        trained="A bus.\nIt is red.",
        repairs=("join_turns",),
    ),
    "image_without_mark": Case(
        ".json",
        {"image": "a.png", "conversations": chat("What is it?")},
        says("<image>\nWhat is it?"),
        ("a.png",),
        repairs=("add_missing_mark",),
    ),
    "literal_mark_in_text": Case(
        ".json",
        {"conversations": chat("How do I show a picture?", "Use the <image> tag.")},
        says("How do I show a picture?", "Use the <image> tag."),
        trained="Use the <image> tag.",
    ),
    "literal mark in a question": Case(
        ".json",
        {"conversations": chat("What does <image> or <video> do in HTML?")},
        says("What does <image> or <video> do in HTML?"),
    ),
    "literal mark in the answer about an image": Case(
        ".json",
        {"image": "a.png", "conversations": chat("<image>\nWhat is it?", "An <image> of a bus.")},
        says("<image>\nWhat is it?", "An <image> of a bus."),
        ("a.png",),
        trained="An <image> of a bus.",
    ),
    "m4_instruct": Case(
        ".json",
        {
            "sample_id": 5390,
            "conversations": chat("<image><image>\nWhat changed?"),
            "image": ["a.png", "b.png"],
            "choice_list": None,
            "metadata": {"dataset": "x"},
        },
        says("<image><image>\nWhat changed?"),
        ("a.png", "b.png"),
        repairs=("sample_id",),
        unread=("metadata",),
        id="5390",
    ),
    "several marks keep their places": Case(
        ".json",
        {"image": ["b.png", "a.png"], "conversations": chat("One: <image> Two: <image>")},
        says("One: <image> Two: <image>"),
        ("b.png", "a.png"),
    ),
    "frames_folder": Case(
        ".json",
        {"id": "v1", "video": "clips/v_1", "conversations": chat("<image>\nWhat happens?")},
        says("<video>\nWhat happens?"),
        (FRAMES,),
        id="v1",
    ),
    "frames in a list": Case(
        ".json",
        {"video": FRAMES[:2], "conversations": chat("<video>\nWhat happens?")},
        says("<video>\nWhat happens?"),
        (FRAMES[:2],),
    ),
    "onevision_parquet": Case(
        ".parquet",
        lambda images: {
            "id": "x",
            "image": {"bytes": bytes_of(images, "a.png"), "path": "x.png"},
            "conversations": chat("<image>\na"),
            "data_source": "s",
        },
        says("<image>\na"),
        ("a.png",),
        unread=("data_source",),
        id="x",
    ),
    "onevision_parquet without an image": Case(
        ".parquet", {"image": {"bytes": None, "path": None}, "conversations": chat("a")}, says("a")
    ),
    "a struct that has only a path": Case(
        ".parquet",
        {"image": {"bytes": None, "path": "b.png"}, "conversations": chat("<image>a")},
        says("<image>a"),
        ("b.png",),
    ),
    "messages_images": Case(
        ".jsonl", {"messages": [ASKED, ANSWERED], "images": ["a.png"]}, says("<image>What is it?"), ("a.png",)
    ),
    "messages_images_struct": Case(
        ".parquet",
        lambda images: {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
            ],
            "images": [{"bytes": bytes_of(images, "b.png"), "path": None}],
        },
        says("<image>What is it?"),
        ("b.png",),
    ),
    "content_parts": Case(
        ".jsonl",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "What is it?"},
                    ],
                },
                ANSWERED,
            ]
        },
        says("<image>What is it?"),
        ("a.png",),
    ),
    "content parts with a data: URL, behind the text": Case(
        ".jsonl",
        lambda images: {
            "messages": [
                {"role": "system", "content": "Be brief. questions."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is <image>?"},
                        {"type": "image", "image": data_url(images, "b.png")},
                    ],
                },
                {"role": "assistant", "content": ["A ", {"type": "text", "text": "bus."}]},
            ]
        },
        says("<image>\nWhat is <image>?"),
        ("b.png",),
        repairs=("mark_to_front",),
    ),
    "content parts with a video": Case(
        ".jsonl",
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": "clips/v_1"}, "What happens?"]},
                ANSWERED,
            ]
        },
        says("<video>What happens?"),
        (FRAMES,),
    ),
    "images_key_conversations": Case(
        ".json",
        {"conversations": chat("<image>What is it?"), "images": ["a.png"]},
        says("<image>What is it?"),
        ("a.png",),
    ),
    "images_key_without_mark": Case(
        ".json",
        {"conversations": chat("What is it?"), "images": ["a.png", "b.png"]},
        says("<image>\n<image>\nWhat is it?"),
        ("a.png", "b.png"),
        repairs=("add_missing_mark",),
    ),
    "alpaca": Case(
        ".jsonl",
        {"instruction": "Answer briefly.", "input": "What is a bus?", "output": "A vehicle."},
        says("Answer briefly.\nWhat is a bus?", "A vehicle."),
        trained="A vehicle.",
    ),
    "alpaca without input": Case(
        ".jsonl",
        {"instruction": "What is a bus?", "input": "", "output": "A vehicle.", "history": [["a", "b"]]},
        says("a", "b") + says("What is a bus?", "A vehicle."),
        trained="b</s>A vehicle.",
    ),
    "query_response": Case(
        ".jsonl",
        {"query": "<image>What is it?", "response": "A bus.", "images": ["a.png"], "history": []},
        says("<image>What is it?"),
        ("a.png",),
    ),
    "query and response with a history": Case(
        ".jsonl",
        {"query": "c", "response": "d", "images": ["a.png"], "history": [["<image>a", "b"]], "system": "S questions."},
        says("<image>a", "b") + says("c", "d"),
        ("a.png",),
        trained="b</s>d",
    ),
    "plain_text": Case(
        ".jsonl", {"text": "A bus is a vehicle."}, "<s>Abusisavehicle.</s>", trained="A bus is a vehicle."
    ),
    "mmc4_document": Case(
        ".jsonl",
        {
            "text_list": ["A bus.", "It is red."],
            "image_info": [
                {"image_name": "b.png", "matched_text_index": 1, "matched_sim": 0.2},
                {"image_name": "a.png", "matched_text_index": 0, "matched_sim": 0.3},
                {"image_name": "absent.png", "matched_text_index": 0, "matched_sim": 0.3},
            ],
            "similarity_matrix": [[0.3, 0.1], [0.1, 0.2], [0.3, 0.1]],
            "url": "u",
        },
        "<s><image>Abus.<image>Itisred.</s>",
        ("a.png", "b.png"),
        trained="A bus. It is red.",
        repairs=("drop_missing_image",),
        unread=("url",),
    ),
    "obelics_document": Case(
        ".parquet",
        {"images": ["a.png", None, None, "b.png"], "texts": [None, "A bus.", "It is red.", None], "metadata": "{}"},
        "<s><image>Abus.Itisred.<image></s>",
        ("a.png", "b.png"),
        trained="A bus.\n\nIt is red.",
        unread=("metadata",),
    ),
    "an interleaved text with marks": Case(
        ".jsonl",
        {"text": "<image> A bus. <image>", "images": ["a.png", "b.png"]},
        "<s><image>Abus.<image></s>",
        ("a.png", "b.png"),
    ),
    "base64_image": Case(
        ".jsonl",
        lambda images: {"image": data_url(images, "a.png"), "conversations": chat("<image>\nq")},
        says("<image>\nq"),
        ("a.png",),
    ),
    "other keys are counted": Case(
        ".json",
        {"conversations": [dict(chat("a")[0], weight=0.5), chat("a")[1]], "url": "u", "image_id": "7", "num_frames": 3},
        says("a"),
        unread=("conversations[].weight", "image_id", "num_frames", "url"),
    ),
}


def data_url(images: Path, name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(bytes_of(images, name)).decode()


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


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def as_json(**record: Any) -> bytes:
    return json.dumps(record).encode()


TARS: dict[str, tuple[Callable[[Path], dict[str, bytes]], str, list[Any]]] = {
    "tar_shard": (
        lambda i: {"000001.jpg": bytes_of(i, "a.png"), "000001.json": as_json(conversations=chat("<image>\na"))},
        says("<image>\na"),
        ["a.png"],
    ),
    "a caption": (
        lambda i: {"d/1.png": bytes_of(i, "b.png"), "d/1.txt": b"A bus.", "d/1.json": as_json(key="1", width=9)},
        says("<image>"),
        ["b.png"],
    ),
    "a text": (lambda i: {"1.txt": b"A bus."}, "<s>Abus.</s>", []),
    "several images in natural order": (
        lambda i: {
            "1.10.png": bytes_of(i, "b.png"),
            "1.2.png": bytes_of(i, "a.png"),
            "1.json": as_json(messages=[{"role": "user", "content": "<image><image>x"}, ANSWERED]),
        },
        says("<image><image>x"),
        ["a.png", "b.png"],
    ),
    "images in the record's order": (
        lambda i: {
            "1.a.png": bytes_of(i, "a.png"),
            "1.b.png": bytes_of(i, "b.png"),
            "1.json": as_json(images=["b.png", "1.a.png"], conversations=chat("<image><image>x")),
        },
        says("<image><image>x"),
        ["b.png", "a.png"],
    ),
    "the name before it was packed": (
        lambda i: {
            "1.jpg": bytes_of(i, "a.png"),
            "1.json": as_json(image="coco/77.jpg", conversations=chat("<image>x")),
        },
        says("<image>x"),
        ["a.png"],
    ),
    "an image in the folder": (
        lambda i: {"1.json": as_json(image="a.png", conversations=chat("<image>x"))},
        says("<image>x"),
        ["a.png"],
    ),
    "a list of turns": (
        lambda i: {"1.jpg": bytes_of(i, "a.png"), "1.json": json.dumps(chat("<image>x")).encode()},
        says("<image>x"),
        ["a.png"],
    ),
}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("name", TARS)
def test_a_tar_shard(tool: Tool, name: str, suffix: str) -> None:
    members, text, visuals = TARS[name]
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


def test_long_int(tool: Tool) -> None:
    good = json.dumps({"conversations": chat("a")})
    bad = '{"id": ' + "7" * 5000 + ', "conversations": []}'
    for name, text in (("a.jsonl", f"{good}\n{bad}\n{good}"), ("a.json", f"[{good},{bad},{good}]")):
        (tool.folder / name).write_text(text)
        got = tool(tool.folder / name, flags=("--skip-bad-records",))
        assert len(got.texts) == 2 and [line["reason"] for line in got.report] == ["unparsable_line"]
        assert len(got.report[0]["detail"]) <= 300


def test_json_lines_named_json_and_a_byte_order_mark(tool: Tool) -> None:
    line = json.dumps({"conversations": chat("a")})
    for text in (f"{line}\n{line}\n", f"[{line},{line}]"):
        for mark in (b"", b"\xef\xbb\xbf"):
            (tool.folder / "a.json").write_bytes(mark + text.encode())
            assert tool(tool.folder / "a.json").texts == [says("a"), says("a")]


def test_linked_folder(tool: Tool, tmp_path: Path) -> None:
    outside = tmp_path / "shared"
    for name in NAMES:
        write_image(outside / name, 8 + NAMES.index(name), 9, seed=NAMES.index(name))
    tool.images = tmp_path / "links"
    tool.images.mkdir()
    for name in {name.partition("/")[0] for name in NAMES}:
        (tool.images / name).symlink_to(outside / name)
    records = [
        {"image": FIRST, "conversations": chat("<image>a")},
        {"video": "clips/v_1", "conversations": chat("<video>a")},
    ]
    path = write(tool.folder, "a.json", records)
    got = tool(path)
    assert [line["reason"] for line in got.report] == ["path_escapes_image_folder"] * 2
    assert all("--image-root FOLDER" in line["detail"] for line in got.report)
    assert tool(path, flags=("--image-root", str(tmp_path / "out"))).status == 1
    assert tool(path, flags=("--image-root", str(outside))).visuals == [[FIRST], [FRAMES]]
    assert "image root /nowhere does not exist" in tool(path, flags=("--image-root", "/nowhere")).complained


def test_several_image_folders(tool: Tool, tmp_path: Path) -> None:
    """The first that has the image; the sentence names the path if none has."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "b.png").write_bytes(bytes_of(tool.images, "a.png"))
    records = [{"image": name, "conversations": chat("<image>a")} for name in ("a.png", "b.png")]
    path = write(tool.folder, "a.json", records)
    every, tool.images = tool.images, tmp_path / "first"
    assert [line["reason"] for line in tool(path).report] == ["missing_image"]
    tool.images = every
    assert tool(path, flags=("--image-folder", str(tmp_path / "first"))).visuals == [["a.png"], ["b.png"]]
    assert tool(path, flags=("--image-folder", "/nowhere")).status == 2


def test_the_first_image_folder_wins(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "a.png").write_bytes(b"never looked at")
    path = write(tool.folder, "a.json", [{"image": "a.png", "conversations": chat("<image>a")}])
    assert tool(path, flags=("--image-folder", str(tmp_path / "later"))).visuals == [["a.png"]]


def test_several_inputs_and_globs(tool: Tool) -> None:
    for number in (10, 2, 1):
        write(tool.folder, f"part-{number}.jsonl", [{"conversations": chat(f"number {number}")}])
    write(tool.folder, "z.parquet", [{"text": "A bus."}])
    got = tool(str(tool.folder / "part-*.jsonl"), tool.folder / "z.parquet")
    assert got.texts == [says(f"number {number}") for number in (1, 2, 10)] + ["<s>Abus.</s>"]
    write(tool.folder, "part-2.jsonl", [{"conversations": []}])
    got = tool(str(tool.folder / "part-*.jsonl"))
    assert got.report[0]["location"] == f"{tool.folder / 'part-2.jsonl'} line 1"
    for given, message in (
        (["nothing-*.json"], "no file matches the input 'nothing-*.json'"),
        (["absent.json"], "absent.json does not exist"),
        ([tool.folder / "part-1.jsonl", str(tool.folder / "part-*.jsonl")], "part-1.jsonl is given twice"),
    ):
        got = tool(*given)
        assert got.status == 2 and message in got.complained and "Traceback" not in got.complained


def test_folders_of_the_hub(tool: Tool) -> None:
    hub = tool.folder / "hub"
    for number in (10, 2):
        (hub / "data").mkdir(parents=True, exist_ok=True)
        write(hub / "data", f"train-{number:05}-of-00011.parquet", [{"text": f"number {number}"}])
    write(hub / "data", "test-00000-of-00001.parquet", [{"text": "never"}])
    (hub / ".cache").mkdir()
    write(hub / ".cache", "train-0.parquet", [{"text": "never"}])
    (hub / "dataset_infos.json").write_text("{}")
    assert tool(hub).texts == ["<s>number2</s>", "<s>number10</s>"]
    write(hub, "more.jsonl", [{"text": "x"}])
    complained = tool(hub).complained
    assert "holds several kinds of data files, such as test-00000-of-00001.parquet and more.jsonl" in complained
    (tool.folder / "empty").mkdir()
    assert "holds no data files" in tool(tool.folder / "empty").complained
    only = tool.folder / "only"
    (only / "test").mkdir(parents=True)
    write(only / "test", "0.parquet", [{"text": "never"}])
    assert "has no files of a train split" in tool(only).complained


def test_a_folder_that_save_to_disk_wrote(tool: Tool) -> None:
    saved = tool.folder / "saved"
    for split in ("train", "test"):
        (saved / split).mkdir(parents=True)
        names = [f"data-{number:05}-of-00002.arrow" for number in range(2)]
        for number, name in enumerate(names):
            table = pyarrow.Table.from_pylist([{"text": f"{split} {number}"}])
            with pyarrow.ipc.new_stream(saved / split / name, table.schema) as stream:
                stream.write_table(table)
        (saved / split / "cache-1.arrow").write_bytes(b"left over")
        state = {"_data_files": [{"filename": name} for name in names]}
        (saved / split / "state.json").write_text(json.dumps(state))
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert tool(saved).texts == ["<s>train0</s>", "<s>train1</s>"]
    assert tool(saved / "test").texts == ["<s>test0</s>", "<s>test1</s>"]


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".tar"])
def test_a_damaged_file_ends_with_a_sentence(tool: Tool, suffix: str) -> None:
    path = tool.folder / f"a{suffix}"
    if suffix == ".tar":
        write_tar(path, {"1.txt": b"A bus."})
    else:
        write(tool.folder, path.name, [{"text": "A bus."}] * 20)
    path.write_bytes(path.read_bytes()[:-9700] if suffix == ".tar" else path.read_bytes()[:-9])
    got = tool(path)
    assert got.status == 2 and path.name in got.complained and "Traceback" not in got.complained
    assert not list(tool.folder.glob("out/.*"))
