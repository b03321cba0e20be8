"""A loss or a gradient that is not finite (rows 8 and 9): named, kept, passed over or skipped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.faults.run import FaultyRun, command, last_words, losses, run_to_end
from tests.metrics_files import logged

STEPS = 5


def start(folder: Path, name: str, *flags: str, fault: str = "") -> FaultyRun:
    metrics = ["--metrics-file", str(folder / f"{name}.jsonl"), "--train-iters", str(STEPS)]
    words = command("torchrun", 2, "finetune", [*metrics, *flags])
    return run_to_end(words, folder / f"{name}.log", HAPLOVL_FAULT=fault)


def rows(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    return {row["iteration"]: row for row in logged(folder / f"{name}.jsonl")}


@pytest.fixture(scope="module")
def without_step_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, and that passes over its third step."""
    folder = tmp_path_factory.mktemp("without")
    ended = start(folder, "without", "--iterations-to-skip", "3")
    assert ended.code == 0, ended.output[-3000:]
    assert "[rank 0] steps that are passed over: 3, --iterations-to-skip" in ended.output
    assert "[rank 0] step 3 is passed over: --iterations-to-skip" in ended.output
    return folder


def test_a_step_that_is_passed_over_is_counted_and_has_no_loss(without_step_3):
    found = rows(without_step_3, "without")
    assert [found[step]["number of skipped iterations"] for step in range(1, STEPS + 1)] == [0, 0, 1, 1, 1]
    assert [found[step]["number of nan iterations"] for step in range(1, STEPS + 1)] == [0] * STEPS
    assert "loss" not in found[3] and "grad norm" not in found[3]
    assert [found[step]["consumed samples"] for step in range(1, STEPS + 1)] == [4, 8, 12, 16, 20]


def test_a_loss_is_named_kept_and_passed_over(tmp_path, without_step_3):
    save = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "1"]
    ended = start(tmp_path, "first", *save, fault="nan_loss@3:1")
    assert ended.code == 1 and last_words(tmp_path / "run")["code"] == 70, ended.output[-3000:]
    said = re.search(
        r"step 3: a loss is not finite \(loss nan, lm loss nan\), from rank 1 on \S+, micro-batch 1 of 2 "
        r"\(mock data sample ([\d, ]+)\); the first layer whose output is not finite is lm_head, on rank 1; "
        r"the micro-batch is in (\S+); the weights were not updated\. Started again, ",
        ended.output,
    )
    assert said is not None, ended.output[-3000:]
    record = json.loads(Path(said[2]).with_suffix(".json").read_text())
    assert [str(sample["sample"]) for sample in record["samples"]] == said[1].split(", ")
    assert Path(said[2]).parent == tmp_path / "run" / "debug"
    # The remedy that the sentence names: the same losses as if the step had been passed over from the start.
    again = start(tmp_path, "second", *save, "--iterations-to-skip", "3")
    assert again.code == 0, again.output[-3000:]
    both = {**losses(tmp_path / "first.jsonl"), **losses(tmp_path / "second.jsonl")}
    assert both == losses(without_step_3 / "without.jsonl")
    assert rows(tmp_path, "second")[STEPS]["number of skipped iterations"] == 1


@pytest.mark.parametrize("save", [True, False])
def test_the_same_step_twice_needs_a_person(tmp_path, save):
    """Torchrun would start it again four times."""
    words = command("torchrun", 2, "finetune", ["--train-iters", str(STEPS)])
    words.insert(words.index("--nproc_per_node=2"), "--max_restarts=4")
    more = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "1"] if save else []
    ended = run_to_end([*words, *more], tmp_path / "log", HAPLOVL_FAULT="nan_loss@3:1", HAPLOVL_FAULT_AGAIN="1")
    assert (
        "a loss is not finite" in ended.output and "(the second time in a row after 2 steps, so start" in ended.output
    )
    # Torchrun goes on starting; what it starts ends with that sentence, before anything is built.
    assert ended.output.count("[rank 0] ranks: 2 | ") == 2
    assert ended.code == 1, ended.output[-3000:]


def test_a_gradient_is_named_and_skipped_before_and_after_a_restart(tmp_path, without_step_3):
    save = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    flags = [*save, "--max-skipped-steps", "1"]
    ended = start(tmp_path, "first", *flags, "--exit-interval", "4", fault="inf_gradient@3:1")
    said = (
        "[rank 0] warning: step 3: the gradient of connector.weight is not finite on rank 1, though the losses are; it "
        "is from rank 1 on "
    )
    assert said in ended.output, ended.output[-3000:]
    assert "the weights were not updated; skipped (1 in a row, --max-skipped-steps 1)" in ended.output
    assert "OVERFLOW" not in ended.output
    again = start(tmp_path, "second", *flags)
    assert again.code == 0, again.output[-3000:]
    found = {**rows(tmp_path, "first"), **rows(tmp_path, "second")}
    undisturbed = rows(without_step_3, "without")
    assert {step: found[step]["loss"] for step in (1, 2, 4, 5)} == {s: undisturbed[s]["loss"] for s in (1, 2, 4, 5)}
    assert [found[step]["number of skipped iterations"] for step in range(1, STEPS + 1)] == [0, 0, 1, 1, 1]
    assert [found[step]["number of nan iterations"] for step in range(1, STEPS + 1)] == [0, 0, 1, 1, 1]


def test_without_the_check_nothing_is_looked_at_and_the_log_says_so(tmp_path):
    ended = start(tmp_path, "blind", "--no-check-for-nan-in-loss-and-grad", "--zero-stage", "0", fault="nan_loss@3:1")
    assert ended.code == 0, ended.output[-3000:]
    assert "[rank 0] --no-check-for-nan-in-loss-and-grad: losses and gradients are not looked at" in ended.output
    last = rows(tmp_path, "blind")[STEPS]
    assert last["loss"] != last["loss"], "NaN has gone into the weights"
