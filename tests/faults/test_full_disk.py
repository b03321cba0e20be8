"""A disk that is full while a run saves: it is freed in time, or the run ends and needs a person."""

from __future__ import annotations

import pytest

from tests.faults.run import command, losses, run_to_end


@pytest.mark.slow
def test_a_disk_that_is_freed_costs_a_tenth_of_an_interval(tmp_path):
    flags = ["--train-iters", "25", "--save-interval", "20", "--log-interval", "1"]
    whole = [*flags, "--metrics-file", str(tmp_path / "whole.jsonl"), "--save", str(tmp_path / "whole")]
    assert run_to_end(command("torchrun", 2, "finetune", whole), tmp_path / "whole.log").code == 0
    faulty = [*flags, "--metrics-file", str(tmp_path / "full.jsonl"), "--save", str(tmp_path / "full")]
    ended = run_to_end(command("torchrun", 2, "finetune", faulty), tmp_path / "log", HAPLOVL_FAULT="full_disk@2:1")
    assert ended.code == 0, ended.output[-3000:]
    for words, step in (("saving failed, the run goes on", 20), ("saving failed again, the run goes on", 22)):
        assert f"{words}: rank 0: rank 1 could not write its part of global_step{step}; rank 1: " in ended.output
    assert "File too large" in ended.output
    names = sorted(path.name for path in (tmp_path / "full").iterdir() if path.name.startswith(("global", ".global")))
    assert names == ["global_step24", "global_step25"]
    assert losses(tmp_path / "full.jsonl") == losses(tmp_path / "whole.jsonl")


def test_a_disk_that_stays_full_ends_the_run(tmp_path):
    save = tmp_path / "save"
    flags = ["--train-iters", "400", "--save-interval", "10", "--max-failed-saves", "2", "--save", str(save)]
    ended = run_to_end(command("torchrun", 2, "finetune", flags), tmp_path / "log", HAPLOVL_FAULT="full_disk@100:0")
    assert ended.code == 1
    assert "2 saves in a row have failed (--max-failed-saves 2), the last one after step 20: rank 0: " in ended.output
    assert not any(path.name.startswith(("global", ".global")) for path in save.iterdir())
