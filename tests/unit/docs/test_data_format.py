"""docs/data_format.md names everything that exists, and its worked example is what the tool writes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.indexed_dataset import IndexedDataset
from megatron_haplovl.data.manifest import Counts, FileEntry, Manifest
from megatron_haplovl.data.plan.cache import PlanInputs, SourceShare, cached_plan
from megatron_haplovl.data.plan.epoch import PlanSettings
from megatron_haplovl.data.plan.packs import COUNT_NAMES
from megatron_haplovl.data.preprocessing.processor import BadRecord
from megatron_haplovl.data.records import Reason
from megatron_haplovl.data.sources import IndexedSource

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs" / "data_format.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_every_suffix_key_and_reason_is_named() -> None:
    wanted = {*names.DATA_SUFFIXES, names.MANIFEST_SUFFIX, names.REPORT_SUFFIX, *COUNT_NAMES}
    for section in (Manifest, Counts, FileEntry, BadRecord):
        wanted |= {f.name for f in dataclasses.fields(section)}
    wanted |= {reason.value for reason in Reason}
    assert sorted(word for word in wanted if f"`{word}`" not in PAGE) == []


def preprocess(folder: Path, records: str) -> subprocess.CompletedProcess[str]:
    """The page's command on some records, with the page's images and words."""
    (folder / "records.json").write_text(records)
    (folder / "images").mkdir()
    (folder / "images" / "a.ppm").write_bytes(b"P6 3 2 255\n" + bytes(18))
    (folder / "images" / "b.ppm").write_bytes(b"P6 4 4 255\n" + bytes(48))
    vocabulary = {word: i for i, word in enumerate(blocks("text")[0].split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "words")
    (command,) = blocks("bash")
    words = [f"{REPOSITORY}/{w}" if w.endswith((".py", ".jinja")) else w for w in command.replace("\\\n", " ").split()]
    return subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page's files."""
    folder = tmp_path_factory.mktemp("example")
    result = preprocess(folder, blocks("json")[0])
    assert result.returncode == 0, result.stderr
    return str(folder / "example")


def test_the_manifest_is_the_one_that_is_shown(prefix: str) -> None:
    shown, found = json.loads(blocks("json")[1]), json.loads(Path(prefix + names.MANIFEST_SUFFIX).read_text())
    assert shown["files"].keys() < found["files"].keys()
    for suffix, entry in shown["files"].items():
        assert entry["bytes"] == found["files"][suffix]["bytes"], suffix
    for key in ("counts", "skipped", "format_version", "image_token_id", "video_token_id", "chat_template"):
        assert shown[key] == found[key], key
    assert shown.keys() == found.keys()


def test_the_files_hold_what_is_shown(prefix: str) -> None:
    rows = re.findall(r"^\| `(\w*)\.bin`, sequence (\d) \| `\[(.*)\]` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for part, number, values in rows:
        expected = [int(value) for value in values.split(", ")]
        assert IndexedDataset(prefix + part)[int(number)].tolist() == expected, (part, number)
    sizes = np.load(prefix + names.IMAGE_SIZES)
    assert f"| `_image_sizes.npy` | `{sizes.tolist()}` |" in PAGE


def test_the_index_is_the_one_that_is_shown(prefix: str) -> None:
    (block,) = (block for block in blocks("text") if "MMIDIDX" in block and "4d 4d" in block)
    shown = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    assert Path(prefix + ".idx").read_bytes() == shown


def test_the_report_is_the_one_that_is_shown(tmp_path: Path) -> None:
    result = preprocess(tmp_path, blocks("json")[0].replace("b.ppm", "c.ppm"))
    assert result.returncode == 1
    assert sorted(path.name for path in tmp_path.glob("example*")) == ["example.parts", "example.report.jsonl"]
    assert (tmp_path / "example.report.jsonl").read_text() == blocks("json")[2]


def test_the_cache_is_laid_out_as_shown(prefix: str, tmp_path: Path) -> None:
    settings = PlanSettings(seed=1, seq_length=64, packing=True, shuffle=True, skip_long_samples=False)
    inputs = PlanInputs([SourceShare(IndexedSource(prefix))], [], VisionConfig(14, 14), settings)
    cached_plan(inputs, tmp_path, min_packs=1, is_builder=True, barrier=lambda: None)
    (epoch,) = (tmp_path / inputs.key).iterdir()
    assert epoch.name == "epoch_00000"
    for path in epoch.iterdir():
        if path.suffix == ".npy":
            array = np.load(path)
            assert re.search(rf"`{path.name}` \| {array.dtype} ", PAGE), path.name
        else:
            assert path.name == "stats.json" and all(f"`{key}`" in PAGE for key in json.loads(path.read_text()))
