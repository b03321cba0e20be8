"""Whether the processes that have started this one are still there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_haplovl.parallel.process_table import is_running, process_stat

_LAUNCHED = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
"""Variables that launchers set for what they start. A process without them may outlive the shell that started it."""


class Launcher:
    """The launcher of this process and the script that has started it, as far as there are such. Made at the start.

    Args:
        environment: of this process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._name = next((name for variable, name in _LAUNCHED.items() if variable in environment), None)
        self._parent = os.getppid()
        self._is_orphan = self._name is not None and _is_reaper(self._parent)
        self._runner = _runner(self._parent) if self._name == "deepspeed" else None
        self._script = _script(environment.get("HAPLOVL_LAUNCH_DIR"))

    def gone(self) -> str | None:
        """A sentence about what is gone, if anything is."""
        if self._is_orphan:
            return f"the launcher ({self._name}) was gone before this rank began, and its ranks end with it"
        if self._name is not None and os.getppid() != self._parent:
            return f"the launcher ({self._name}, process {self._parent}) is gone, and its ranks end with it"
        if self._runner is not None and not is_running(self._runner):
            return f"the launcher ({self._name}, process {self._runner}) is gone, and its ranks end with it"
        if self._script is not None and not is_running(self._script):
            return f"the launch script (process {self._script}) is gone, and its ranks end with it"
        return None


def _is_reaper(pid: int) -> bool:
    """Whether a process is no launcher, but takes the children of processes that have ended."""
    words = _command_line(pid)
    if pid == 1:
        # In a container the launcher itself may be the first process.
        return not any("torch" in word or "deepspeed" in word for word in words)
    return bool(words) and Path(words[0]).name == "systemd"


def _runner(parent: int) -> int | None:
    """The `deepspeed` that has started DeepSpeed's launcher on this machine, if it did not come from another one."""
    stat = process_stat(parent)
    if stat is None:
        return None
    names = {Path(word).name for word in _command_line(stat.parent)}
    return stat.parent if {"deepspeed", "ds", "deepspeed.launcher.runner"} & names else None


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def _script(folder: str | None) -> int | None:
    """The process of the launch script; none of this machine if the folder is on another one."""
    if folder is None:
        return None
    try:
        return int((Path(folder) / "pid").read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
