"""What a launch script says and returns at the other ends; and two runs on one machine with the default port."""

from __future__ import annotations

import json
import sys

import pytest

from tests.faults.run import REPOSITORY, TINY, run_to_end, started

SCRIPT = ["bash", "examples/ds_try_launch.sh", *TINY]


def variables(folder, launcher="torchrun", **more):
    return {"LAUNCHER": launcher, "NUM_GPUS": "2", "TMPDIR": str(folder), **more}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_what_needs_a_person_is_not_started_again(tmp_path, launcher):
    words = [*SCRIPT, "--train-iters", "2", "--save", str(tmp_path / "save"), "--global-batch-size", "3"]
    ended = run_to_end(words, tmp_path / "log", timeout=400, **variables(tmp_path, launcher))
    assert ended.code == 1, ended.output[-3000:]
    assert "--global-batch-size 3 is not a multiple" in ended.last_line, ended.output[-3000:]
    assert ended.output.count(f"error: {ended.last_line}") == 1
    assert "Traceback" not in ended.output
    words = json.loads((tmp_path / "save" / "last_words.json").read_text())
    assert (words["code"], words["restart"], words["sentence"]) == (1, 0, ended.last_line)


def test_a_refused_command_line_is_not_started_again(tmp_path):
    ended = run_to_end([*SCRIPT, "--no-such-flag"], tmp_path / "log", timeout=400, **variables(tmp_path, NUM_GPUS="1"))
    assert ended.code == 1, ended.output[-3000:]
    assert ended.last_line == "unrecognized arguments: --no-such-flag"
    assert ended.output.count("error: unrecognized arguments") == 2  # argparse, and the last words


@pytest.mark.slow
def test_two_runs_on_one_machine_need_no_ports(tmp_path):
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    words += [str(REPOSITORY / "tests/faults/faulty_run.py"), "finetune", *TINY, "--train-iters", "20"]
    with started(words, tmp_path / "one.log") as one, started(words, tmp_path / "other.log") as other:
        codes = [one.wait(timeout=400), other.wait(timeout=400)]
    assert codes == [0, 0], (tmp_path / "one.log").read_text()[-2000:] + (tmp_path / "other.log").read_text()[-2000:]
