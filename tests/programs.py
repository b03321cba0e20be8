"""Command lines of Python without the imports, launchers included.

A launcher is a copy of the server in `forks.py`, and the programs that it starts are copies of the launcher: its
children, as they would be otherwise, with the same signals, sessions and exit codes.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.forks import CONTEXT, end_with_the_tests, prepare, server_environment

_POPEN = subprocess.Popen


class Program(abc.ABC):
    """What launchers and tests use of `subprocess.Popen`, of a program that is a copy."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    @abc.abstractmethod
    def returncode(self) -> int | None:
        """Exit code, or the number of a signal below 0; None while it runs."""

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.returncode) is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _OfServer(Program):
    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        assert process.pid is not None
        super().__init__(process.pid)
        self._process = process

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


class _Child(Program):
    _code: int | None = None

    @property
    def returncode(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def start_program(words: Sequence[str], output: Path, environment: Mapping[str, str]) -> Program:
    """Start a Python program in a session of its own.

    Args:
        words: its command line, which starts with the interpreter.
        output: receives both of its streams.
        environment: all of its variables.
    """
    with server_environment():
        output.write_bytes(b"")
        process = CONTEXT.Process(target=_launch, args=(words, str(output), dict(environment)))
        process.start()
    return _OfServer(process)


def _launch(words: Sequence[str], output: str, environment: Mapping[str, str]) -> None:
    os.setsid()
    threading.Thread(target=end_with_the_tests, daemon=True).start()
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _run_program(words, environment)


def _popen(args: Sequence[str], **options: Any) -> Program | subprocess.Popen[Any]:
    """In the place of `subprocess.Popen`: a copy of this process where the program is one of Python's."""
    files = [options.get(name) for name in ("stdout", "stderr")]
    known = options.keys() <= {"env", "stdout", "stderr", "start_new_session"}
    if args[0] != sys.executable or not known or any(isinstance(file, int) for file in files):
        return _POPEN(args, **options)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # By a thread, so that the launcher's functions are not on the stack of the new program.
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(_fork(args, options)))
    thread.start()
    thread.join()
    return _Child(pids[0])


def _fork(words: Sequence[str], options: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    threading.current_thread().name = "MainThread"
    # What a new program has: streams, signals as they were not ignored, no other file.
    for number, name in ((1, "stdout"), (2, "stderr")):
        if options.get(name) is not None:
            os.dup2(options[name].fileno(), number)
    if options.get("start_new_session"):
        os.setsid()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.close(int(name))
    environment = options.get("env")
    _run_program(words, dict(os.environ) if environment is None else environment)


def _run_program(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become the program of a command line, up to its end."""
    rest = [word for word in words[1:] if word != "-u"]
    is_module = rest[0] == "-m"
    code = 1
    try:
        prepare(rest[1:] if is_module else rest, environment)
        # Here, since a test needs no torch to start a program.
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        vars(subprocess)["Popen"] = vars(subprocess_handler)["Popen"] = _popen
        if is_module:
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(rest[0]).parent))
            runpy.run_path(rest[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            sys.stderr.write(f"{end.code}\n")
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
