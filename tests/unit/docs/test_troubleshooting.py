"""Every message that docs/troubleshooting.md quotes is one that the programs print."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [quoted for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for quoted in re.findall(r"`(.+?)`", row)]
VALUE = "\0"


@cache
def texts() -> list[str]:
    """Every string in the sources; a value that is put in is VALUE."""
    sources = [*(REPOSITORY / "megatron_haplovl").rglob("*.py"), *(REPOSITORY / "tools").glob("*.py")]
    found = []
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                found.append(node.value)
    return found


def is_printed(quoted: str) -> bool:
    """Whether a message that a page quotes is one of the sources'."""
    # What is between two parts of a message may hold values, words, or a part of it that is chosen at run time.
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in texts())


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_exists(quoted: str) -> None:
    assert is_printed(quoted)


def test_messages_are_found_at_all() -> None:
    assert len(QUOTED) > 50
    assert not any("nothing of this kind" in text for text in texts())
