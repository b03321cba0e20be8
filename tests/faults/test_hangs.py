"""A rank that hangs is named within 30 s, every rank's stack is kept, and the run ends within the timeout."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from tests.faults.prefixes import words as on_prefix
from tests.faults.run import command, ends_as_undisturbed, losses, run_to_end
from tests.fixtures.small_prefix import write_small_prefix

TIMEOUT = 40
"""Seconds of --distributed-timeout-seconds-after-init."""
SLACK = 10
"""Seconds that a loaded machine may need beyond what is promised."""

FAST: list[tuple[str, str, str, list[str]]] = [
    ("torchrun", "stop_forward@3:1", "has not answered", []),
    ("deepspeed", "stop_forward@3:0", "has not answered", []),
]
_TENSOR = ["--tensor-model-parallel-size", "2", "--post-num-attention-heads", "4", "--post-num-key-value-heads", "4"]
_PIPELINE = ["--pipeline-model-parallel-size", "2"]
SLOW = [
    *[("torchrun", f"stop_{phase}@3:0", "has not answered", []) for phase in ("loader", "reduce", "save")],
    *[("deepspeed", f"stop_{phase}@3:1", "has not answered", []) for phase in ("backward", "evaluate")],
    *[("torchrun", f"hang_{phase}@3:1", "has not moved", []) for phase in ("loader", "forward", "backward", "reduce")],
    ("torchrun", "hang_evaluate@3:0", "has not moved", []),
    ("deepspeed", "hang_save@3:0", "has not moved", []),
    ("deepspeed", "hang_forward@3:0", "has not moved", []),
    *[("torchrun", "hang_forward@3:1", "has not moved", layout) for layout in (_TENSOR, _PIPELINE)],
    *[("deepspeed", "stop_forward@3:0", "has not answered", layout) for layout in (_TENSOR, _PIPELINE)],
]


@pytest.mark.parametrize(
    ("launcher", "fault", "words", "layout"), FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_a_rank_hangs(tmp_path, launcher, fault, words, layout):
    save, phase, rank = tmp_path / "save", fault.partition("_")[2].partition("@")[0], fault[-1]
    flags = ["--train-iters", "6", "--save", str(save), "--save-interval", "3", *layout]
    flags += ["--distributed-timeout-seconds-after-init", str(TIMEOUT), "--load", str(save)]
    metrics = ["--metrics-file", str(tmp_path / "metrics.jsonl")]
    start = command(launcher, 2, "finetune", [*flags, *metrics])
    if phase == "evaluate":
        prefix = write_small_prefix(tmp_path)
        held_out = ["--valid-data-path", prefix, "--eval-interval", "3", "--eval-iters", "1"]
        start = on_prefix(launcher, prefix, *flags, *held_out, *metrics)
    at = tmp_path / "at"
    ended = run_to_end(start, tmp_path / "log", HAPLOVL_FAULT=fault, HAPLOVL_FAULT_TIME=str(at))
    assert ended.code == (70 if launcher == "deepspeed" else 1), ended.output[-4000:]
    said = json.loads((save / "last_words.json").read_text())
    assert f"rank {rank} on {socket.gethostname()} (process " in said["sentence"]
    assert words in said["sentence"] and (said["code"], said["rank"]) == (70, int(rank))
    if words == "has not moved":
        assert f"in phase {phase} of step 3" in said["sentence"]
    other = f"rank {1 - int(rank)}"
    assert f"[{other}] warning: rank {rank} on" in ended.output or f"warning: rank {rank} on" in ended.output
    assert ended.output.count(said["sentence"]) >= 1
    begun = float(at.read_text())
    assert _named(save, 1 - int(rank)) - begun < 30 + SLACK
    assert said["time"] - begun < TIMEOUT
    stacks = {path.stem[-1]: path.read_text() for path in (save / "debug").glob("stacks_*.txt")}
    assert set(stacks) == {"0", "1"}
    assert "hang_faults.py" in stacks[rank] and "hang_faults.py" not in stacks[str(1 - int(rank))]
    ends_as_undisturbed(start, tmp_path)


def _named(save: Path, witness: int) -> float:
    """When the suspicion came up: a rank that lives has written down its stacks then."""
    (file,) = (save / "debug").glob(f"stacks_*_rank_{witness}.txt")
    return time.mktime(time.strptime(file.read_text()[:19], "%Y-%m-%d %H:%M:%S"))


def test_a_rank_that_goes_on_costs_a_warning(tmp_path):
    def run(name, **extra):
        metrics = tmp_path / f"{name}.jsonl"
        flags = ["--train-iters", "60", "--metrics-file", str(metrics)]
        ended = run_to_end(command("torchrun", 2, "finetune", flags), tmp_path / name, **extra)
        assert ended.code == 0, ended.output[-4000:]
        return ended.output, losses(metrics)

    output, found = run("paused", HAPLOVL_FAULT="pause@3:1")
    assert "warning: rank 1 on" in output and "has not answered for" in output
    assert "warning: rank 1 goes on" in output
    assert found == run("undisturbed")[1]


@pytest.mark.slow
def test_a_rank_hangs_in_writing(tmp_path):
    """It is named before the others come to a collective that never ends; so is the part that is missing."""
    save, at = tmp_path / "save", tmp_path / "at"
    flags = ["--train-iters", "6", "--save", str(save), "--load", str(save), "--save-interval", "3"]
    flags += ["--distributed-timeout-seconds-after-init", "50", "--metrics-file", str(tmp_path / "metrics.jsonl")]
    start = command("torchrun", 2, "finetune", flags)
    ended = run_to_end(start, tmp_path / "log", HAPLOVL_FAULT="hang_write@3:1", HAPLOVL_FAULT_TIME=str(at))
    said = json.loads((save / "last_words.json").read_text())
    assert "has not moved" in said["sentence"] and "in phase save of step 3" in said["sentence"]
    assert said["rank"] == 1 and said["time"] - float(at.read_text()) < 50
    assert _named(save, 0) - float(at.read_text()) < 30 + SLACK
    assert "warning: saving failed: rank 1 did not write its part of global_step3 in 25 s" in ended.output
    ends_as_undisturbed(start, tmp_path)
