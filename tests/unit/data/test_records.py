"""Every record that cannot be used gets its own reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_haplovl.data.layouts.normalise import NormaliseOptions, normalise
from megatron_haplovl.data.readers.inputs import kind_of, read
from megatron_haplovl.data.records import (
    Image,
    RawRecord,
    Reason,
    RecordError,
    resolve_image,
)

GOOD = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "This."}]


def check(value: Any) -> Any:
    return normalise(RawRecord("index 0", value), NormaliseOptions()).record


def test_both_spellings_and_a_system_message() -> None:
    record = check({"image": "a.png", "conversations": GOOD, "system": "Be brief."})
    assert [m.role for m in record.messages] == ["system", "user", "assistant"]
    assert record.media == (Image(path="a.png"),)
    other = check(
        {
            "image": ["a.png"],
            "conversations": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<image> What?"},
                {"role": "assistant", "content": "This."},
            ],
        }
    )
    assert other == record
    assert check({"conversations": [{"from": "human", "value": "x"}, GOOD[1]]}).media == ()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, Reason.NO_CONVERSATIONS),
        ({"conversations": []}, Reason.NO_CONVERSATIONS),
        ({"conversations": "text"}, Reason.NO_CONVERSATIONS),
        ({"conversations": [{"from": "system", "value": "x"}]}, Reason.NO_CONVERSATIONS),
        ("text", Reason.NO_CONVERSATIONS),
        ({"image": "a.png", "conversations": [*GOOD[:1], {"from": "gpt", "value": " \n"}]}, Reason.EMPTY_ANSWER),
        ({"image": "a.png", "conversations": GOOD[:1]}, Reason.EMPTY_ANSWER),
        ({"image": "a.png", "conversations": GOOD[::-1]}, Reason.BAD_TURNS),
        ({"image": "a.png", "conversations": [{"from": "dog", "value": "x"}]}, Reason.BAD_TURNS),
        ({"image": "a.png", "conversations": [{"from": "human", "value": 3}]}, Reason.BAD_TURNS),
        ({"image": "a.png", "conversations": ["x"]}, Reason.BAD_TURNS),
        ({"image": "a.png", "system": 3, "conversations": GOOD}, Reason.BAD_TURNS),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "\ud800"}, GOOD[1]]}, Reason.BAD_TURNS),
        ({"conversations": GOOD}, Reason.IMAGE_COUNT),
        ({"image": ["a.png", "b.png"], "conversations": GOOD}, Reason.IMAGE_COUNT),
        ({"image": 5, "conversations": GOOD}, Reason.MISSING_IMAGE),
        ({"image": ["a.png", ""], "conversations": GOOD}, Reason.MISSING_IMAGE),
        ({"video": 5, "conversations": [{"from": "human", "value": "x"}, GOOD[1]]}, Reason.MISSING_IMAGE),
        ({"conversations": [{"from": "human", "value": "<video> x"}, GOOD[1]]}, Reason.IMAGE_COUNT),
    ],
)
def test_reasons(value: Any, reason: Reason) -> None:
    with pytest.raises(RecordError) as caught:
        check(value)
    assert caught.value.reason is reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.detail) == (reason, caught.value.detail)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("bad", [{"from": "dog", "value": "x"}, {"from": "system", "value": "x"}])
def test_turns_are_counted_in_conversations(number: int, bad: dict[str, str]) -> None:
    """With a `system` key, and with a system turn at the head, which counts."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    turns[number] = bad
    with pytest.raises(RecordError, match=rf"\bturn {number} is from"):
        check({"system": "Be brief.", "conversations": turns})
    with pytest.raises(RecordError, match=rf"\bturn {number + 1} is from"):
        check({"conversations": [{"from": "system", "value": "Be brief."}, *turns]})


def test_path_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = (tmp_path / "images").resolve()
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (folder / "ok.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "fine.png").symlink_to(folder / "ok.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    assert resolve_image("ok.png", folder) == resolve_image("fine.png", folder) == folder / "ok.png"
    for path in ("../secret.png", "a/../../secret.png", str(folder / "ok.png"), "link.png", "up/secret.png", "a\0b"):
        with pytest.raises(RecordError) as caught:
            resolve_image(path, folder)
        assert caught.value.reason is Reason.PATH_ESCAPES, path
    for path in ("absent.png", "loop.png", "x" * 5000, "."):
        with pytest.raises(RecordError) as caught:
            resolve_image(path, folder)
        assert caught.value.reason is Reason.MISSING_IMAGE, path


def test_lines_and_lists(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"id": 7}\n\n{broken\n\xff\xfe\n' + b"[" * 100000 + b"\n" + b'{"id": "x"}\n')
    total = kind_of(lines).count(lines)
    found = list(read([lines]))
    assert total == len(found) == 5
    assert [r.location for r in found] == ["line 1", "line 3", "line 4", "line 5", "line 6"]
    assert [r.id for r in found] == ["7", None, None, None, "x"]
    for raw in found[1:4]:
        with pytest.raises(RecordError) as caught:
            normalise(raw, NormaliseOptions())
        assert caught.value.reason is Reason.UNPARSABLE
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps([{"id": 1}, {"id": 2}]))
    assert [r.location for r in read([listed])] == ["index 0", "index 1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "must hold a list of records, not dict"),
        ("a.json", "[1,", "is not valid JSON"),
        ("a.txt", "[]", "must end in .json, .json.gz"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read([tmp_path / name]))
    with pytest.raises(ValueError, match="does not exist"):
        read([tmp_path / "absent.json"])
