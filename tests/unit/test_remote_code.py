"""No folder's own code runs here: every loading call of transformers says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LOADING = ("from_pretrained", "from_config", "pipeline", "load_dataset", "get_class_from_dynamic_module")
# A released class hands on what its caller has said; who calls it from this repository is among the calls below.
HANDS_ON = "megatron_haplovl/hf/processing_haplo.py"


def loading_calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of the package, the tools, the examples and the benchmarks that loads by a folder's name."""
    folders = ("megatron_haplovl", "tools", "examples", "benchmarks")
    paths = [*REPOSITORY.glob("*.py"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))]
    for path in sorted(paths):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in LOADING:
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", node


CALLS = dict(loading_calls())


@pytest.mark.parametrize("place", CALLS)
def test_a_call_says_that_it_trusts_no_code(place: str) -> None:
    keywords = {keyword.arg: keyword.value for keyword in CALLS[place].keywords}
    if place.startswith(HANDS_ON):
        assert None in keywords  # **kwargs
        return
    said = keywords.get("trust_remote_code")
    assert isinstance(said, ast.Constant) and said.value is False, place


def test_the_calls_are_found() -> None:
    assert len(CALLS) >= 10 and any("AutoTokenizer" in ast.unparse(call) for call in CALLS.values())
