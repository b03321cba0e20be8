"""Ranks end with their launcher: nobody trains on beside a run that is started again."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from megatron_haplovl.parallel.process_table import is_running
from tests.faults.run import command, descendants, ends_as_undisturbed, started, wait_for


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_the_launcher_dies_alone(tmp_path, launcher):
    log, save = tmp_path / "log", tmp_path / "save"
    flags = ["--train-iters", "100000", "--save", str(save), "--load", str(save), "--save-interval", "2"]
    flags += ["--keep-last", "2", "--num-workers", "1", "--metrics-file", str(tmp_path / "metrics.jsonl")]
    words = command(launcher, 2, "finetune", flags)
    # New programs, whose variables /proc shows.
    with started(words, log, imported=False) as process:
        wait_for("iteration        3/", log)
        ranks = _ranks(process.pid)
        killed = time.time()
        os.kill(_parent(ranks[0]), signal.SIGKILL)
        while any(is_running(pid) for pid in ranks):
            assert time.time() < killed + 3 + 10, log.read_text()[-3000:]  # 3 s on a machine that is not loaded
            time.sleep(0.05)
        said = json.loads((save / "last_words.json").read_text())
        assert said["code"] == 70 and f"the launcher ({launcher}, process" in said["sentence"]
        assert said["time"] - killed < 3 + 5
    # The rate is constant, so that the length changes nothing else.
    words[words.index("100000")] = str(said["step"] + 3)
    ends_as_undisturbed(words, tmp_path)


def _ranks(launcher: int) -> list[int]:
    """The two processes below a launcher that are ranks; their loaders' workers are below them."""
    return [pid for pid in descendants(launcher) if _environment(pid).get("RANK") and _parent_is_no_rank(pid)]


def _parent_is_no_rank(pid: int) -> bool:
    return "RANK" not in _environment(_parent(pid))


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def _environment(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        entries = [entry.partition(b"=") for entry in file.read().split(b"\0")]
    return {name.decode(): value.decode(errors="replace") for name, _, value in entries}
