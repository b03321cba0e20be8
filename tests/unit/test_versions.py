"""Versions are stated in three places for three purposes; they agree."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]


def pinned(file: str) -> dict[str, str]:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Requirement]]:
    """Extra, or "" for what is always installed -> its requirements with a range."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    runpy.run_path(str(REPOSITORY / "setup.py"))
    extras: dict[str, list[str]] = {"": given["install_requires"], **given["extras_require"]}
    found = {extra: [Requirement(text) for text in texts] for extra, texts in extras.items()}
    return {extra: [requirement for requirement in some if requirement.specifier] for extra, some in found.items()}


def test_the_lower_bounds_are_those_that_were_tested(stated: dict[str, list[Requirement]]) -> None:
    tested = pinned("tests/lower_bounds.txt")
    for requirement in (*stated[""], *stated["examples"], *stated["test"]):
        (lowest,) = (part.version for part in requirement.specifier if part.operator == ">=")
        assert f"{tested.get(requirement.name)}.".startswith(f"{lowest}."), f"{requirement} was not tested"


def test_the_pinned_versions_are_in_range(stated: dict[str, list[Requirement]]) -> None:
    pins = pinned("constraints.txt")
    for requirement in sum(stated.values(), []):
        assert requirement.specifier.contains(pins[requirement.name]), f"constraints.txt is outside of {requirement}"
