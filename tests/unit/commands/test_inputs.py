"""Files, folders, globs and links through the command line, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest

from tests.conftest import write_image
from tests.layouts import FIRST, FRAMES, NAMES, Tool, bytes_of, chat, says, write, write_tar


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
