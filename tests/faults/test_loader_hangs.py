"""A loader that hangs ends the run with a sentence that names rank, step and source."""

from __future__ import annotations

import json

import pytest

from tests.faults.run import command, ends_as_undisturbed, run_to_end


@pytest.mark.parametrize(
    ("launcher", "ranks", "workers"),
    [
        ("torchrun", 2, 1),
        pytest.param("deepspeed", 2, 0, marks=pytest.mark.slow),
        pytest.param("torchrun", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_a_loader_hangs(tmp_path, launcher, ranks, workers):
    save, rank = tmp_path / "save", ranks - 1
    flags = ["--train-iters", "6", "--save", str(save), "--load", str(save), "--save-interval", "2"]
    flags += ["--num-workers", str(workers), "--loader-timeout-seconds", "6"]
    start = command(launcher, ranks, "finetune", [*flags, "--metrics-file", str(tmp_path / "metrics.jsonl")])
    ended = run_to_end(start, tmp_path / "log", HAPLOVL_FAULT=f"hang_read@3:{rank}")
    assert ended.code == (70 if launcher == "deepspeed" else 1), ended.output[-4000:]
    said = json.loads((save / "last_words.json").read_text())
    assert (said["code"], said["rank"], said["step"], said["cause"]) == (70, rank, 2, "loader hangs")
    assert f"rank {rank} on" in said["sentence"] and "for step 3" in said["sentence"]
    assert "source mock" in said["sentence"]
    assert f"error: {said['sentence']}" in ended.output
    (stacks,) = (save / "debug").glob(f"stacks_*_rank_{rank}.txt")
    # The worker's stack, too: it inherits the file.
    assert "hang_faults.py" in stacks.read_text()
    ends_as_undisturbed(start, tmp_path)
