"""The launch that this process belongs to: who has started it, and the folder that its processes here share.

A launch script (`examples/common/launch.sh`) makes the folder and names it in HAPLOVL_LAUNCH_DIR. It holds the script's
`pid`, `leave` with the name of a signal that the script got, and what ranks write: `begun`, `last_words.json`, `ending`
(the code, and below it the sentence). Without a script the folder is made for the launcher, when there is need of it.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_haplovl.parallel.process_table import process_stat


@dataclass(frozen=True)
class Launch:
    """One start of a launcher, or of a process that nobody has launched."""

    folder: Path
    """Shared by the processes of one launcher on this machine; it need not exist yet."""
    is_scripted: bool
    """Whether a launch script waits for the end, and prints the sentence."""
    began: float
    """`time.time()` when the launcher started. What is younger is of this launch."""
    restart: int
    """How often torchrun has started the ranks anew after a fault."""
    process_began: float
    """The same of this process: torchrun starts ranks anew for a machine that joins, too, and does not count that."""

    @staticmethod
    def of_environment() -> Launch:
        """What the environment says. To be called before this process has joined the others."""
        given = os.environ.get("HAPLOVL_LAUNCH_DIR")
        parent = os.getppid()
        # A process that nobody has launched has a shell for a parent, which is older than the run.
        launched = "LOCAL_RANK" in os.environ
        began = _started(parent) if launched else time.time()
        mark = _started_ticks(parent) if launched else int(began)
        own = Path(tempfile.gettempdir()) / f"haplovl-{os.getuid()}-{parent}-{mark}"
        return Launch(
            folder=Path(given) if given else own,
            is_scripted=bool(given),
            began=began,
            restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            process_began=_started(os.getpid()) if launched else began,
        )

    def make_folder(self) -> Path:
        """The folder, which others cannot read.

        Raises:
            OSError: it cannot be made, or belongs to somebody else.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.folder} belongs to another user")
        return self.folder

    def asked_to_leave(self) -> str | None:
        """The signals that the launch script got, by name."""
        if not self.is_scripted:
            return None
        try:
            return (self.folder / "leave").read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None


def ranks_on_this_machine() -> int:
    """Their number, by what torchrun or DeepSpeed says; 1 for a process that nobody has launched."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _started(pid: int) -> float:
    """`time.time()` when a process started, to a hundredth of a second."""
    since_boot = _started_ticks(pid) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def _started_ticks(pid: int) -> int:
    """The kernel's clock ticks from its boot to the start of a process: the same whoever asks, and when (proc(5))."""
    stat = process_stat(pid)
    if stat is None:
        raise ProcessLookupError(f"process {pid} has gone")
    return stat.started
