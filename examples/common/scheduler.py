"""Run phases: each once, several at a time where they do not depend on each other, all or none of them to the end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.common.phases import Phase, check_phases, fingerprint, is_done, log_file, mark_done, marker_file, prepare

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_TO_END = 20.0
_LINES_SHOWN_AFTER_FAILURE = 30
_BYTES_LOOKED_AT = 1 << 16
_LONGEST_LINE = 150
_SHOWN_COLUMNS = ("iteration", "loss", "accuracy")


@dataclass
class _Running:
    """A phase whose command runs."""

    phase: Phase
    key: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    looked: float
    shown: str = ""

    def show_progress(self) -> None:
        """Print the newest whole line of the log, now and then, if it is a new one."""
        if time.monotonic() - self.looked < _SECONDS_BETWEEN_LINES:
            return
        self.looked = time.monotonic()
        lines = _last_lines(self.log)[:-1]  # the last one may be half written
        newest = next((line for line in reversed(lines) if line.strip()), self.shown)
        if newest != self.shown:
            self.shown = newest
            print(f"[{self.phase.name}] {shorten(newest.strip())}", flush=True)


def run_phases(phases: Sequence[Phase], run: Path, at_once: int) -> int:
    """Run every phase that is not done, in this order where there is a choice.

    Args:
        phases: a phase stands behind those that it reads.
        run: folder of the whole run; markers and logs go to `phases` below it.
        at_once: commands that run at the same time, at most.

    Returns:
        0, or the exit status of the first phase that failed; the others that ran then have been ended.

    Raises:
        ValueError: see `check_phases`.
    """
    check_phases(phases, run)
    waiting, running = list(phases), list[_Running]()
    keys: dict[str, str] = {}
    try:
        while waiting or running:
            ready = [phase for phase in waiting if all(earlier.name in keys for earlier in phase.after)]
            if ready and len(running) < at_once:
                phase = ready[0]
                waiting.remove(phase)
                key = key_of(phase, keys)
                if is_done(marker_file(run, phase), key):
                    print(f"[{phase.name}] done before, kept", flush=True)
                    keys[phase.name] = key
                else:
                    running.append(_start(phase, run, key))
                continue
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for started in list(running):
                started.show_progress()
                status = started.process.poll()
                if status is None:
                    continue
                running.remove(started)
                if status != 0:
                    _show_failure(started, status)
                    return status if status > 0 else 128 - status
                seconds = time.monotonic() - started.started
                mark_done(run, started.phase, started.key, seconds)
                keys[started.phase.name] = started.key
                print(f"[{started.phase.name}] done in {seconds:.0f} s", flush=True)
    finally:
        _end(running)
    return 0


def key_of(phase: Phase, keys: Mapping[str, str]) -> str:
    """Fingerprint of a phase, from those of the earlier ones by their names."""
    return fingerprint(phase.words, phase.inputs, [keys[earlier.name] for earlier in phase.after])


def environment_of(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's variables and these; `python` and `deepspeed` are those of this interpreter's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, **variables}


def shorten(line: str) -> str:
    """Of a training log line keep the iteration, the losses and the accuracies; cut any other line."""
    if line.startswith(("iteration", "validation")):
        columns = (column.strip() for column in line.split("|"))
        line = " | ".join(column for column in columns if any(word in column for word in _SHOWN_COLUMNS))
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def _start(phase: Phase, run: Path, key: str) -> _Running:
    prepare(run, phase, key)
    log = log_file(run, phase)
    print(f"[{phase.name}] started (log: {log})", flush=True)
    with log.open("wb") as file:
        # A group of its own, so that all of its processes can be ended together.
        process = subprocess.Popen(
            phase.words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment_of(phase.environment),
            process_group=0,
        )
    now = time.monotonic()
    return _Running(phase, key, process, log, started=now, looked=now)


def _show_failure(failed: _Running, status: int) -> None:
    name = failed.phase.name
    print(f"[{name}] failed with exit status {status}; the end of {failed.log}:", file=sys.stderr)
    lines = [line.rstrip() for line in _last_lines(failed.log) if line.strip()]
    print("\n".join(lines[-_LINES_SHOWN_AFTER_FAILURE:]), file=sys.stderr, flush=True)


def _last_lines(log: Path) -> list[str]:
    """The lines at the end of a log; a progress bar's carriage return ends a line, too."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _BYTES_LOOKED_AT))
        return re.split(r"[\r\n]+", file.read().decode("utf-8", errors="replace"))


def _end(running: Sequence[_Running]) -> None:
    """End commands with all of their processes, and wait for them."""
    for started in running:
        print(f"[{started.phase.name}] is ended", file=sys.stderr, flush=True)
        os.killpg(started.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_END
    for started in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.process.wait(max(0.0, deadline - time.monotonic()))
        # What did not listen; nothing may be left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait()
