"""Starts ranks on this machine. Imports cost more than the tests themselves, so one launch runs many cases."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_ranks(script: str, ranks: int, *words: str, timeout: int = 1200) -> str:
    """Run `tests/distributed/<script>` on several ranks; see :func:`run_program`."""
    return run_program(f"tests/distributed/{script}", ranks, *words, timeout=timeout)


def run_program(path: str, ranks: int, *words: str, timeout: int = 1200) -> str:
    """Run a program of the repository on several ranks with torchrun and return what it printed.

    Raises:
        AssertionError: a rank failed or the time ran out; the output is the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [*launcher, str(REPOSITORY / path), *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout
