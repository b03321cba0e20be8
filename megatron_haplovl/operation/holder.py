"""Who holds a lock: a process that other processes, on this machine or another one, can tell from every other."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from megatron_haplovl.parallel.process_table import process_stat


@dataclass(frozen=True)
class Holder:
    """A process and the run that it belongs to."""

    host: str
    machine: str
    """Where process ids mean the same: the kernel's start and the namespace of its processes."""
    pid: int
    started: int
    """When the process began, in the kernel's ticks, because process ids are used again."""
    run_id: str
    claim: str
    """Another one for every attempt to hold the lock."""

    @classmethod
    def this_process(cls, run_id: str) -> Holder:
        """This process, with a claim of its own."""
        pid = os.getpid()
        started = _started(pid)
        assert started is not None
        return cls(socket.gethostname(), _machine(), pid, started, run_id, secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """The holder that a lock names; None if it names none, because it was damaged or is not complete yet."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return None
        fields = {field.name: int if field.name in ("pid", "started") else str for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != fields:
            return None
        return cls(**values)

    def text(self) -> str:
        """What the lock's file holds."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def is_here(self) -> bool:
        """Whether this machine can tell if the process lives."""
        return self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether the process of a holder that is here has ended."""
        return _started(self.pid) != self.started

    @property
    def is_stopped(self) -> bool:
        """Whether the process of a holder that is here was stopped by a signal."""
        stat = process_stat(self.pid)
        return stat is not None and stat.state in ("T", "t")

    @property
    def is_this_process(self) -> bool:
        """Whether an earlier run in this process holds it."""
        return self.is_here and self.pid == os.getpid() and not self.is_gone

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.pid} on {self.host})"


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int | None:
    """When a process began; None if there is none, or only what it left for its parent to read."""
    stat = process_stat(pid)
    return None if stat is None or stat.has_ended else stat.started
