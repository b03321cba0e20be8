"""Starts a run with a fault in it, and says how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import REPOSITORY as REPOSITORY
from tests.processes import descendants as descendants
from tests.processes import die_with_parent, kill_tree
from tests.programs import Program, start_program

_TINY = """
--model haplovl-debug --mock-data --device cpu --seq-length 96 --num-workers 0 --lr-decay-style constant
--global-batch-size 4 --lr 1e-3 --log-interval 1 --post-num-layers 1 --pre-num-layers 1
"""
TINY = _TINY.split()
"""A model of a block in each decoder; a step takes some hundredths of a second."""


@dataclass(frozen=True)
class FaultyRun:
    """How a run ended."""

    code: int
    output: str
    seconds: float
    """From the start to the end, imports included."""

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return [line for line in self.output.splitlines() if line.strip()][-1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def command(launcher: str, ranks: int, stage: str, flags: Sequence[str]) -> list[str]:
    """The words that start a run.

    Args:
        launcher: torchrun or deepspeed.
        ranks: their number, all on this machine.
        stage: pretrain or finetune.
        flags: of the training, behind TINY.
    """
    script = str(REPOSITORY / "tests/faults/faulty_run.py")
    if launcher == "deepspeed":
        start = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        start += ["--master_port", str(free_port())]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        start += [f"--master_port={free_port()}"]
    return [*start, script, stage, *TINY, *flags]


def environment(**extra: str) -> dict[str, str]:
    """Variables for a run on this machine's CPU."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **extra}


@contextlib.contextmanager
def started(
    words: Sequence[str], log: Path, *, imported: bool = True, **extra: str
) -> Iterator[Program | subprocess.Popen[bytes]]:
    """A process in a session of its own, whose output goes to a file. Whatever is left of it at the end is killed.

    Args:
        words: what starts it.
        log: receives its output.
        imported: Python programs have imported everything already (`tests/forks.py`).
        extra: environment variables, such as HAPLOVL_FAULT (see `faulty_run.py`).
    """
    process: Program | subprocess.Popen[bytes]
    if imported and words[0] == sys.executable:
        process = start_program(words, log, environment(**extra))
    else:
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                env=environment(**extra),
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
    try:
        yield process
    finally:
        kill_tree(process)


def run_to_end(
    words: Sequence[str], log: Path, *, timeout: float = 400, imported: bool = True, **extra: str
) -> FaultyRun:
    """Start a run as `started` does, and wait for its end.

    Args:
        words: what starts it.
        log: receives its output.
        timeout: seconds.
        imported: as of `started`.
        extra: environment variables.

    Raises:
        AssertionError: it does not end; its output is the message.
    """
    begun = time.monotonic()
    with started(words, log, imported=imported, **extra) as process:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout} s: {log.read_text()[-4000:]}") from None
    return FaultyRun(code, log.read_text(errors="replace"), time.monotonic() - begun)


def wait_for(text: str, log: Path, *, timeout: float = 120) -> None:
    """Wait until a run's output holds a text.

    Raises:
        AssertionError: it does not come.
    """
    end = time.monotonic() + timeout
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < end, f"no {text!r} after {timeout} s: {log.read_text(errors='replace')[-4000:]}"
        time.sleep(0.1)


def losses(metrics: Path) -> dict[int, float]:
    """Step -> loss, of a metrics file; the last line of a step counts."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {row["iteration"]: row["loss"] for row in rows if "loss" in row}


def last_words(save: Path) -> dict[str, Any]:
    """What a run said last, with its code; torchrun makes 1 of every code."""
    words: dict[str, Any] = json.loads((save / "last_words.json").read_text())
    return words


def ends_as_undisturbed(words: Sequence[str], folder: Path) -> None:
    """The command of a run that has ended early, once more: it goes on, and each step has the loss of undisturbed runs.

    Args:
        words: the command, with --load and --save, and --metrics-file behind them as its last flag.
        folder: receives what the undisturbed run writes.
    """
    metrics, save = Path(words[-1]), words[words.index("--save") + 1]
    again = run_to_end(words, folder / "again.log")
    assert again.code == 0, again.output[-4000:]
    assert last_words(Path(save))["code"] == 0
    alone = [word.replace(save, str(folder / "undisturbed")) for word in words[:-1]]
    assert run_to_end([*alone, str(folder / "undisturbed.jsonl")], folder / "undisturbed.log").code == 0
    steps = [row["iteration"] for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
    assert len(steps) == len(set(steps))
    assert losses(metrics) == losses(folder / "undisturbed.jsonl")
