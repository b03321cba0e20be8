"""A loss spike (row 13): named and kept; on request nothing is trained on it, now or after the restart."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.faults.run import FaultyRun, command, last_words, losses, run_to_end

SPIKE, STEPS = 23, 25


def start(folder: Path, name: str, *flags: str, fault: str = "") -> FaultyRun:
    metrics = ["--metrics-file", str(folder / f"{name}.jsonl"), "--train-iters", str(STEPS)]
    words = command("torchrun", 2, "finetune", [*metrics, *flags])
    return run_to_end(words, folder / f"{name}.log", HAPLOVL_FAULT=fault)


def test_the_run_returns_and_passes_the_step_over(tmp_path):
    run = tmp_path / "run"
    # A checkpoint behind the warm-up, so that the median has to survive the restart.
    flags = ["--save", str(run), "--load", str(run), "--save-interval", "21", "--check-for-spiky-loss"]
    flags += ["--spiky-loss-action", "return"]
    ended = start(tmp_path, "first", *flags, fault=f"spike@{SPIKE}:1")
    assert ended.code == 1 and last_words(run)["code"] == 70, ended.output[-3000:]
    said = re.search(
        rf"step {SPIKE}: the loss \S+ is (\S+) times the median of the steps before; the largest share, "
        r"(?:99|100) %, is from rank 1 on \S+, micro-batch 1 of 2 \(mock data sample [\d, ]+\); the micro-batch is in "
        r"\S+; the weights were not updated\. It is on the list of steps to skip, so started again, ",
        ended.output,
    )
    assert said is not None, ended.output[-3000:]
    assert float(said[1]) > 100
    (listed,) = json.loads((run / "steps_to_skip.json").read_text())
    assert listed["step"] == SPIKE and "times the median" in listed["why"]
    again = start(tmp_path, "second", *flags)
    assert again.code == 0, again.output[-3000:]
    assert "21 steps are known" in again.output
    assert f"step {SPIKE} is passed over: the loss " in again.output
    alone = start(tmp_path, "alone", "--iterations-to-skip", str(SPIKE))
    assert alone.code == 0, alone.output[-3000:]
    both = {**losses(tmp_path / "first.jsonl"), **losses(tmp_path / "second.jsonl")}
    assert both == losses(tmp_path / "alone.jsonl")


def test_a_warning_changes_nothing_else(tmp_path):
    ended = start(
        tmp_path, "warned", "--save", str(tmp_path / "run"), "--check-for-spiky-loss", fault=f"spike@{SPIKE}:0"
    )
    assert ended.code == 0, ended.output[-3000:]
    assert re.search(
        rf"\[rank 0\] warning: step {SPIKE}: the loss .* from rank 0 .*; the step was trained on", ended.output
    )
    assert len(list((tmp_path / "run" / "debug").glob(f"step{SPIKE}-rank0-micro-batch1.*"))) == 2
    assert losses(tmp_path / "warned.jsonl")[SPIKE] > 100
    assert len(re.findall(rf"warning: step {SPIKE}: the loss", ended.output)) == 1
