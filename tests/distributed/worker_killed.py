"""Starts a run again and again, and kills it while it saves; then lets it run to its end. One process, no launcher.

Children are forked, so that everything is imported once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401

from megatron_haplovl.checkpoint.manifest import damaged_files
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import config
from tests.processes import die_with_parent

KILLS, TRAIN_ITERS = 30, 100


def child(folder: Path, name: str, asynchronous: bool, **flags: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    die_with_parent()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(variable, None)
    output = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        run = setup(
            config(
                "full",
                schedule__train_iters=TRAIN_ITERS,
                checkpoint__save=str(folder / name),
                checkpoint__load=str(folder / name),
                checkpoint__save_interval=1,
                checkpoint__keep_last=3,
                checkpoint__async_save=asynchronous,
                logging__log_interval=1,
                logging__metrics_file=str(folder / f"{name}.jsonl"),
                **flags,
            )
        )
        train(run)
        run.close()
        code = 0
    finally:
        os._exit(code)


def main(folder: Path) -> None:
    random.seed(0)
    assert os.waitpid(child(folder, "whole", False), 0)[1] == 0
    root, killed, hit = folder / "killed", 0, 0
    while killed < KILLS:
        pid = child(folder, "killed", asynchronous=killed % 2 == 1)
        # Some saves go by, and then one is hit somewhere.
        seen: set[str] = set()
        passed = random.randrange(1, 3)
        while len(seen) <= passed:
            seen.update(path.name for path in root.glob(".global_step*.unfinished"))
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run has ended, or failed"
        time.sleep(random.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        hit += any(root.glob(".global_step*.unfinished"))
        if (root / "latest").is_file():
            assert damaged_files(root / (root / "latest").read_text().strip()) == []
    assert hit > KILLS // 4, f"only {hit} kills of {KILLS} hit a checkpoint"
    print("unfinished checkpoints:", hit)
    assert os.waitpid(child(folder, "killed", False), 0)[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
