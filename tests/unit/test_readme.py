"""What the README names exists, and its commands have only flags that the programs know."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from megatron_haplovl.config.cli import parse_args

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


def commands(document: str) -> list[list[str]]:
    """Commands of the code blocks, continuation lines joined, comments cut."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text_of(document), re.DOTALL)).replace("\\\n", " ")
    return [line.split("#")[0].split() for line in blocks.splitlines() if line.split("#")[0].strip()]


def test_the_training_commands_are_valid():
    checked = 0
    for words in commands("README.md"):
        for stage in ("pretrain", "finetune"):
            script = f"{stage}_haplovl.py"
            if script in words and "..." not in words:
                parse_args(stage, argv=words[words.index(script) + 1 :])
                checked += 1
    assert checked >= 3


def test_the_tools_know_every_flag():
    checked = 0
    for words in commands("README.md"):
        tools = [word for word in words if word.startswith("tools/") and word.endswith(".py")]
        for tool in tools:
            source = (REPOSITORY / tool).read_text(encoding="utf-8")
            for flag in (word for word in words if word.startswith("--")):
                assert f'"{flag}"' in source, f"{tool} has no {flag}"
                checked += 1
    assert checked > 10


def test_argparse_would_notice():
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse_args("finetune", argv=["--model", "haplovl-7b", "--data-path", "x", "--no-such-flag"])
