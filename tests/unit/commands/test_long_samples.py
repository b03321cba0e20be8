"""`--long-samples` through the command: what is written, what is counted, and what the images of a piece are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_haplovl.commands import preprocess
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.data.preprocessing.long_samples import CUT, LONG_SAMPLES, SPLIT
from megatron_haplovl.data.sources import IndexedSource
from megatron_haplovl.data.tokenizer import load_tokenizer
from tests.conftest import write_image

_LIMIT = 60


def _record(name: str, image: bool, turns: int, length: int = 4) -> dict[str, Any]:
    conversation = []
    for i in range(turns):
        mark = "<image>\n" if image and i == 0 else ""
        conversation += [
            {"from": "human", "value": f"{mark}What is circle {i}?"},
            {"from": "gpt", "value": "It is red." * length},
        ]
    return {"id": name, "conversations": conversation} | ({"image": "a.png"} if image else {})


@pytest.fixture
def records(tmp_path: Path) -> list[str]:
    """Flags with which one record fits, two are too long, and of one not even the first turn fits."""
    write_image(tmp_path / "images" / "a.png", 20, 30, seed=0)
    found = [
        _record("short", False, 1, 1),
        _record("text", False, 6, 1),
        _record("image", True, 6, 1),
        _record("never", False, 1, 40),
    ]
    (tmp_path / "r.json").write_text(json.dumps(found))
    return ["--input", str(tmp_path / "r.json"), "--image-folder", str(tmp_path / "images")]


def run(tmp_path: Path, flags: list[str], model: Path, *more: str) -> int:
    arguments = [*flags, "--output-prefix", str(tmp_path / "out"), "--tokenizer-model", str(model), "--workers", "1"]
    return preprocess.main([*arguments, "--chat-template", "llama3", *more])


@pytest.mark.parametrize("choice", LONG_SAMPLES)
def test_every_choice(
    tmp_path: Path, records: list[str], tiny_spm_model: Path, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", "haplovl-debug", "--seq-length", str(_LIMIT), "--long-samples", choice)
    status = run(tmp_path, records, tiny_spm_model, *flags)
    report = [json.loads(line) for line in (tmp_path / "out.report.jsonl").read_text().splitlines()]
    unusable = {"error": ["text", "image", "never"], "skip": ["text", "image", "never"]}.get(choice, ["never"])
    assert [(line["id"], line["reason"]) for line in report] == [(name, "too_long") for name in unusable]
    assert status == (0 if choice == "skip" else 1)
    if choice != "skip":
        status = run(tmp_path, records, tiny_spm_model, *flags, "--skip-bad-records")
    assert status == 0
    source = IndexedSource(str(tmp_path / "out"))
    assert source.manifest.skipped == {"too_long": len(unusable)}
    expected = {"cut": {CUT: 2}, "split": {SPLIT: 2}}.get(choice, {})
    assert source.manifest.repairs == expected
    lengths = source.counts(MODELS["haplovl-debug"].vision).tokens
    assert lengths.max() <= _LIMIT
    assert (len(lengths) == {"error": 1, "skip": 1, "cut": 3}[choice]) if choice != "split" else len(lengths) > 5
    shown = capsys.readouterr().out
    assert all(f"{name} {number}: " in shown for name, number in expected.items())


def test_pieces_hold_every_turn_and_the_image(tmp_path: Path, records: list[str], tiny_spm_model: Path) -> None:
    flags = ("--model", "haplovl-debug", "--seq-length", str(_LIMIT), "--long-samples", "split", "--skip-bad-records")
    assert run(tmp_path, records, tiny_spm_model, *flags) == 0
    source, tokenizer = IndexedSource(str(tmp_path / "out")), load_tokenizer(tiny_spm_model)
    texts, images = [], []
    for number in range(source.manifest.counts.samples):
        sample = source.read(number)
        texts.append(str(tokenizer.hf.decode(sample.token_ids[~sample.is_visual].tolist())))
        images.append(len(sample.visuals))
    with_image = [text for text, count in zip(texts, images, strict=True) if count]
    assert images == sorted(images) and set(images) == {0, 1}
    assert [f"circle {i}?" in "".join(with_image) for i in range(6)] == [True] * 6
    assert sum(text.count("What is circle") for text in with_image) == 6
    assert source.manifest.counts.images == 1


def test_a_choice_needs_a_model(
    tmp_path: Path, records: list[str], tiny_spm_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, records, tiny_spm_model, "--long-samples", "cut") == 2
    assert "--long-samples cut needs --model" in capsys.readouterr().err
