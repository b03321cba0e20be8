"""Starts ranks on this machine. Imports cost more than the tests themselves, so one launch runs many cases."""

from __future__ import annotations

import socket

from tests.forks import run_copies


def run_ranks(script: str, ranks: int, *words: str, timeout: int = 1200) -> str:
    """Run `tests/distributed/<script>` on several ranks; see :func:`run_program`."""
    return run_program(f"tests/distributed/{script}", ranks, *words, timeout=timeout)


def run_program(path: str, ranks: int, *words: str, timeout: int = 1200) -> str:
    """Run a program of the repository on several ranks, as torchrun starts them, and return what they printed.

    Raises:
        AssertionError: a rank failed or the time ran out; the output is the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [
        {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(ranks)
    ]
    codes, output = run_copies(path, words, variables, timeout=timeout)
    assert not any(codes), f"the ranks ended with {codes}\n{output[-6000:]}"
    return output
