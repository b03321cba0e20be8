"""Each mixture of `examples/mixtures` in miniature: preprocessed by its file, then two steps of its stage.

Planted once to see it fail: a variable of a file misspelt, a section aux in a file of stage 2, an input that nothing
reads.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_haplovl.commands.preprocess import main
from megatron_haplovl.data.manifest import read_manifest
from tests.distributed.launch import run_program
from tests.fixtures.mixture_stand_ins import RECORDS, write_images, write_records
from tests.integration.mixtures import FILES, MIXTURES, RECIPES, metrics_file, read, variables
from tests.metrics_files import logged


def preprocess(folder: Path, file: str, tokenizer: Path) -> int:
    words = ["--data-config", str(MIXTURES / file), "--data-var", *variables(folder), "--workers=1"]
    return main([*words, "--tokenizer-model", str(tokenizer), "--chat-template=vicuna_v1", "--num-frames=3"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_spm_model):
    """Stand-ins of all that the mixtures name, preprocessed by their files and trained on in one launch."""
    folder = tmp_path_factory.mktemp("mixtures")
    for file in FILES:
        mixture = read(folder, file)
        for source in mixture.sources():
            for path in source.input:
                write_records(mixture.fill(path, source))
            if source.image_folder is not None:
                write_images(mixture.fill(source.image_folder, source))
    for file in FILES:
        assert preprocess(folder, file, tiny_spm_model) == 0, file
    (folder / "cases.json").write_text(json.dumps([[file, RECIPES[file]] for file in FILES]), encoding="utf-8")
    run_program("tests/integration/worker_mixtures.py", 1, str(folder))
    return folder


@pytest.mark.parametrize("file", FILES)
def test_a_mixture_is_preprocessed_and_trained_on(folder, file):
    mixture = read(folder, file)
    for source in mixture.sources():
        assert read_manifest(mixture.prefix(source)).counts.samples == RECORDS
    (columns,) = logged(metrics_file(folder, file))
    assert columns["iteration"] == 2
    names = [source.name for source in mixture.sources()]
    found = {name.partition("/")[2] for name in columns if name.startswith("consumed samples/")}
    assert found == (set(names) if len(names) > 1 else set())
    assert sum(columns.get(f"consumed samples/{name}", 1) for name in names) > 0


def test_what_is_up_to_date_is_skipped(folder, tiny_spm_model, capsys):
    capsys.readouterr()
    assert preprocess(folder, "mix-v4.yaml", tiny_spm_model) == 0
    printed = capsys.readouterr().out
    assert printed.count("is up to date (made from the same files and settings)") == 5 and "samples in" not in printed
    changed = folder / "ALPACA" / "alpaca_data.json"
    changed.write_text(changed.read_text() + "\n")
    assert preprocess(folder, "mix-v4.yaml", tiny_spm_model) == 0
    printed = capsys.readouterr().out
    assert printed.count("is up to date") == 4 and f"alpaca: {changed} -> " in printed


def test_every_file_is_a_stage_s_and_cites_the_paper():
    assert {"mix-v1.yaml", "mix-v2.yaml", "mmc4.yaml", "mix-v3.yaml", "mix-v4.yaml"} < set(FILES)
    for file in FILES:
        head = (MIXTURES / file).read_text(encoding="utf-8").partition("train:")[0]
        assert "paper" in head and ("App. " in head or "Sec. " in head), file
    # Joined are exactly those that the paper joins.
    joined = {file for file in FILES if read(Path("x"), file).aux}
    assert joined == {"mix-v2.yaml", "mix-v3.yaml", "mix-v4.yaml"}
