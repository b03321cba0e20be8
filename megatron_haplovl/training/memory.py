"""Memory that a rank has held, and memory that is free for it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from megatron_haplovl.parallel.launch import ranks_on_this_machine

GIB = 2**30

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since it began: on a GPU what torch gave out, else the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_bytes(device: torch.device) -> int | None:
    """What is free for this rank: on its GPU, or its share of what is free on the host; None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = host_free_bytes()
    return None if free is None else free // ranks_on_this_machine()


def host_free_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """What the host still has for all processes, or the container that this is; None where nothing says so.

    Args:
        meminfo: the kernel's figures.
        cgroup: those of the container, which may be allowed less.
    """
    if not meminfo.is_file():
        return None
    found = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    free = [1024 * int(found[0])] if found else []
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free.append(max(0, int(most) - int(used.read_text()) + _cache(cgroup / "memory.stat")))
    return min(free, default=None)


def _cache(stat: Path) -> int:
    """Bytes of files that the container counts as used and gives back when they are needed."""
    if not stat.is_file():
        return 0
    return sum(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file "))
