"""The page about faults quotes what the programs print, names flags that exist, and tests that inflict its rows."""

from __future__ import annotations

import re

import pytest

from tests.unit.docs.test_troubleshooting import REPOSITORY, is_printed

PAGE = (REPOSITORY / "docs" / "operation.md").read_text(encoding="utf-8")
FAULTS = PAGE.partition("## What happens when")[2].partition("## Files of a run")[0]
ROWS = [line.strip("| ").split(" | ") for line in FAULTS.splitlines() if line.startswith("| ")]
# Files and flags are looked at below.
QUOTED = [
    quoted
    for row in ROWS
    for quoted in re.findall(r"`(.+?)`", row[1])
    if " " in quoted and not quoted.startswith(("SAVE/", "--"))
]


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_exists(quoted: str) -> None:
    assert is_printed(quoted)


def test_every_row_is_looked_at() -> None:
    assert len(QUOTED) > 25
    assert len([row for row in ROWS if row[0] != "fault"]) > 25


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][\w-]+)", FAULTS))))
def test_a_flag_exists(flag: str) -> None:
    assert f"`{flag}`" in (REPOSITORY / "docs" / "flags.md").read_text(encoding="utf-8")


def test_every_file_of_fault_tests_is_named() -> None:
    for path in (REPOSITORY / "tests" / "faults").glob("test_*.py"):
        assert f"`tests/faults/{path.name}`" in PAGE
