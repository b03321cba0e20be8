"""A machine that is lost: the others go on from the last checkpoint, where the batch divides (two agents on one)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.faults.run import REPOSITORY, TINY, descendants, free_port, losses, run_to_end, started, wait_for

pytestmark = pytest.mark.slow
STEPS = 40


def agent(number: int, ranks: int, port: int, folder: Path, *flags: str) -> list[str]:
    """The words that start torchrun as the machine of this number, of one or two."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", str(ranks)]
    words += ["--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    words += ["--rdzv_conf", f"is_host={int(number == 0)},last_call_timeout=20,keep_alive_interval=1"]
    script = [str(REPOSITORY / "tests/faults/faulty_run.py"), "finetune", *TINY, "--train-iters", str(STEPS)]
    kept = ["--save", str(folder / "save"), "--load", str(folder / "save"), "--save-interval", "1", "--keep-last", "2"]
    soon = ["--distributed-timeout-seconds-after-init", "40"]
    return [*words, *script, *kept, *soon, "--metrics-file", str(folder / "metrics.jsonl"), *flags]


def lose_the_second_machine(folder: Path, ranks: tuple[int, int], *flags: str) -> int:
    """Kill all of the second agent's processes in mid-run; the first agent's exit status."""
    port = free_port()
    logs = [folder / "0.log", folder / "1.log"]
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(started(agent(number, ranks[number], port, folder, *flags), logs[number]))
            for number in (0, 1)
        )
        metrics = folder / "metrics.jsonl"
        metrics.touch()
        wait_for('"iteration": 3,', metrics, timeout=400)
        for pid in [*descendants(second.pid), second.pid]:
            os.kill(pid, signal.SIGKILL)
        return first.wait(timeout=400)


def test_the_others_go_on(tmp_path):
    alone = [sys.executable, "tests/faults/faulty_run.py", "finetune", *TINY, "--train-iters", str(STEPS)]
    ended = run_to_end([*alone, "--metrics-file", str(tmp_path / "alone.jsonl")], tmp_path / "alone.log")
    assert ended.code == 0, ended.output[-3000:]
    code = lose_the_second_machine(tmp_path, (1, 1))
    assert code == 0, (tmp_path / "0.log").read_text()[-3000:]
    found, expected = losses(tmp_path / "metrics.jsonl"), losses(tmp_path / "alone.jsonl")
    assert found == pytest.approx(expected, rel=1e-4)
    words = json.loads((tmp_path / "save" / "last_words.json").read_text())
    assert (words["code"], words["previous"]["code"]) == (0, 70)


def test_a_batch_that_does_not_divide_needs_a_person(tmp_path):
    code = lose_the_second_machine(tmp_path, (2, 1), "--global-batch-size", "3")
    assert code != 0
    words = json.loads((tmp_path / "save" / "last_words.json").read_text())
    assert words["code"] == 1
    assert (
        "--global-batch-size 3 is not a multiple of --micro-batch-size 1 x 2 data-parallel ranks" in words["sentence"]
    )
