"""Two live runs and one --save: the second is refused, and one that has lost its lock ends; a dead one is replaced."""

from __future__ import annotations

import json
import os
import socket
import time

from megatron_haplovl.checkpoint.find import find_resumable
from megatron_haplovl.parallel.groups import Group
from tests.faults.run import command, run_to_end, started, wait_for


def words(save, steps):
    flags = ["--save", str(save), "--load", str(save), "--save-interval", "2", "--keep-last", "2"]
    return command("torchrun", 2, "finetune", [*flags, "--train-iters", str(steps)])


def test_one_run_at_a_time(tmp_path):
    save, log = tmp_path / "save", tmp_path / "first.log"
    with started(words(save, 3000), log) as first:
        wait_for("saved ", log)
        holder = json.loads((save / "run.lock").read_text())
        second = run_to_end(words(save, 3000), tmp_path / "second.log")
        assert second.code == 1
        named = f"belongs to run {holder['run_id']} (process {holder['pid']} on {socket.gethostname()}), which is alive"
        assert f"--save {save} {named}" in second.output
        assert first.poll() is None and json.loads((save / "run.lock").read_text()) == holder
        # As after a long stop: another run, on another machine, has taken the first one for dead.
        theirs = {**holder, "host": "node7", "machine": "another", "run_id": "theirs", "claim": "theirs"}
        (save / "run.lock").write_text(json.dumps(theirs))
        lost = time.monotonic()
        assert first.wait(90) == 1
        assert time.monotonic() - lost < 60
    assert "run.lock is that of run theirs (process" in log.read_text()
    assert "publishes nothing more" in log.read_text()
    # That one has been silent for long; whoever comes next takes its place.
    os.utime(save / "run.lock", (time.time() - 600, time.time() - 600))
    done = int((save / "latest").read_text().strip().removeprefix("global_step"))
    third = run_to_end(words(save, done + 3), tmp_path / "third.log")
    assert third.code == 0, third.output[-3000:]
    assert "run.lock: taken over from run theirs (process" in third.output
    assert f"resuming {save}/global_step{done}" in third.output
    assert not (save / "run.lock").exists()
    assert find_resumable(save, Group()) == save / f"global_step{done + 3}"
