"""Records of every layout that public data comes in, and the tool that preprocesses them."""

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


@pytest.fixture(scope="session")
def layout_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def tool(tmp_path: Path, layout_images: Path, tiny_spm_model: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, layout_images, tiny_spm_model, capsys)


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


def data_url(images: Path, name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(bytes_of(images, name)).decode()


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


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def as_json(**record: Any) -> bytes:
    return json.dumps(record).encode()


MEMBERS: dict[str, tuple[Callable[[Path], dict[str, bytes]], str, list[Any]]] = {
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
