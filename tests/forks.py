"""Python programs without their imports: each is a copy of a server that has imported everything once."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait

from tests.processes import REPOSITORY

CONTEXT = multiprocessing.get_context("forkserver")


def run_copies(
    path: str, words: Sequence[str], variables: Sequence[Mapping[str, str]] = ({},), *, timeout: float
) -> tuple[list[int], str]:
    """Run a program of the repository in one process or several; returns their exit codes and what they printed.

    If one fails, the others are killed. The server ends with this process, and the programs end with the server.

    Args:
        path: the program, from the repository's root.
        words: its arguments.
        variables: environment variables of each process, beside this one's.
        timeout: seconds for all together.

    Raises:
        AssertionError: the time ran out; the output is the message.
    """
    with server_environment() as environment, tempfile.NamedTemporaryFile("r", errors="replace") as output:
        processes = [
            CONTEXT.Process(
                target=_become,
                args=(str(REPOSITORY / path), words, output.name, {**environment, **mine}),
            )
            for mine in variables
        ]
        for process in processes:
            process.start()
        try:
            in_time = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        text = output.read()
    assert in_time, f"no end after {timeout} s\n{text[-6000:]}"
    return [process.exitcode or 0 for process in processes], text


@contextlib.contextmanager
def server_environment() -> Iterator[dict[str, str]]:
    """What the server and its copies find in the environment; the server is running."""
    before = dict(os.environ)
    # Read when torch and DeepSpeed are imported.
    os.environ.update(PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    environment = dict(os.environ)
    try:
        CONTEXT.set_forkserver_preload(["tests.imports"])
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield environment


def _wait(processes: Sequence[multiprocessing.process.BaseProcess], timeout: float) -> bool:
    """Wait until all have ended, or one has failed; False if that takes too long."""
    end = time.monotonic() + timeout
    running = list(processes)
    while running and not any(process.exitcode for process in processes):
        wait([process.sentinel for process in running], max(0.0, end - time.monotonic()))
        running = [process for process in running if process.exitcode is None]
        if running and time.monotonic() >= end:
            for process in running:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGABRT)  # Its stacks go to the output.
                process.join(5)
            return False
    return True


def prepare(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Words, variables and folder of a program, and the rest that a new interpreter would have."""
    faulthandler.enable()
    # Otherwise workers of the program would be started like itself, and import everything anew.
    multiprocessing.set_start_method(None, force=True)
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(argv)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)


def _become(path: str, words: Sequence[str], output: str, environment: Mapping[str, str]) -> None:
    """Become a program of its own."""
    threading.Thread(target=end_with_the_tests, daemon=True).start()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    prepare([path, *words], environment)
    runpy.run_path(path, run_name="__main__")


def end_with_the_tests() -> None:
    """Where pytest is killed, the server lives on as long as its copies do."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
