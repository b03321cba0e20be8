"""What the README names exists; `test_documented_commands.py` is about its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "examples/nlvr/README.md"]
# Paths that a reader will have after following the commands, or that belong to other software.
MADE_BY_COMMANDS = ("runs/", "data/captions", "data/instructions", "images/", ".venv")


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_is_named_exists(document):
    text = text_of(document)
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:py|sh|md|toml|txt))`", text))
    named |= {link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    missing = [path for path in named if not (REPOSITORY / path).exists() and not path.startswith(MADE_BY_COMMANDS)]
    folder = (REPOSITORY / document).parent
    missing = [path for path in missing if not (folder / path).exists()]
    assert named and not missing
