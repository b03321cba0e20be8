"""A run leaves when a file or a flag asks it to, saves before, and goes on with the same command."""

from __future__ import annotations

import json
import sys

import pytest

from tests.faults.run import TINY, command, losses, run_to_end

ALONE = [sys.executable, "tests/faults/faulty_run.py", "finetune", *TINY, "--train-iters", "4"]


def test_a_file_and_an_interval(tmp_path):
    save = tmp_path / "save"
    save.mkdir()
    (save / "exit").touch()
    kept = ["--save", str(save), "--load", str(save), "--metrics-file", str(tmp_path / "metrics.jsonl")]
    for code, words in (
        (75, f"left after step 1 of 4: the file {save / 'exit'} asks for it; everything is saved"),
        (75, "left after step 3 of 4: --exit-interval 3; everything is saved"),
        (0, "all 4 steps are done"),
    ):
        ended = run_to_end([*ALONE, *kept, "--exit-interval", "3"], tmp_path / "log")
        assert (ended.code, ended.last_line) == (code, words), ended.output[-3000:]
        assert json.loads((save / "last_words.json").read_text())["sentence"] == words
        assert not (save / "exit").exists()
    assert list(losses(tmp_path / "metrics.jsonl")) == [1, 2, 3, 4]


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_one_rank_out_of_memory_ends_all_with_its_sentence(tmp_path, launcher):
    words = command(launcher, 2, "finetune", ["--train-iters", "3", "--save", str(tmp_path / "save")])
    ended = run_to_end(words, tmp_path / "log", HAPLOVL_FAULT="out_of_memory@2:1")
    assert ended.code == 1, ended.output[-3000:]
    kept = json.loads((tmp_path / "save" / "last_words.json").read_text())
    assert (kept["code"], kept["rank"], kept["cause"]) == (1, 1, "out of memory")
    assert "can't allocate memory" in kept["sentence"]
    assert "change, cheapest first: (1) --recompute-granularity selective" in kept["sentence"]
    assert ended.output.count(f"error: {kept['sentence']}") == 1
