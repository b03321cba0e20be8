"""Records of every layout with something changed at random: nothing crashes, and each is a sample or a report line."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_haplovl.data.preprocessing.processor import BadRecord, ProcessorSettings, RecordProcessor
from megatron_haplovl.data.records import LONGEST_DETAIL, RawRecord, Reason
from tests.layouts import CASES, MEMBERS, Tool, chat

JUNK: list[Any] = [
    *(None, "", " ", 0, -1, 10**400, 0.5, float("nan"), float("inf"), True, [], {}, [[]], [None], {"a": 1}),
    *(
        "<image>",
        "<video>",
        "<image>" * 9,
        "\ud800",
        "\0",
        "../a.png",
        "/etc/passwd",
        "a.png",
        "clips",
        "x" * 5000,
        "</s>",
    ),
    *(
        "data:image/png;base64,AAAA",
        "data:",
        "http://a.b/c.png",
        "human",
        "gpt",
        "system",
        "image",
        "text",
        {"type": "image"},
    ),
]
KEYS = ["image", "images", "video", "text", "from", "value", "role", "content", "type", "img", "conversations", "json"]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in inside]
    for _, item in list(inside):
        found += places(item)
    return found


def mutated(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(value) or [([value], 0)])
        kind = rng.randrange(5)
        if kind == 0:
            container[key] = rng.choice(JUNK)
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == 3 and isinstance(container[key], (str, bytes)):
            cut = rng.randint(0, len(container[key]))
            container[key] = container[key][:cut]
        elif isinstance(container, dict):
            container[rng.choice(KEYS)] = container.pop(key) if rng.random() < 0.5 else rng.choice(JUNK)
    return value


def records(images: Path) -> list[Any]:
    found = [case.record(images) if callable(case.record) else case.record for case in CASES.values()]
    return found + [{"__key__": "1", **members(images)} for members, _, _ in MEMBERS.values()]


def text_of(value: Any) -> bytes:
    return json.dumps(value, default=lambda data: f"data:image/png;base64,{data[:20].hex()}").encode()


def test_lines(tool: Tool) -> None:
    """Through the command line; of every fourth line, bytes are changed, too."""
    rng = random.Random(1)
    originals = records(tool.images)
    lines = []
    for number in range(500):
        line = bytearray(text_of(mutated(originals[number % len(originals)], rng)))
        if number % 4 == 0:
            for _ in range(3):
                line[rng.randrange(len(line))] = rng.randrange(256)
        lines.append(bytes(line))
    path = tool.folder / "a.jsonl"
    path.write_bytes(b"\n".join([*lines, text_of({"conversations": chat("a")})]))
    total = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    got = tool(path, flags=("--skip-bad-records",))
    assert got.status == 0 and got.manifest is not None
    assert got.manifest.counts.samples + len(got.report) == total
    assert len({line["location"] for line in got.report}) == len(got.report) > 100
    assert got.manifest.counts.samples > 50
    assert all(len(line["detail"]) <= LONGEST_DETAIL for line in got.report)
    assert {line["reason"] for line in got.report} <= {reason.value for reason in Reason}


@pytest.mark.parametrize("seed", range(2))
def test_objects_with_bytes(tool: Tool, seed: int) -> None:
    """As tables and tar shards have them."""
    rng = random.Random(seed)
    originals = records(tool.images)
    processor = RecordProcessor(ProcessorSettings(str(tool.tokenizer), "vicuna_v1", (str(tool.images),)))
    kinds = set()
    for number in range(300):
        value = mutated(originals[number % len(originals)], rng)
        result = processor.process(RawRecord(f"row {number}", value))
        assert isinstance(result, (list, BadRecord))
        kinds.add(type(result))
        if isinstance(result, BadRecord):
            assert 0 < len(result.detail) <= LONGEST_DETAIL and "\\x89PNG" not in result.detail
            json.dumps(result.id)
    assert len(kinds) == 2


@pytest.mark.parametrize("depth", [300, 600, 900, 990, 2000, 100_000])
def test_lists_in_lists(tool: Tool, depth: int) -> None:
    """Where the parser still follows, what comes behind it may not."""
    path = tool.folder / "a.jsonl"
    deep = "[" * depth + "]" * depth
    path.write_text("\n".join(f'{{"{key}": {deep}, "text": "A bus."}}' for key in ("a", "image", "conversations")))
    got = tool(path, flags=("--skip-bad-records",))
    # Nothing but empty lists is an empty key.
    assert (got.status, len(got.report)) in ((0, 1), (2, 3))
    assert len(got.texts) + len(got.report) == 3
