"""Shares of several machines, joined, are one preprocessing; what does not fit is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_haplovl.commands import merge, preprocess
from megatron_haplovl.data.manifest import MANIFEST_SUFFIX, read_manifest
from tests.conftest import LlavaDataset, make_llava_dataset, train_sentencepiece


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LlavaDataset:
    """Some records, a bad one among them, and images that records far from each other share."""
    dataset = make_llava_dataset(tmp_path_factory.mktemp("data"), 60)
    dataset.records[33] = {"id": "bad", "conversations": []}
    dataset.json.write_text(json.dumps(dataset.records))
    return dataset


@pytest.fixture
def run(dataset: LlavaDataset, tiny_spm_model: Path, tmp_path: Path) -> Callable[..., str]:
    def run(name: str, *flags: str, inputs: tuple[Path, ...] = (dataset.json,)) -> str:
        prefix = str(tmp_path / name / "x")
        words = ["--input", *map(str, inputs), f"--image-folder={dataset.image_folder}", "--skip-bad-records"]
        words += [f"--tokenizer-model={tiny_spm_model}", "--chat-template=vicuna_v1", f"--output-prefix={prefix}"]
        assert preprocess.main([*words, "--workers=1", "--records-per-part=7", *flags]) == 0
        return prefix

    return run


def files_of(prefix: str) -> dict[str, bytes]:
    paths = Path(prefix).parent.glob(f"{Path(prefix).name}[._]*")
    return {path.name: path.read_bytes() for path in paths}


def as_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    rows = [{"json": json.dumps(record)} for record in records]
    texts = [{"text": f"Row {i}: {row['json'][:20]}"} for i, row in enumerate(rows)]
    parquet.write_table(pyarrow.Table.from_pylist(texts), path, row_group_size=9)
    return path


@pytest.mark.parametrize(
    ("kind", "total"),
    [
        ("json", 1),
        ("json", 3),
        ("json", 12),
        ("jsonl", 2),
        ("jsonl.gz", 3),
        ("parquet", 3),
        ("several", 2),
        ("several", 3),
    ],
)
def test_shares_joined_are_one_run(
    run: Callable[..., str], dataset: LlavaDataset, tmp_path: Path, kind: str, total: int
) -> None:
    lines = "".join(json.dumps(record) + "\n\n" for record in dataset.records)
    plain, packed, table = tmp_path / "r.jsonl", tmp_path / "r.jsonl.gz", tmp_path / "r.parquet"
    plain.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    as_parquet(table, dataset.records)
    inputs: dict[str, tuple[Path, ...]] = {
        "json": (dataset.json,),
        "jsonl": (plain,),
        "jsonl.gz": (packed,),
        "parquet": (table,),
    }
    inputs["several"] = (plain, dataset.json, table)
    whole = run("whole", inputs=inputs[kind])
    shares = [
        f"{run('shares', f'--part={i}/{total}', inputs=inputs[kind])}-{i:05d}-of-{total:05d}" for i in range(total)
    ]
    output = str(tmp_path / "joined" / "x")
    given = shares if total < 3 else [f"{tmp_path}/shares/x-*-of-{total:05d}"]
    assert merge.main(["--input-prefix", *given, "--output-prefix", output]) == 0
    assert files_of(output) == files_of(whole)
    assert sorted(path.name for path in (tmp_path / "joined").iterdir()) == sorted(files_of(output))


def test_workers_and_the_size_of_parts_change_nothing(run: Callable[..., str], dataset: LlavaDataset) -> None:
    one = files_of(run("one"))
    assert files_of(run("three", "--workers=3")) == one
    assert files_of(run("all", "--records-per-part=1000")) == one
    assert files_of(run("single", "--records-per-part=1", "--workers=2")) == one


def test_what_does_not_fit_is_refused(
    run: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*prefixes: str) -> str:
        capsys.readouterr()
        assert merge.main(["--input-prefix", *prefixes, "--output-prefix", str(tmp_path / "no" / "x")]) == 2
        assert not (tmp_path / "no").exists() or not list((tmp_path / "no").iterdir())
        return capsys.readouterr().err

    first = run("first")
    assert "has chat_template plain, those before it vicuna_v1" in refused(first, run("plain", "--chat-template=plain"))
    other = train_sentencepiece(tmp_path, name="other", vocab_size=400)
    assert "has tokenizer_fingerprint" in refused(first, run("other", f"--tokenizer-model={other}"))
    shares = [f"{run('s', f'--part={i}/3')}-{i:05d}-of-00003" for i in range(3)]
    assert "x-00001-of-00003 is expected, not" in refused(shares[0], shares[2])
    assert "x-00002-of-00003 is expected, not the end" in refused(*shares[:2])
    assert "is not the prefix of preprocessed data" in refused(first, str(tmp_path / "nowhere"))
    data = Path(f"{first}.bin").read_bytes()
    Path(f"{first}.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "do not have the checksum in the manifest" in refused(first)
    assert f"{first} is given twice" in refused(first, first)
    assert "no prefix matches" in refused(first, f"{first}-*-of-00007")
    manifest = json.loads(Path(first + MANIFEST_SUFFIX).read_text())
    del manifest["content_hash"]  # Not stated by older versions.
    manifest["format_version"] = 1
    Path(first + MANIFEST_SUFFIX).write_text(json.dumps(manifest))
    assert "preprocess it again to join it" in refused(first)


def test_a_merge_that_was_killed_leaves_nothing_for_ever(run: Callable[..., str], tmp_path: Path) -> None:
    first = run("first")
    output = tmp_path / "joined" / "x"
    shutil.copytree(Path(first).parent, f"{output}.merging")
    assert merge.main(["--input-prefix", first, "--output-prefix", str(output)]) == 0
    assert files_of(str(output)) == files_of(first) and read_manifest(str(output)).counts.samples == 59


@pytest.mark.parametrize("share", ["3/3", "1", "-1/3", "a/b", "0/0"])
def test_shares_that_cannot_be(run: Callable[..., str], share: str) -> None:
    with pytest.raises(SystemExit):
        run("x", f"--part={share}")
