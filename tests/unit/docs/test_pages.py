"""Every path and link in README and the other pages leads somewhere, and README links every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PAGES = sorted(str(page.relative_to(REPOSITORY)) for page in (REPOSITORY / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/nlvr/README.md", *PAGES]
# What a reader will have after following the commands, what belongs to other software, and models elsewhere.
MADE_BY_COMMANDS = ("SAVE/", "runs/", "data/captions", "data/instructions", "images/", "my/", ".venv")
ELSEWHERE = ("openai/", "Qwen/")


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def paths_named(document: str) -> set[str]:
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:py|sh|md|toml|txt))`", text_of(document)))
    return {path for path in named if not path.startswith(MADE_BY_COMMANDS + ELSEWHERE)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_is_named_exists(document: str) -> None:
    folder = (REPOSITORY / document).parent
    assert not [p for p in paths_named(document) if not (REPOSITORY / p).exists() and not (folder / p).exists()]


def test_paths_are_found_at_all() -> None:
    assert len(set().union(*map(paths_named, DOCUMENTS))) > 50


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    folder = (REPOSITORY / document).parent
    for link in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = folder / path if path else REPOSITORY / document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_links_every_page() -> None:
    links = set(re.findall(r"\]\(([^)#]+)", text_of("README.md")))
    assert set(PAGES) <= links


def test_every_page_that_the_programs_name_exists() -> None:
    named = set()
    for folder in ("megatron_haplovl", "tools", "examples"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".sbatch"):
                named |= set(re.findall(r"docs/[\w/]+\.md", path.read_text(encoding="utf-8")))
    assert named
    assert not [page for page in named if not (REPOSITORY / page).is_file()]
