"""docs/data.md names every kind of file, layout and repair, and its examples are read as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_haplovl.data.layouts.normalise import NormaliseOptions, normalise
from megatron_haplovl.data.layouts.repairs import LLAVA, REPAIRS
from megatron_haplovl.data.layouts.table import LAYOUTS, find_layout
from megatron_haplovl.data.readers.inputs import FILE_KINDS
from megatron_haplovl.data.readers.streams import COMPRESSIONS
from megatron_haplovl.data.records import LONGEST_DETAIL, RawRecord

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*)\| `(\{.*\})` \|$", PAGE, re.MULTILINE)


def test_every_suffix_is_named() -> None:
    suffixes = {suffix for kind in FILE_KINDS for suffix in kind.suffixes} | set(COMPRESSIONS)
    plain = {suffix for suffix in suffixes if not suffix.startswith((".json.", ".jsonl.", ".tar."))}
    assert [suffix for suffix in plain if f"`{suffix}`" not in PAGE] == []


def test_every_layout_has_its_row() -> None:
    assert len(ROWS) == len(LAYOUTS)
    for (_, known, also, _), layout in zip(ROWS, LAYOUTS, strict=True):
        assert re.findall(r"`(\w+)`", known) == list(layout.needs)
        media = {"image", "images", "video", "videos"} & set(layout.also)
        assert set(re.findall(r"`(\w+)`", also)) == set(layout.also) - media
        assert ("media" in also) == bool(media)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_an_example_is_read(row: tuple[str, ...]) -> None:
    value = json.loads(row[3])
    got = normalise(RawRecord("line 1", value), NormaliseOptions())
    assert set(find_layout(value).needs) <= value.keys()  # type: ignore[union-attr]
    assert got.repairs == got.unread_keys == ()
    assert len(got.record.media) == ("a.jpg" in row[3])


def test_every_repair_has_its_row() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \|$", PAGE, re.MULTILINE))
    assert {name: said == "yes" for name, said in rows.items()} == {name: name in LLAVA for name in REPAIRS}


def test_the_longest_detail_is_the_one_that_is_stated() -> None:
    assert f"at most {LONGEST_DETAIL} characters" in " ".join(PAGE.split())
